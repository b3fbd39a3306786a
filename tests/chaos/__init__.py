"""The fault campaign behind `scripts/chaos`: real commands and loads, in real processes, under faults.

In the order in which to read them:

    injector.c  an LD_PRELOAD library: calls of one process that fail, stop short, come late, or wait
    injector    builds it, and says by environment variables what it does
    inputs      checkpoints that all runs work on
    jobs        what is run: command lines, and loads by ranks
    ranks       the process of such a load: ranks as threads, or one rank of several processes
    sockets     the transport of these processes: the project's control plane, without a backend
    faults      the faults: where, when and for how long; and the outcomes that are allowed
    nursery     where processes come from
    running     starts the processes of a run, and does to them what a fault says
    judging     what a run left behind, and whether that is allowed
    campaign    one run after another, by a seed; the table
"""
