"""How the ranks of a job find one of them over TCP, before they have any connection. Read in this order:

meeting      all ranks come to the hub that rank 0 opens
interfaces   the addresses of this host, and what tells its network from others
addresses    where a hub is: what the other ranks are told of it
listening    listening on the addresses that the job needs, and no more
search       trying every address that may lead to a hub
greeting     rank and hub prove to each other that they belong to the job
cells        messages of any length over a collective of short ones
"""
