"""The commands, one module each: `completion`, `convert`, `decrypt`, `diff_strategy`, `encrypt`, `export`, `inspect`,
`measure`, `merge`, `plan`, `reshard`, `verify`.
"""
