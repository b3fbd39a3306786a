"""Runs plans: a checkpoint as a source, files into files, and the load of a whole job.

source/      what a checkpoint is: its files, its parameters, their names
unlisted/    what no strategy lists: compared, kept
copying/     threads that read, cut and write
files/       file to file: merge, reshard, convert
huggingface/ rules as data, and what of a training goes out
load/        ranks to Parameters, together
transfer/    Parameters to Parameters, without storage
integrity/   is it what was written
resume/      which checkpoint a training goes on from
"""
