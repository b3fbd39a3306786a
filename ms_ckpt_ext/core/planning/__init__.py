"""From boxes to pieces, and from pieces to reads. Read in this order:

pieces         which part of which source slice lands where in a target box
recipes        parameters made of others, by moving or computing, as sources like any other
assembly       a box as it is put together of what is moved and what is computed
rule           what a weight rule is: names of sources and of a target
weight_rules   parameters made of others: renamed, joined, interleaved, stacked
joining        sources joined group by group, and their shares
rule_inverses  the same rules, for the way back
apply_rules    rules applied to what a checkpoint holds
name_patterns  names with placeholders
suffixes       names that differ by a wrapper's prefix
io_units       the vocabulary of file I/O: tasks, batches, reads, copies
copy_forms     pieces as copies, each worked out once
schedule       pieces as bounded batches of long reads
"""
