"""`ms-ckpt`: the functions of `ms_ckpt_ext` as commands. This package holds words; `api` does the work.

main        from a command line to an exit code
command     what a command is
commands/   one module each
options     options that several commands have
jobs        what the commands that write files have in common
words       numbers, tables and emphasis; `tree` parameters as a tree; `records` values as JSON
launch      what scripts/*.sh run; their options are in `settings`
"""
