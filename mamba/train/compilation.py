"""torch.compile for a stack of blocks: one graph for all that are alike, and a cache that outlives the process."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from mamba.cache import cache_folder
from mamba.models.model import MambaModel

COMPILE_FROM_IMAGES = 500_000
"""Images of a run from which `optim.compile` auto compiles. On one H200 compiling took 13 to 22 s and won 0.03 to
0.04 ms an image (mamba_small, recorded, batch 1024 and 128; docs/BENCHMARKS.md)."""
MOST_STATIC_SHAPES = 2
"""Distinct block shapes that are compiled one by one; with more (a pruned model), one graph has its widths as
variables: slower by what docs/BENCHMARKS.md says, but compiled a few times and not once a block."""


def share_compile_cache() -> None:
    """Keep what is compiled in our own cache folder, where the next run finds it; a cache folder that the user chose by
    torch's or Triton's own variables stays."""
    root = cache_folder()
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        try:
            (root / name).mkdir(parents=True, exist_ok=True)
        except OSError:
            continue  # torch's own default: a folder for temporary files
        os.environ.setdefault(variable, str(root / name))


def should_compile(setting: bool | str, images: int, device: torch.device) -> bool:
    """What `optim.compile` means for a run that trains on so many images, epochs multiplied out."""
    if isinstance(setting, bool):
        return setting
    return device.type == "cuda" and images >= COMPILE_FROM_IMAGES


def compile_blocks(model: MambaModel, **options: Any) -> None:
    """Compile every block in place; names of parameters stay. `options` go to torch.compile (tests)."""
    share_compile_cache()
    blocks = model.stack
    torch._dynamo.config.optimize_ddp = False  # would split a block's graph; DDP's buckets go out between blocks
    drops, shuffles = any(b.drop_path.active for b in blocks), any(b.shuffle.active for b in blocks)
    # directions are a few graphs whatever the depth, and of fixed widths
    varied = len({replace(block.shape, direction="forward") for block in blocks}) > MOST_STATIC_SHAPES
    if varied:  # process-wide, and read when the first block runs
        torch._dynamo.config.force_parameter_static_shapes = False
        torch._dynamo.config.force_nn_module_property_static_shapes = False
        torch.fx.experimental._config.use_duck_shape = False  # equal widths are a coincidence
    for block in blocks:
        # the first block, whose rates are 0, shares the others' graph
        block.drop_path.active, block.shuffle.active = drops, shuffles
        block.compile(dynamic=varied, **options)
