"""`ms-ckpt`: the functions of `ms_ckpt_ext` as commands. What is here is words; the work is done by `api`."""
