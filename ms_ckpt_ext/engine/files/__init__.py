"""File to file: merge, reshard, convert, encrypt. Read in this order:

job              a job as a value: the files it wants, laid out, and what fills each
jobs             the jobs of merge and reshard
order            the order of parameters in .ckpt files
convert          the job of a conversion
apart            results stay out of the source's folders
older            what an older result left in the target
origin           whose a file in the target is
beside           results beside their inputs
resume_point     what an earlier run finished
execution        runs a job
dry_run          tells what running it would do
encrypted_sink   output that is encrypted on the way
crc_sink         output whose checksum is put together on the way
"""
