"""Exchanging bytes between ranks. Importing this room does not import mindspore; `mccl`, `hccl` and `ascend` do.

base      the Transport protocol, and what every transport checks
agree     one answer on all ranks: same inputs? did anybody fail?
local     ranks are threads of this process, or this process alone
mccl      ranks of a MindSpore job on the CPU
hccl      ranks of a MindSpore job on Ascend
ascend    what MindSpore tells of NPUs: product, free memory, groups (used by hccl)
control   small messages between the processes of a job, and who of them is still alive (used by mccl and hccl)
gather    payloads that are too much for the control plane, over the backend
known_answer  what goes before the first round, to find a backend that delivers other bytes than were sent
gate      all ranks of a host, before any calls the backend for the first time
roll      who of all ranks has come, asked when the first meeting takes long
living    how many ranks of this host still live, also those that never came to a gate
hub/      where the ranks of a control plane, or of a gate, meet
rendezvous/  how ranks of several hosts find the hub, and prove that they belong to the job
select    which transport fits here
"""
