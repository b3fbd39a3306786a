"""File formats: where each tensor of a file lies. Readers give an index without reading tensor contents.

index                what every reader returns
registry             suffix to format, and how a file is opened
safetensors          reader and writer; its header is parsed by `safetensors_header`
ckpt                 MindSpore's .ckpt, walked with `wire`; written by `ckpt_writer`
checksum             CRC-32 of parts, put together
discovery/           which files are meant, by their names and first bytes
strategies/          strategy files
crypto/              encrypted files
"""
