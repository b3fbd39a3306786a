"""Pure geometry and planning: values in, values out. No I/O, no mindspore, no clocks.

geometry/   boxes, and where MindSpore's layouts put each rank's
planning/   from boxes to pieces, and from pieces to reads
computing/  parameters that are computed: dequantised, scaled, filled up
exchange/   who reads what and sends what to whom, when all ranks of a job load together
"""
