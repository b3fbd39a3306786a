"""Ranks to Parameters, together. Read in this order:

options        how a load is to be made
hosts          which ranks see the same files, and which of them does what
survey         who sees which file, and what is in it
taking         what one rank can take of it
session        agree, learn what all ranks want, plan, choose the mode, exchange
run_exchange   the rounds of one rank: read, exchange, place
computing      what is computed of what arrives
slabs          chunks on their way from files to where they are cut
replicas       do ranks that hold the same region hold the same bytes?
estimate       the same load on paper
profiles       named hardware for the cost model, and how large a round may be on it
measure        hardware as it is
"""
