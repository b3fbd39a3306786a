"""Boxes, and where MindSpore's layouts put each rank's. Read in this order:

region       boxes: half-open, axis-aligned
layout       which box a rank holds of one parameter
box          the same said outright, for one rank
strategy     which layout every parameter has on every pipeline stage
supplement   layouts from several places put together
dtype        the table of element types
view         a box of an array, seen with its axes split
arrangement  how boxes of several arrays fill a view of another
strided      a box as bytes: one strided copy
ranks        which ranks of the source one rank of the target needs
neighbours   which ranks stand for all when copies are compared
groups       what a parameter is for, told by its name
describe     a layout as values that explain themselves
"""
