"""Which checkpoint a training goes on from. Read in this order:

records       what a training job notes when it saves
sightings     what lies in a directory, as one host sees it, and the layouts of the job that saved it
candidates    the checkpoints that this makes, and whether the notes hold
trial_order   the order in which they are tried
newest        the newest that is whole, chosen by all ranks
scalars       its training scalars
"""
