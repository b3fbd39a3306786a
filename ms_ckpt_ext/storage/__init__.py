"""Moving bytes to and from files.

reader        ranged reads
pool          open readers, shared and bounded
buffers       scratch memory
sink          where bytes land
digest_sink   the same, digested on the way
threads       work that ends with its first error
staging       output that appears whole or not at all; with
              `claims` the right to write files, `hidden` the folder where they are prepared,
              `journal` what is begun to be published, `published` what is
flock         locks that end with their process
atomic        small files replaced whole
linux         calls that Python lacks
"""
