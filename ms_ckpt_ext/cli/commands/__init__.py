"""The commands, one module each: `completion`, `convert`, `decrypt`, `diff_strategy`, `encrypt`, `inspect`,
`merge`, `plan`, `reshard`, `verify`.
"""
