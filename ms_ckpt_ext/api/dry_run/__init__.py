"""The plan of a load.

plan     what every rank would read, send, receive and hold
report   the same as values
page     the same as a page
"""
