"""Exchanging bytes between ranks. Importing this room does not import mindspore; `mccl`, `hccl` and `ascend` do.

base      the Transport protocol, and what every transport checks
agree     one answer on all ranks: are the inputs the same? did any rank fail?
local     ranks are threads of this process, or this process alone
mccl      ranks of a MindSpore job on the CPU
hccl      ranks of a MindSpore job on Ascend
ascend    what MindSpore reports about NPUs: product, free memory, groups (used by hccl)
control   small messages between the processes of a job, and which of them are still alive (used by mccl and hccl)
gather    payloads that are too large for the control plane, over the backend
known_answer  a test before the first round, which finds a backend that delivers other bytes than were sent
gate      where all ranks of a host meet, before any of them calls the backend for the first time
roll      which of all ranks have come, asked when the first meeting takes long
living    how many ranks of this host are still alive, including those that never came to a gate
hub/      where the ranks of a control plane, or of a gate, meet
rendezvous/  how ranks of several hosts find the hub, and prove that they belong to the job
select    which transport fits here
"""
