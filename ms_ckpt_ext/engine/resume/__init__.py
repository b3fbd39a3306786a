"""Which checkpoint a training resumes from. Read in this order:

records       what a training job records when it saves
sightings     what lies in a directory, as one host sees it, and the layouts of the job that saved it
candidates    the checkpoints that these files form, and whether they agree with the records
trial_order   the order in which they are tried
newest        the newest that is whole, chosen by all ranks
scalars       its training scalars
"""
