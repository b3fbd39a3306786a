"""Where ranks meet: one thread in one process, and a line to it from each. Read in this order:

limits        how long is waited, and how much is held
frames        what travels; equal payloads travel once
reduction     one share: what ranks tell meets, and only what differs goes on
server        the thread that hears all, answers all, and tells who is gone or late
peer          its end of one connection, which never blocks
descriptors   room for as many connections
line          a rank's end
"""
