"""Parameters to Parameters, without storage. Read in this order:

held        what every rank holds of a side, told to all
sources     what they hold, as parameters that planning can locate
wanted      what the ranks of the other side want of it
addresses   where the slices of a rank lie, in one space of numbers
prepare     agree, plan
holdings    the slices of this rank, as the source of an exchange
compared    what was filled, with what it was filled from
estimate    the same on paper
report      what was moved
"""
