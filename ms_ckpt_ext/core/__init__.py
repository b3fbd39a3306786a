"""Pure geometry and planning: values in, values out. No I/O, no mindspore, no clocks."""
