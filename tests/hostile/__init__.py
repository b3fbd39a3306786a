"""Input that is meant to hurt: what every parser of outside data does with it.

parsers     the parsers, a row for each
ranks       what ranks tell each other, when one of them is malicious
seeds       the small files that mutation begins with
mutations   changes that know a form: JSON, protobuf's wire format, a safetensors header
judge       what may happen: an answer or one of the package's errors, in little memory and time
__main__    `scripts/fuzz.sh parsers`: all of them, coverage-guided where atheris is installed
"""
