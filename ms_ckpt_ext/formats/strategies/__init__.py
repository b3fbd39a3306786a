"""Strategy files.

file       MindSpore's node_strategy.proto, declared once; strategies read and written
json_form  the same in JSON
merging    the files of pipeline stages as one
groups     files of communication groups
"""
