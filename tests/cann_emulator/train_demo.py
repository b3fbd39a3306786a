"""Trains a tiny MLP for a few steps, for real, and saves what a training job saves.

On emulated NPUs, semi_auto_parallel in graph mode (any number of ranks = dp * tp * pp):
    source env.sh
    msrun --worker_num=4 --local_worker_num=4 --join=True --master_port=9517 --cluster_time_out=60 \
          --log_dir=log train_demo.py 2,2 OUT --opt-shard --steps 6 --save-at 3,6
    ... train_demo.py 2,2 OUT2 --opt-shard --steps 6 --start 3 --resume OUT/step3
In one process on the CPU, not parallel, to compare with:
    python train_demo.py cpu OUTCPU --steps 6 --save-at 3,6

With ms_ckpt_ext on PYTHONPATH it records what it saves (--record), resumes from any layout (--by resume, or dropin:
MindSpore's own function names after ms_ckpt_ext.install()) and serves the weights alone (--serve):
    ... train_demo.py 1,2 OUT3 --steps 6 --resume OUT --by resume
    ... train_demo.py 1,2 OUT4 --serve --resume OUT

Writes OUT/step<n>/rank_<r>/net.ckpt and net.safetensors, OUT/strategy/strategy_<r>.ckpt (MindSpore's strategy
file, one for every rank) and prints "LOSS <rank> <step> <loss as hex float> <decimal>".
"""

import argparse
import glob
import os

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, context, nn, ops

# What mindspore.Model puts around a network with micro batches.
from mindspore.nn.wrap.cell_wrapper import GradAccumulationCell, _TrainGradAccuStepCell

ap = argparse.ArgumentParser()
ap.add_argument("layout", help='dp,tp or dp,tp,pp (pp 1 or 2) or "cpu"')
ap.add_argument("out")
ap.add_argument("--opt-shard", action="store_true", help="shard optimizer states and parameters over dp")
ap.add_argument("--threshold", type=int, default=0, help="KiB; smaller parameters are not sharded (with --opt-shard)")
ap.add_argument("--shard-size", type=int, default=-1, help="shard over this many ranks at most (with --opt-shard)")
ap.add_argument("--micro", type=int, default=1, help="micro batches a step; at least 2 with pp")
ap.add_argument("--accum-shard", action="store_true", help="gradient_accumulation_shard (with --opt-shard, --micro)")
ap.add_argument("--optimizer", default="adamw", choices=["adamw", "adam", "momentum"])
ap.add_argument("--steps", type=int, default=3, help="number of the last step")
ap.add_argument("--start", type=int, default=0, help="number of steps done before (with --resume)")
ap.add_argument("--save-at", default="", help="step numbers, default: the last")
ap.add_argument("--resume", default="", help="directory with rank_<r>/net.ckpt")
ap.add_argument("--format", default="ckpt", choices=["ckpt", "safetensors"], help="which of the two to resume from")
ap.add_argument("--jit-level", default="O0", choices=["O0", "O1", "O2"], help="how MindSpore compiles the graph")
ap.add_argument("--record", action="store_true", help="leave the notes of ms_ckpt_ext.CheckpointRecorder")
ap.add_argument("--by", default="stock", choices=["stock", "resume", "dropin"], help="what to resume with")
ap.add_argument("--mode", default="auto", help="with --by resume, dropin and --serve: direct, cooperative or auto")
ap.add_argument("--serve", action="store_true", help="load the weights alone and print the output for one batch")
args = ap.parse_args()
save_at = [int(s) for s in args.save_at.split(",") if s] or [args.steps]

ms.set_context(mode=ms.GRAPH_MODE)
if args.layout == "cpu":
    ms.set_device("CPU")
    rank, dp, tp, pp = 0, 1, 1, 1
    args.micro = 1
else:
    ms.set_device("Ascend")
    ms.set_context(jit_config={"jit_level": args.jit_level})
    if args.jit_level == "O1":  # without the fused operators, which are machine code of an NPU
        ms.set_context(graph_kernel_flags="--opt_level=0")
    from mindspore.communication import get_group_size, get_rank, init

    init()
    rank = get_rank()
    dp, tp, pp = (int(s) for s in (args.layout + ",1").split(",")[:3])
    assert dp * tp * pp == get_group_size() and pp in (1, 2) and (pp == 1 or args.micro > 1)
    os.makedirs(f"{args.out}/strategy", exist_ok=True)
    context.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        device_num=dp * tp * pp,
        global_rank=rank,
        pipeline_stages=pp,
        dataset_strategy="full_batch",
        enable_parallel_optimizer=args.opt_shard,
        strategy_ckpt_config={"save_file": f"{args.out}/strategy/strategy_{rank}.ckpt"},
        parallel_optimizer_config={
            "parallel_optimizer_threshold": args.threshold,
            "optimizer_weight_shard_size": args.shard_size,
            "gradient_accumulation_shard": args.accum_shard,
        },
    )

rng = np.random.default_rng(1)


def weight(name, *shape):
    return Parameter(Tensor((rng.standard_normal(shape) * 0.3).astype(np.float32)), name=name)


class Up(nn.Cell):
    """Column-parallel."""

    def __init__(self):
        super().__init__()
        self.w, self.b = weight("w", 32, 16), weight("b", 32)
        self.mm = ops.MatMul(transpose_b=True).shard(((dp, 1), (tp, 1)))
        self.add = ops.BiasAdd().shard(((dp, tp), (tp,)))
        self.relu = ops.ReLU().shard(((dp, tp),))

    def construct(self, x):
        return self.relu(self.add(self.mm(x, self.w), self.b))


class Down(nn.Cell):
    """Row-parallel."""

    def __init__(self):
        super().__init__()
        self.w, self.b = weight("w", 16, 32), weight("b", 16)
        self.mm = ops.MatMul(transpose_b=True).shard(((dp, tp), (1, tp)))
        self.add = ops.BiasAdd().shard(((dp, 1), (1,)))

    def construct(self, x):
        return self.add(self.mm(x, self.w), self.b)


class Mlp(nn.Cell):
    def __init__(self):
        super().__init__()
        self.up, self.down = Up(), Down()

    def construct(self, x):
        return self.down(self.up(x))


class Loss(nn.Cell):
    """Mean squared error."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.sub = ops.Sub().shard(((dp, 1), (dp, 1)))
        self.square = ops.Square().shard(((dp, 1),))
        self.mean = ops.ReduceMean().shard(((dp, 1),))

    def construct(self, x, y):
        return self.mean(self.square(self.sub(self.net(x), y)), (0, 1))


if args.accum_shard:
    Loss.__init__ = ms.lazy_inline(Loss.__init__)  # MindSpore insists on it
net = Loss(Mlp())
if pp == 2:
    net.net.up.pipeline_stage, net.net.down.pipeline_stage = 0, 1
if args.micro > 1:
    net = (nn.PipelineCell if pp > 1 else GradAccumulationCell)(net, args.micro)
params = net.trainable_params()
if args.optimizer == "adamw":
    opt = nn.AdamWeightDecay(params, learning_rate=0.01, weight_decay=0.02)
elif args.optimizer == "adam":
    opt = nn.Adam(params, learning_rate=0.01)
else:
    opt = nn.Momentum(params, learning_rate=0.05, momentum=0.9)
train = (_TrainGradAccuStepCell if args.micro > 1 else nn.TrainOneStepCell)(net, opt)
train.set_train()


def batch(step):
    g = np.random.default_rng(1000 + step)
    return (
        Tensor(g.standard_normal((16, 16)).astype(np.float32)),
        Tensor(g.standard_normal((16, 16)).astype(np.float32)),
    )


if args.serve:
    from ms_ckpt_ext import load_for_inference

    served = net = Mlp()
    served.set_train(False)
    served.compile(batch(0)[0])
    names = {p.name: f"net.{p.name}" for p in served.get_parameters()}
    told = load_for_inference(served, args.resume, format=args.format, mode=args.mode, name_map=names)
    print("SERVED", rank, told.checkpoint, told.step, told.mode, told.bytes_read, flush=True)
    print("OUTPUT", rank, served(batch(0)[0]).asnumpy().tobytes().hex(), flush=True)
    raise SystemExit
if args.resume and args.layout != "cpu":
    train.compile(*batch(0))  # parameters get their slice shapes here
if args.resume and args.by == "resume":
    from ms_ckpt_ext import resume

    told = resume(train, checkpoint_dir=args.resume, format=args.format, mode=args.mode)
    args.start = told.step
    print("RESUMED", rank, told.checkpoint, told.step, told.mode, "skipped:", list(told.skipped), flush=True)
elif args.resume and args.by == "dropin":
    import ms_ckpt_ext

    os.environ["MS_CKPT_EXT_MODE"] = args.mode
    ms_ckpt_ext.install()
    folders = sorted(glob.glob(f"{args.resume}/rank_*"), key=lambda folder: int(folder.rsplit("_", 1)[1]))
    source = {"checkpoint_filenames": [f"{folder}/net.ckpt" for folder in folders]}
    if args.format == "safetensors":
        source = {"format": "safetensors", "unified_safetensors_dir": args.resume}
    told = ms.load_distributed_checkpoint(
        train,
        train_strategy_filename=f"{args.resume}/../strategy",
        predict_strategy=train.parameter_layout_dict,
        **source,
    )
    print("RESUMED", rank, args.resume, "not loaded:", *told, flush=True)
elif args.resume:
    path = f"{args.resume}/rank_{rank}/net.{args.format}"
    loaded = ms.load_checkpoint(path, format=args.format)
    not_in_net, not_in_file = ms.load_param_into_net(train, loaded, strict_load=True)
    print("RESUMED", rank, path, len(loaded), "not loaded:", not_in_net, not_in_file, flush=True)

for step in range(args.start + 1, args.steps + 1):
    loss = float(train(*batch(step)).asnumpy())
    loss /= args.micro  # MindSpore adds up micro batches; with pp only the last stage has the loss
    print("LOSS", rank, step, loss.hex(), f"{loss:.9g}", flush=True)
    if step in save_at:
        to = f"{args.out}/step{step}/rank_{rank}"
        os.makedirs(to, exist_ok=True)
        ms.save_checkpoint(train, f"{to}/net.ckpt", integrated_save=False)
        ms.save_checkpoint(train, f"{to}/net.safetensors", integrated_save=False, format="safetensors")
        if args.record:
            from ms_ckpt_ext import CheckpointRecorder

            for kind in ("ckpt", "safetensors"):
                CheckpointRecorder().record(f"{to}/net.{kind}", train, step=step)
for p in train.get_parameters():
    print("PARAM", rank, p.name, p.dtype, p.shape, flush=True)
print("DONE", rank, flush=True)
