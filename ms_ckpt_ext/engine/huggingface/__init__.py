"""Hugging Face's names: rules as data, and what of a training they name. Read in this order:

sizes        numbers that a rule file speaks of by the keys of config.json
rule_file    what a rule file says: checked, and turned into rules
families     the rule files that come with the package, in the folder rules/ (`configs/rules` in a checkout)
weights      which parameters of a training go out
companions   the files that lie beside the weights: configuration and tokenizer
"""
