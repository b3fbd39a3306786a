"""Where ranks meet: one thread in one process, and a line to it from each. Read in this order:

limits        time limits, and how much is held in memory
frames        the messages; equal payloads travel once
reduction     one share: payloads of all ranks are put together, and only what differs is sent on
server        the thread that listens to all, answers all, and reports which ranks are gone or late
peer          its end of one connection, which never blocks
descriptors   open files for that many connections
line          a rank's end
"""
