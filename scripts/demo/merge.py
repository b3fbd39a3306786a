"""The other half of the demonstration: merge the 8-way checkpoint into whole parameters and compare every byte.

merge.py SOURCE SOURCE_STRATEGY OUTPUT TRUTH
"""

import sys
from pathlib import Path

from ms_ckpt_ext import unified_safetensors
from ms_ckpt_ext.formats.registry import read_index

source, strategy, output, truth = sys.argv[1:]
report = unified_safetensors(source, strategy, output)


def tensors(path):
    contents = Path(path).read_bytes()
    return {
        name: contents[entry.extents[0].offset :][: entry.nbytes] for name, entry in read_index(path).tensors.items()
    }


merged, whole = tensors(f"{output}/part0.safetensors"), tensors(truth)
if merged != whole:
    sys.exit(f"merge: these parameters differ: {[name for name in whole if merged.get(name) != whole[name]]}")
print(
    f"DEMO merge: {len(merged)} parameters whole again, {sum(map(len, merged.values())):,} bytes, all equal "
    f"({report.bytes_read:,} bytes read in {report.reads} reads)"
)
