"""File formats: where each tensor of a file lies. Readers give an index without reading tensor contents.

table                the formats, a row for each, and what a file is
index                what every reader returns
registry             how a file of any format is opened and laid out
safetensors          reader and writer; its header is parsed by `safetensors_header`
ckpt                 MindSpore's .ckpt, walked with `wire`; written by `ckpt_writer`
checksum             CRC-32 of a file, combined from parts
discovery/           which files are meant, by their names and first bytes
strategies/          strategy files
crypto/              encrypted files
"""
