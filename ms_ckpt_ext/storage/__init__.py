"""Moving bytes to and from files: ranged reads, preallocated writes, copies inside the kernel, atomic publishing."""
