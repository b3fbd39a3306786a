"""Tensors that no strategy lists, and whether slices are really slices. Read in this order:

whole_slices   stretches of stored tensors, compared by digests: are slices whole parameters (integrated_save=True)?
dealt          stretches compared by all ranks of a job together
alike          do the ranks hold the same?
proven         a checkpoint of which one copy stands for all
keeping        which of these tensors the ranks of a target keep
tied           copies that pipeline stages cut differently, and that differ
"""
