"""A differential fuzzer: random checkpoints and calls, run by stock MindSpore and by this package on equal copies.

    model     a random model, how a job cut it, and how another one wants it: values, no I/O
    files     strategy files and checkpoints of such a job, written without this package
    cases     a random call of one of the functions, its input, and the truth where there is one
    sides     stock and ours: runs a call in a folder of its own, and notes what came of it
    compare   the differences of two outcomes, each with the word of the truth
    found     a difference with all that is known about it
    known     the table of differences that are meant, in three parts, as docs/differences.md has them
    run       a seed from its number to its report

Nothing here is computed with this package: the truth is the unsharded model, cut by the few lines of `model.Cut`.
"""
