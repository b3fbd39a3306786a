"""Where MindSpore comes in: layouts and Parameters of Cells. Importing a module here imports mindspore.

world         this process's place among the ranks
match         which Parameter takes what; `settle` for a whole network
memory        Parameters as memory on the CPU
npu/          Parameters on the NPU
request       what is loaded into whose network, and what came of it
network       a direct load
together      a load of all ranks
restore       the newest complete checkpoint into networks
transfer/     Parameters of networks into those of others
peers         what some ranks lost, from the others, and what all lost, from a checkpoint
parameters    Parameters outside any network; `slices` joined, and layouts as messages
callback      records made at a save
names         MindSpore's functions under all their names
mindformers/  MindFormers
"""
