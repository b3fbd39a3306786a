"""Is it what was written? Read in this order:

manifest       what is on record: a digest of every tensor
digests        digests of what is stored, and where they differ from the record
recorded       the same by all ranks together, before a load
authenticate   encrypted files proved before a Parameter changes
pairing        what of two checkpoints is compared with what
compare        are two checkpoints the same model?
copies         copies that pipeline stages cut differently
soundness      is one checkpoint whole and sound?
numerics       which elements differ, and by how much; what is no number
"""
