"""Hugging Face's names: rules as data, and which parameters of a training they name. Read in this order:

sizes           numbers that a rule file gives by keys of config.json
rule_file       the contents of a rule file: checked, and turned into rules
families        the rule files that come with the package, in the folder rules/ (`configs/rules` in a checkout)
weights         which parameters of a training are exported
adapter_config  what the products of a LoRA adapter are multiplied by
adapter         LoRA in a folder of its own: products that are added to weights
companions      the files that lie beside the weights: configuration and tokenizer
"""
