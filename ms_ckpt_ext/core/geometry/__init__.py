"""Boxes, and where MindSpore's layouts put each rank's. Read in this order:

array        what an array is: the type of its elements, its shape, boxes in it
layout       which box a rank holds of one parameter
box          the same said outright, for one rank
strategy     which layout every parameter has on every pipeline stage
supplement   layouts from several places put together
view         a box of an array, seen with its axes split
arrangement  how boxes of several arrays fill a view of another
strided      a box as bytes: one strided copy
ranks        which ranks of the source one rank of the target needs
neighbours   which ranks stand for all when copies are compared
groups       what a parameter is for, told by its name
describe     a layout as values that explain themselves
"""
