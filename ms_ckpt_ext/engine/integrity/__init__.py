"""Is it what was written? Read in this order:

contents       what files hold, found in one pass: digests, checksums, odd numbers
manifest       what is on record: a digest of every tensor
digests        digests of a file that is there
finding        what is not as it should be in a file
recorded       files against what is on record of them, by one process or by all ranks
folder         a folder against its manifests
authenticate   encrypted files proved before a Parameter changes
pairing        what of two checkpoints is compared with what
compare        are two checkpoints the same model?
copies         copies that pipeline stages cut differently
soundness      is one checkpoint whole and sound?
numerics       which elements differ, and by how much; what is no number
"""
