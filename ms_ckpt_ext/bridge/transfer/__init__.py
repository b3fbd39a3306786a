"""Parameters of networks into those of others. Read in this order:

asked         what is to be moved, and how
sides         Parameters of a Cell or a dictionary, and how they lie
distributed   tensors that state their own layout
matching      which Parameter takes what
overlap       memory that both sides share
planned       the ranks agree and plan
present       the Parameters as they are when a transfer is run
moving        a planned transfer is run
"""
