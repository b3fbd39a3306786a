"""What no strategy lists, and whether slices are slices. Read in this order:

probes         stretches of stored tensors, told by digests
dealt          probes answered by all ranks of a job together
alike          do the ranks hold the same?
proven         a checkpoint of which one copy stands for all
keeping        what the files of a target keep of it
whole_slices   slices that are whole parameters (integrated_save=True)
tied           copies that pipeline stages cut differently, and that differ
"""
