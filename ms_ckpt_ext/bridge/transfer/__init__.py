"""Parameters of networks into those of others. Read in this order:

asked         what is to be moved, and how
sides         Parameters of a Cell or a dictionary, and how they lie
distributed   tensors that say so themselves
matching      which Parameter takes what
overlap       memory that is of both sides
planned       agree and plan
present       the Parameters as they are when it is run
moving        then move
"""
