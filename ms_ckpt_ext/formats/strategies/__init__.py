"""Strategy files.

file       MindSpore's node_strategy.proto, declared once; a strategy read and written
json_form  the same as JSON
merging    the files of pipeline stages as one
groups     files of communication groups
"""
