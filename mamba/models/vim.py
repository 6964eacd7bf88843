"""Vision Mamba (Vim, https://arxiv.org/abs/2401.09417) with the names and shapes of its published weights.

A Vim is a `MambaModel` of certain choices, and of other names: blocks without an MLP, RMSNorm (eps 1e-5) in front of
each mixer, which scans both ways on shared projections and averages (the authors' BiMamba v2, outputs divided by 2), a
low-rank time step of rank d_model / 16 with a learned bias, and a class token in the middle of the sequence, whose
normed features go to the head. The authors write a layer as "add, norm, mix" and return the sum and the mixer's output
apart; here it is "norm, mix, add", which is the same.

Deviations: with `pos_embed` rope or both, each mixer reads turned features (the authors turn the residual stream before
each layer, again and again), rows and columns count patches of the model's own grid (the authors stretch every grid to
14), and class tokens do not turn; no published weights use it. The patch embedding starts from torch's defaults.

Published weights are read by `mamba.runs.published.load_published`.
"""

from __future__ import annotations

from typing import Any

from mamba.models.model import MambaModel, named_model


def vim_tiny(num_classes: int = 1000, img_size: int = 224, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 192, 24 layers; 7,148,008 parameters at the defaults. Overrides: any field of `ModelConfig`; stride=8 is
    the authors' Vim-Ti+, img_size=32 has patches of 4 pixels."""
    return named_model("vim_tiny", num_classes, img_size, drop_path=drop_path, **overrides)


def vim_small(num_classes: int = 1000, img_size: int = 224, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 384, 24 layers; 25,796,584 parameters at the defaults. Overrides: as of `vim_tiny`."""
    return named_model("vim_small", num_classes, img_size, drop_path=drop_path, **overrides)


def vim_base(num_classes: int = 1000, img_size: int = 224, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 768, 24 layers; 97,598,440 parameters at the defaults. Overrides: as of `vim_tiny`."""
    return named_model("vim_base", num_classes, img_size, drop_path=drop_path, **overrides)
