"""Which files are meant, by their names and first bytes. Read in this order:

saves                  what a file's name says: save, run, rank
rank_folders           which file of which rank folder
whole_models           whole models in one folder, by map, index or number
torch_slices           torch's slices, which are not whole tensors
mindformers            MindFormers' folders, and what their `mindformers_metadata` says
"""
