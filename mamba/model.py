"""The Mamba image classifier, its named sizes, and the plain description from which a model is rebuilt."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mamba.config import MODEL_SIZES, ModelConfig, SizeName, default_patch_size
from mamba.embed import PatchEmbed
from mamba.layers import BlockShape, MambaBlock


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a model of the same shape; one `BlockShape` a block, equal or not."""

    img_size: int
    patch_size: int
    in_chans: int
    num_classes: int
    d_model: int
    drop_path: float
    blocks: tuple[BlockShape, ...]

    @property
    def num_tokens(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Architecture:
        """The inverse of `to_dict`; raises TypeError or KeyError where keys are missing or unknown."""
        return cls(**{**tree, "blocks": tuple(BlockShape(**b) for b in tree["blocks"])})

    @classmethod
    def from_config(cls, config: ModelConfig, num_classes: int, img_size: int) -> Architecture:
        """What is None in the config comes from its named size, or from the image size."""
        width, depth = MODEL_SIZES[config.name]
        d_model = config.d_model or width
        shape = BlockShape(
            d_inner=int(config.expand * d_model),
            d_state=config.d_state,
            d_conv=config.d_conv,
            mlp_hidden=int(config.mlp_ratio * d_model),
        )
        return cls(
            img_size=img_size,
            patch_size=config.patch_size or default_patch_size(img_size),
            in_chans=3,
            num_classes=num_classes,
            d_model=d_model,
            drop_path=config.drop_path,
            blocks=(shape,) * (config.depth or depth),
        )

    def macs(self) -> int:
        """Multiply-accumulates of one image's forward pass, the scan counted.

        A scan step costs, per channel and state: the decay's product, the state's update, the read-out (3), and per
        channel the drive and the skip (2); exponentials and other element-wise work are not counted.
        """
        tokens, d = self.num_tokens, self.d_model
        total = tokens * d * self.in_chans * self.patch_size**2 + d * self.num_classes
        for b in self.blocks:
            out = d if b.out_channels is None else b.out_channels
            delta = b.d_inner**2 if b.dt_rank is None else 2 * b.d_inner * b.dt_rank
            mixer = (2 * d + out) * b.d_inner + delta + (1 if b.shared_bc else 2) * b.d_inner * b.d_state
            mixer += b.d_inner * b.d_conv + b.separable_conv * b.d_inner**2
            scan = b.d_inner * (3 * b.d_state + 2)
            total += tokens * (mixer + scan + 2 * d * b.mlp_hidden)
        return total


class MambaModel(nn.Module):
    """Patch tokens plus learned positions, Mamba blocks, norm, mean over tokens, linear head.

    (batch, in_chans, img_size, img_size) -> (batch, num_classes).

    Initialisation: torch's defaults for the mixer's projections, as in the Mamba code; the two projections that write
    into the residual stream (out_proj, fc2) scaled by 1 / sqrt(2 depth), as there and in GPT-2; positions and head
    normal with 0.02, MLP biases zero, as in ViT. The scan's own parameters: see `SelectiveSSM`.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        if a.img_size % a.patch_size:
            raise ValueError(f"img_size {a.img_size} is not divisible by patch_size {a.patch_size}")
        if not 0 <= a.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {a.drop_path}")
        self.base = replace(a, blocks=())
        depth = len(a.blocks)
        rates = [a.drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.patch_embed = PatchEmbed(a.patch_size, a.in_chans, a.d_model)
        self.pos_embed = nn.Parameter(torch.zeros(1, a.num_tokens, a.d_model))
        self.blocks = nn.ModuleList(
            MambaBlock(a.d_model, shape, rate) for shape, rate in zip(a.blocks, rates, strict=True)
        )
        self.norm = nn.LayerNorm(a.d_model)
        self.head = nn.Linear(a.d_model, a.num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        scale = 1.0 / math.sqrt(2 * max(1, len(self.blocks)))
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, MambaBlock)
                block.ssm.out_proj.weight.mul_(scale)
                block.mlp.fc2.weight.mul_(scale)
                nn.init.zeros_(block.mlp.fc1.bias)
                nn.init.zeros_(block.mlp.fc2.bias)

    @property
    def architecture(self) -> Architecture:
        """As the model is now: the blocks' widths are read from their tensors."""
        return replace(self.base, blocks=tuple(b.shape for b in self.blocks if isinstance(b, MambaBlock)))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def _named(name: SizeName, num_classes: int, img_size: int, **overrides: Any) -> MambaModel:
    return MambaModel(Architecture.from_config(ModelConfig(name=name, **overrides), num_classes, img_size))


def mamba_tiny(num_classes: int = 10, img_size: int = 32, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 128, 16 blocks; 4,974,218 parameters at the defaults. Overrides: any field of `ModelConfig`."""
    return _named("mamba_tiny", num_classes, img_size, drop_path=drop_path, **overrides)


def mamba_small(num_classes: int = 10, img_size: int = 32, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 192, 24 blocks; 16,488,394 parameters at the defaults. Overrides: any field of `ModelConfig`."""
    return _named("mamba_small", num_classes, img_size, drop_path=drop_path, **overrides)


def mamba_base(num_classes: int = 10, img_size: int = 32, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 384, 32 blocks; 86,420,362 parameters at the defaults. Overrides: any field of `ModelConfig`."""
    return _named("mamba_base", num_classes, img_size, drop_path=drop_path, **overrides)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def parameters_of(config: ModelConfig, num_classes: int, img_size: int) -> int:
    """Parameter count of a model without making its weights."""
    with torch.device("meta"):
        return count_parameters(MambaModel(Architecture.from_config(config, num_classes, img_size)))
