"""The functions users call.

mindspore/    MindSpore's names and signatures
dry_run/      the plan of a load
huggingface/  rules of families of models, and export
arguments     what users may pass, checked once; `source` finds a checkpoint, `inputs` the files of a conversion
measure       how fast a machine is, as a hardware profile for plans and loads
jobs          merge and reshard
convert       between formats; encrypt and decrypt
resume        go on training, or serve
transfer      from network to network
scalars       training scalars
inspect       what is in a checkpoint, as an `inspection`
diff          what changes between two strategies
verify        proof that a checkpoint is what it should be
"""
