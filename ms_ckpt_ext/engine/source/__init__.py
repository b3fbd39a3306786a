"""What a checkpoint is. Read in this order:

listing     which files it consists of, before any is opened
surplus     rank folders beyond those that the strategy speaks of
siblings    files of other ranks beside those that were named one by one
sharded     the files of ranks: what their strategy lists, and what they hold beside it
folders     MindFormers' folders, which know their layouts
catalog     which parameters there are, and in which files their slices lie
rank_boxes  what a rank has of it under a strategy
renaming    the same under other names: choice_func and name_map
values      small things read out of it: scalars, text
lazy        all of it as a dictionary that reads what is indexed
"""
