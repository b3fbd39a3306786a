"""File to file: merge, reshard, convert, encrypt. Read in this order:

job              a job as a value: the files it wants, laid out, and what fills each
merge            the job of a merge
reshard          the job of a re-cut
order            the order of parameters in .ckpt files
convert          the job of a conversion
overwrite        what of its target a job may overwrite
beside           results beside their inputs
execution        runs a job, from where an earlier run stopped
dry_run          tells what running it would do
encrypted_sink   output that is encrypted on the way
crc_sink         output whose checksum is put together on the way
"""
