"""MindSpore's names and signatures: each checks its arguments and calls what the package has.

load         load_distributed_checkpoint
merge        unified_safetensors, merge_pipeline_strategys
transform    transform_checkpoints and its relatives
parameters   load_checkpoint, load_segmented_checkpoints; and `load`, which is ours
background   load_checkpoint_async
family       the rest of MindSpore's checkpoint functions
d2d          TransformParametersD2D of mindrlhf
install      all of them under MindSpore's own names
given_files  where a load finds its files
prefixes     which names a prefix keeps or leaves out
unserved     what only MindSpore's own load_checkpoint serves
"""
