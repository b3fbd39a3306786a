"""Parameters to Parameters, without storage. Read in this order:

held        what every rank holds of a side, shared with all
sources     what they hold, as parameters that planning can locate
wanted      what the ranks of the other side want of it
addresses   where the slices of a rank lie, in one address space
prepare     agree, plan
holdings    the slices of this rank, as the source of an exchange
compared    compares what was filled with what it was filled from
estimate    a transfer that is planned and not made
report      what was moved
"""
