"""The functions users call: MindSpore's names and signatures, and what this package adds to them."""
