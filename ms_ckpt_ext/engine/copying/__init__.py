"""Threads that read, cut and write.

worker    runs units of I/O: every read makes its copies, every stretch goes to all its places
strides   copies that are not one run of bytes
"""
