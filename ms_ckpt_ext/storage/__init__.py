"""Moving bytes to and from files.

reader        ranged reads, and open readers, shared and bounded
sink          where bytes land
digest_sink   the same, digested on the way
threads       work that ends with its first error
staging       output that appears whole or not at all; with `claims`, the right to write files,
              and `publishing`, what is being published and what has been
locks         locks that end with their process, and the hidden folder where files are prepared
linux         what Python lacks: small files read or replaced whole, calls of Linux, scratch memory
"""
