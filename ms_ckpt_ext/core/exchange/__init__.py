"""Who reads what and sends what to whom, when all ranks of a job load together. Read in this order:

demand     what the ranks want, what they have in memory, and the sizes that bound the exchange
slices     what lands where of which source slice, in boxes that travel as they are
parts      which sets of ranks want which cut
chunks     the long reads that bring the parts, and who makes them; what of them concerns one rank
rounds     which parts travel together
streams    what groups gather of them in equal shares
tiers      what crosses between servers once, and is spread inside
plan       all of it put together
one_rank   what one rank packs, sends, receives and unpacks in a round
ragged     rows of different lengths in flat arrays
staging    how what is read lies in memory, and how much of it at once
totals     what a plan costs every rank
cost       how long that takes
"""
