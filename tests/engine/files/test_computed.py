"""Jobs whose rules compute: what they write, what verify says of it, what they read, and in how much memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.engine.files.execution import execute
from ms_ckpt_ext.engine.files.reshard import recut_job
from ms_ckpt_ext.engine.load.slabs import HostSink
from ms_ckpt_ext.engine.source.catalog import Catalog, open_catalog
from ms_ckpt_ext.rules import Crop, Dequantize, Experts, Pad, Rule, Scale, Stack, Transpose, invert
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.transport.base import Bytes
from tests.core.planning.test_weight_rules import Ruled, strategy
from tests.support.checkpoints import read_file, read_merged
from tests.support.peak import run
from tests.support.quantised import Tensor, dequantised, random_items, save

ALL = Dequantize(["{*}.weight", "{*}.weight_scale_inv"], "{*}.weight")
EXPERTS = Experts(["e.{n}.gate.weight", "e.{n}.up.weight"], "w1", merge=False)


def deepseek(root: Path, rows: int = 200, columns: int = 300, experts: int = 2) -> dict[str, np.ndarray]:
    """Experts in blocks of 128 x 128, a norm and an embedding; what is made of them as BF16."""
    rng = np.random.default_rng(5)
    held: dict[str, Tensor] = {}
    made: dict[str, np.ndarray] = {}
    for name in [f"e.{n}.{kind}.weight" for n in range(experts) for kind in ("gate", "up")]:
        held[name] = Tensor("F8_E4M3", random_items(rng, "F8_E4M3", (rows, columns)))
        held[f"{name}_scale_inv"] = Tensor("F32", random_items(rng, "F32", (-(-rows // 128), -(-columns // 128))))
        scales = held[f"{name}_scale_inv"]
        made[name] = dequantised(held[name], "F8_E4M3", scales, "F32", (128, 128), "BF16")
    for name in ("norm.weight", "embed.weight"):
        made[name] = random_items(rng, "BF16", (250, 64))
        held[name] = Tensor("BF16", made[name])
    save(held, root / "model.safetensors")
    return made


def stacked(made: dict[str, np.ndarray]) -> np.ndarray:
    each = [np.concatenate([made[f"e.{n}.{kind}.weight"] for kind in ("gate", "up")]) for n in range(2)]
    return np.stack(each).transpose(0, 2, 1)


def test_a_merge_dequantises_and_verify_compares_with_the_rule_applied(tmp_path: Path) -> None:
    made = deepseek(tmp_path / "in")
    ms_ckpt_ext.merge(tmp_path / "in", tmp_path / "out", rules=[ALL], naming="huggingface")
    found, _ = read_merged(tmp_path / "out")
    assert {name: (t.dtype, t.data) for name, t in found.items()} == {n: ("BF16", a.tobytes()) for n, a in made.items()}
    assert ms_ckpt_ext.verify(tmp_path / "in", tmp_path / "out", rules=[ALL]).ok
    told = ms_ckpt_ext.verify(tmp_path / "in", tmp_path / "out")
    assert not told.ok and {m.a.split("[")[0] for m in told.mismatches} == {"F8_E4M3"}
    path = next((tmp_path / "out").glob("model-*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    told = ms_ckpt_ext.verify(tmp_path / "in", tmp_path / "out", rules=[ALL])
    assert [d.count for d in told.differences] == [1]


def test_ranks_files_hold_what_they_compute(tmp_path: Path) -> None:
    """Experts stacked of dequantised matrices, cut inside blocks; padded vocabulary; the way back crops it."""
    made = deepseek(tmp_path / "in")
    rules: list[Rule] = [ALL, EXPERTS, Pad("embed.weight", "embed", 256, source_size=250)]
    target = strategy({"w1": Layout((2, 2), ((), (1,), (0,))), "embed": Layout((4,), ((0,), ()))})
    ms_ckpt_ext.reshard(tmp_path / "in", tmp_path / "out", to_strategy=_file(target, tmp_path), rules=rules)
    whole = {"w1": stacked(made), "embed": np.pad(made["embed.weight"], ((0, 6), (0, 0)))}
    for rank in range(4):
        (file,) = (tmp_path / f"out/rank_{rank}").glob("*.safetensors")
        held = read_file(file)
        for name, array in whole.items():
            layout = target.layout(name, rank)
            assert layout is not None
            box = layout.region(rank, array.shape)
            assert (held[name].dtype, held[name].data) == ("BF16", array[box.slices].tobytes())
    ms_ckpt_ext.merge(tmp_path / "out", tmp_path / "back", strategy=_file(target, tmp_path), rules=invert(rules[2:]))
    found, _ = read_merged(tmp_path / "back")
    assert found["embed.weight"].data == made["embed.weight"].tobytes()


def _file(target: object, root: Path) -> Path:
    from ms_ckpt_ext.formats.strategies.file import save_strategy

    save_strategy(target, root / "strategy.ckpt")  # type: ignore[arg-type]
    return root / "strategy.ckpt"


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
def test_a_rank_reads_its_share_and_scales(mode: str, tmp_path: Path) -> None:
    """At most 1.05 times its quantised bytes, plus the scales of the blocks that it touches."""
    deepseek(tmp_path, rows=256, columns=8192)
    for name, layout in {
        "rows": Layout((4,), ((), (), (0,))),
        "columns": Layout((4,), ((), (0,), ())),
        "experts": Layout((2, 2), ((1,), (), (0,))),
    }.items():
        load = Ruled(tmp_path, None, strategy({"w1": layout}), mode=mode)
        load.rules = [ALL, EXPERTS]
        scales, elements = 4 * 2 * 64 * 4, 4 * 256 * 8192
        for held in load.run():
            assert held.report.reads.nbytes <= 1.05 * elements / 4 + scales, name


def test_a_job_that_computes_takes_as_much_memory_as_others(tmp_path: Path) -> None:
    """32 MiB become 64 MiB of BF16 in tiles of 1 MiB, on two threads."""
    rng = np.random.default_rng(1)
    rows = 4096
    held = {
        "w.weight": Tensor("F8_E4M3", rng.integers(0, 120, (rows, 8192), dtype=np.uint8)),
        "w.weight_scale_inv": Tensor("F32", np.ones((rows // 128, 64), "<f4")),
    }
    save(held, tmp_path / "in/model.safetensors")
    imports = (
        "import numpy\nfrom ms_ckpt_ext.core.computing import arithmetic\n"
        "from ms_ckpt_ext.core.planning.io_units import Limits\n"
        "from ms_ckpt_ext.engine.files.execution import execute\n"
        "from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job\n"
        "from ms_ckpt_ext.engine.source.catalog import open_catalog\nfrom ms_ckpt_ext.rules import Dequantize"
    )
    code = (
        "rules = [Dequantize(['{*}.weight', '{*}.weight_scale_inv'], '{*}.weight')]\n"
        "catalog = open_catalog(arguments[0], None).ruled(rules)\n"
        "execute(merge_job(catalog, arguments[1], MergeOptions()), arguments[1], 2, Limits(tile=1 << 20))"
    )
    assert run(imports, code, tmp_path / "in", tmp_path / "out") < 24 << 20
    found, _ = read_merged(tmp_path / "out")
    assert len(found["w.weight"].data) == 2 * rows * 8192


def test_another_factor_makes_another_result(tmp_path: Path) -> None:
    """All that decides the result is in a job's fingerprint, so no rerun mistakes an older result for its own."""
    save({"a": Tensor("F32", np.ones(8, "<f4"))}, tmp_path / "in/m.safetensors")
    for factor in (2.0, 4.0):
        ms_ckpt_ext.merge(tmp_path / "in", tmp_path / "out", rules=[Scale("a", "a", factor)])
        found, _ = read_merged(tmp_path / "out")
        assert found["a"].data == np.full(8, factor, "<f4").tobytes()


def test_there_and_back(tmp_path: Path) -> None:
    held = {"q": Tensor("BF16", random_items(np.random.default_rng(2), "BF16", (6, 4)) & 0x7F7F)}
    save(held, tmp_path / "in/m.safetensors")
    rules: Sequence[Rule] = [Scale("q", "q", 0.5), Crop("q", "c", 6, source_size=6), Scale("c", "d", 4.0)]
    ms_ckpt_ext.merge(tmp_path / "in", tmp_path / "out", rules=rules[:1])
    ms_ckpt_ext.merge(tmp_path / "out", tmp_path / "back", rules=invert(rules[:1]))
    found, _ = read_merged(tmp_path / "back")
    big = np.abs((held["q"].items.astype(np.uint32) << 16).view(np.float32)) > 2.0**-120
    got = np.frombuffer(found["q"].data, "<u2").reshape(6, 4)
    assert np.array_equal(got[big], held["q"].items[big])


def test_a_transposed_weight_of_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: blocks (experts, rows, groups, 16) become (experts, groups * 32, rows)."""
    rng = np.random.default_rng(3)
    blocks = Tensor("U8", random_items(rng, "U8", (3, 10, 4, 16)))
    scales = Tensor("U8", random_items(rng, "U8", (3, 10, 4)))
    save({"w_blocks": blocks, "w_scales": scales}, tmp_path / "in/m.safetensors")
    rules = [Dequantize(["{*}_blocks", "{*}_scales"], "{*}", block=32), Transpose("w", "w", (0, 2, 1))]
    expected = dequantised(blocks, "FP4", scales, "F8_E8M0", (32,), "BF16").transpose(0, 2, 1)
    target = strategy({"w": Layout((2, 2), ((), (1,), (0,)))})
    catalog = open_catalog(str(tmp_path / "in"), None).ruled(rules)
    execute(
        recut_job(catalog, target, range(4), lambda rank: f"r{rank}.safetensors"),
        str(tmp_path / "out"),
        2,
        Limits(tile=256),
    )
    for rank in range(4):
        layout = target.layout("w", rank)
        assert layout is not None
        box = layout.region(rank, expected.shape)
        assert read_file(tmp_path / f"out/r{rank}.safetensors")["w"].data == expected[box.slices].tobytes()
    assert json.loads((tmp_path / "out/ms_ckpt_ext.digests.json").read_text())


@pytest.mark.parametrize("first", ["weights", "scales"])
def test_what_waits_for_its_scales_is_bounded(first: str, tmp_path: Path) -> None:
    """Wherever the scales lie in the file, they are read before the elements: of 2 MiB a round's worth is held."""
    rng = np.random.default_rng(4)
    elements = {f"e.{n}.w": Tensor("F8_E4M3", rng.integers(0, 120, (512, 1024), dtype=np.uint8)) for n in range(4)}
    scales = {f"e.{n}.s": Tensor("F32", np.ones((4, 8), "<f4")) for n in range(4)}
    save({**elements, **scales} if first == "weights" else {**scales, **elements}, tmp_path / "m.safetensors")
    bucket, held = 128 << 10, []

    class Watched(Ruled):
        pool: ReaderPool

        def readers(self, rank: int, catalog: Catalog) -> ReaderPool:
            self.pool = catalog.readers()
            return self.pool

        def sink(self, rank: int, name: str, sink: HostSink) -> HostSink:
            placed, place = [0], sink.place

            def watched(source: Bytes, *arguments: Any) -> None:
                held.append(self.pool.count.nbytes - placed[0])
                placed[0] += source.size // 2
                place(source, *arguments)

            sink.place = watched  # type: ignore[method-assign]
            return sink

    load = Watched(tmp_path, None, strategy({"t": Layout((1,), ((), (), ()))}), bucket_bytes=bucket)
    load.rules = [Dequantize(["{*}.w", "{*}.s"], "{*}.w"), Stack("e.{n}.w", "t")]
    loaded = load.run()
    assert len(loaded[0].contents["t"]) == 4 << 20 and loaded[0].report.rounds > 16
    assert max(held) <= 4 * bucket
