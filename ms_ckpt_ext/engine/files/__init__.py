"""File to file: merge, reshard, convert, encrypt. Read in this order:

job              a job as a value: the files it wants, laid out, and what fills each
merge            the job of a merge
reshard          the job of a re-cut
order            the order of parameters in .ckpt files
convert          the job of a conversion
overwrite        what a job may overwrite, and what it must not
beside           results beside their inputs
resume_point     what an earlier run finished
execution        runs a job
dry_run          tells what running it would do
encrypted_sink   output that is encrypted on the way
crc_sink         output whose checksum is put together on the way
"""
