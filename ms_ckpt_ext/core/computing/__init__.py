"""Parameters that are computed. Read in this order:

operations   what computes boxes: dequantising, scaling, filling
rules        weight rules that compute, and their like
arithmetic   elements as numbers, and rounding
"""
