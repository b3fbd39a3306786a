"""MindFormers' checkpoint loading, served by this package: `seam` puts it there, a plugin asks for it from YAML."""
