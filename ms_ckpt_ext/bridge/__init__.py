"""Where MindSpore comes in: layouts and Parameters of Cells. Importing a module here imports mindspore."""
