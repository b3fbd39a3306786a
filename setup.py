"""Packaging. Tools are configured in pyproject.toml; `scripts/` holds the commands."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"


def version() -> str:
    """Read, not imported: what the package needs is not installed yet."""
    text = (ROOT / "ms_ckpt_ext" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('ms_ckpt_ext/_version.py has no line of the form __version__ = "1.2.3"')
    return found.group(1)


REQUIRES = [
    "mindspore>=2.7",
    # MindSpore's wheels are built against numpy 1.x. With 2.x every operator fails with
    # "numpy.core.multiarray failed to import", although their metadata allows it.
    "numpy>=1.25,<2",
    "safetensors",
    "tqdm",
    "xxhash",
    "protobuf",  # strategy files
    "cryptography>=35",  # imported when a key is given; SM4 is there from 35 on
    # Completion scripts of `ms-ckpt` (pure Python, no dependencies of its own); fish from 1.13 on as tested.
    "shtab>=1.13",
]
PLOT = ["matplotlib"]
DEV = [
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    # A new minor version of these finds new faults in old code, so it is taken on purpose, not by chance.
    "ruff~=0.17.6",
    'mypy~=2.4.1; python_version >= "3.10"',
    'mypy; python_version < "3.10"',
    "pdoc>=14",  # the API reference: scripts/docs.sh
    "psutil",  # the processes that a test leaves behind
    "types-protobuf",
    "types-psutil",
    "types-tqdm",
]

setup(
    name="ms-ckpt-ext",
    version=version(),
    description="Checkpoint resharding for MindSpore: from any parallel layout to any other, offline or while loading",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: Chinese (Simplified)",
        "Natural Language :: English",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    keywords=["mindspore", "checkpoint", "resharding", "safetensors", "ascend", "distributed training", "mindformers"],
    python_requires=">=3.9",
    packages=find_packages(include=["ms_ckpt_ext", "ms_ckpt_ext.*"]),
    package_data={
        "ms_ckpt_ext": [
            "py.typed",
            "engine/load/hardware/*.json",
            "engine/huggingface/rules/*.json",
            "api/dry_run/*.html",
        ]
    },
    install_requires=REQUIRES,
    extras_require={"plot": PLOT, "dev": DEV},
    entry_points={"console_scripts": ["ms-ckpt = ms_ckpt_ext.cli.main:main"]},
    zip_safe=False,
)
