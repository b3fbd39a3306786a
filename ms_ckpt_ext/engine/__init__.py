"""Runs plans: catalog of a source, file-to-file jobs, and loads into memory."""
