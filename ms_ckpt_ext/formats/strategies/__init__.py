"""Strategy files.

messages   MindSpore's node_strategy.proto, declared once
file       a strategy read and written, in protobuf or JSON
merging    the files of pipeline stages as one
groups     files of communication groups
"""
