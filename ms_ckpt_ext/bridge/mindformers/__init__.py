"""MindFormers' checkpoint loading, served by this package.

seam         replaces MindFormers' functions under all their names; a plugin asks for it from YAML
options      what the YAML entry says
loader       its newer way: load_checkpoint, load_hf_checkpoint
converters   its conversion templates as weight rules
legacy       its legacy way, from rank folders
single       the same from whole files
"""
