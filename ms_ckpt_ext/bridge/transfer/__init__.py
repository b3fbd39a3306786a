"""Parameters of networks into those of others. Read in this order:

sides         Parameters of a Cell or a dictionary, and how they lie
distributed   tensors that say so themselves
matching      which Parameter takes what
overlap       memory that is of both sides
moving        agree and plan, then move
"""
