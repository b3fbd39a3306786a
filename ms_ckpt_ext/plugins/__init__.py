"""Modules that frameworks load by themselves, named in their own configuration. Each file stands alone.

`mindformers_plugin` is for MindFormers.
"""
