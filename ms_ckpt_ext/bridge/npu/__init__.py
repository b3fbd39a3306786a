"""Parameters on the NPU.

cutting       bytes go up in chunks, are cut there by views, and land in Parameters: a cooperative load, a transfer
uploads       bytes go straight into Parameters: a direct load
alone         buffers of a single NPU
formats       Parameters whose memory is in another order than their elements
"""
