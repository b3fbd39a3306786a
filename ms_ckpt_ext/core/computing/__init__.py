"""Parameters that are computed. Read in this order:

operations   what computes boxes: dequantising, scaling, filling, products
rules        weight rules that compute
padding      axes made longer, or cut off
arithmetic   elements as numbers, and rounding
"""
