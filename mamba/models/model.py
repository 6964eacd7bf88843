"""The Mamba image classifier, its named sizes, and the plain description from which a model is rebuilt."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mamba.config.resolve import check_class_token
from mamba.config.schema import ModelConfig, SizeName
from mamba.errors import ConfigError
from mamba.models.block import NORMS, MambaBlock, drop
from mamba.models.embed import STEMS, class_token_places, inner_channels, rotary_tables, sequence_order, transposition
from mamba.models.heads import HEADS
from mamba.models.ssm import DIRECTIONS, MIXERS, BlockShape

MODEL_NAMES = {"mamba": ("blocks", "norm"), "vim": ("layers", "norm_f")}
"""What a model's blocks and its final norm are called: our names, and those of Vision Mamba's published weights."""


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build a model of the same shape; one `BlockShape` a block, equal or not.

    The choices are those of `ModelConfig`.
    """

    img_size: int
    patch_size: int
    in_chans: int
    num_classes: int
    d_model: int
    drop_path: float
    blocks: tuple[BlockShape, ...]
    stride: int | None = None
    """None: patch_size."""
    stem: str = "patch"
    class_token: str = "none"
    pos_embed: str = "learned"
    scan_order: str = "raster"
    norm: str = "layer"
    """A key of mamba.models.block.NORMS: layer or rms."""
    stem_channels: tuple[int, ...] | None = None
    """Inner widths of a stem of convolutions; None: the usual ones."""
    head: str = "auto"
    """A key of mamba.models.heads.HEADS."""
    layer_shuffle: float = 0.0
    dropout: float = 0.0
    rope_grid: int | None = None
    """Patches along a side that rotary positions count to; None: grid."""
    names: str = "mamba"
    """A key of MODEL_NAMES: what parameters are called; it changes nothing that is computed."""

    def __post_init__(self) -> None:
        if self.stem_channels is None:  # before there was a choice a conv stem had three convolutions
            object.__setattr__(self, "stem_channels", inner_channels(self.stem, None))

    @property
    def stem_arguments(self) -> tuple[int, int, int, int, tuple[int, ...]]:
        """What an entry of STEMS is made from."""
        assert self.stem_channels is not None
        return (self.patch_size, self.in_chans, self.d_model, self.stride or self.patch_size, self.stem_channels)

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return (self.img_size - self.patch_size) // (self.stride or self.patch_size) + 1

    @property
    def class_places(self) -> dict[str, int]:
        """Class tokens' parameter names and places in the sequence."""
        return class_token_places(self.class_token, self.grid**2)

    @property
    def num_tokens(self) -> int:
        """Patches and class tokens."""
        return self.grid**2 + len(self.class_places)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Architecture:
        """The inverse of `to_dict`; raises TypeError or KeyError where keys are missing or unknown."""
        channels = tree.get("stem_channels")
        return cls(
            **{
                **tree,
                "blocks": tuple(BlockShape(**b) for b in tree["blocks"]),
                "stem_channels": None if channels is None else tuple(channels),
            }
        )

    @classmethod
    def from_config(cls, config: ModelConfig, num_classes: int, img_size: int) -> Architecture:
        """What is None in the config comes from its named size, or from the image size.

        Raises:
            ConfigError: a class token at the start that no scan goes back to, so that it sees no image.
        """
        config = config.filled(img_size)
        d_model, vim = config.d_model, config.is_vim
        assert d_model and config.depth and config.patch_size and config.mixer and config.class_token
        assert config.mlp_ratio is not None
        shape = BlockShape(
            d_inner=int(config.expand * d_model),
            d_state=config.d_state,
            d_conv=config.d_conv,
            mlp_hidden=int(config.mlp_ratio * d_model),
            dt_rank=math.ceil(d_model / 16) if vim else None,
            mixer=config.mixer,
            learned_dt_bias=vim,
        )
        directions = MIXERS[config.mixer].directions
        directions = tuple(directions[i % len(directions)] for i in range(config.depth))
        check_class_token(config)
        return cls(
            img_size=img_size,
            patch_size=config.patch_size,
            in_chans=3,
            num_classes=num_classes,
            d_model=d_model,
            drop_path=config.drop_path,
            layer_shuffle=config.layer_shuffle,
            dropout=config.dropout,
            rope_grid=config.rope_grid,
            blocks=tuple(replace(shape, direction=direction) for direction in directions),
            stride=config.stride,
            stem=config.stem,
            stem_channels=inner_channels(config.stem, config.stem_layers),
            head=config.head,
            class_token=config.class_token,
            pos_embed=config.pos_embed,
            scan_order=config.scan_order,
            norm="rms" if vim else "layer",
            names="vim" if vim else "mamba",
        )

    def macs(self) -> int:
        """Multiply-accumulates of one image's forward pass, the scans counted.

        A scan step costs, per channel and state: the decay's product, the state's update, the read-out (3), and per
        channel the drive and the skip (2); exponentials and other element-wise work are not counted.
        """
        tokens, d = self.num_tokens, self.d_model
        total = STEMS[self.stem].macs(self.img_size, *self.stem_arguments) + d * self.num_classes
        total += HEADS[self.head].macs(tokens, d)
        for b in self.blocks:
            out = d if b.out_channels is None else b.out_channels
            delta = b.d_inner**2 if b.dt_rank is None else 2 * b.d_inner * b.dt_rank
            step = delta + (1 if b.shared_bc else 2) * b.d_inner * b.d_state
            step += b.d_inner * b.d_conv + b.separable_conv * b.d_inner**2
            step += b.d_inner * (3 * b.d_state + 2)
            steps = sum(math.ceil(tokens / path.scale) for path in MIXERS[b.mixer].paths)
            total += steps * step + tokens * ((2 * d + out) * b.ways * b.d_inner + 2 * d * b.mlp_hidden)
        return total


class MambaModel(nn.Module):
    """Tokens, their positions, Mamba blocks, norm, pooling over tokens, linear head.

    (batch, in_chans, img_size, img_size) -> (batch, num_classes).

    `stack` holds the blocks, whatever they are called. Learned positions belong to places in the image and are stored
    in raster order; `scan_order` is applied after them.

    Initialisation: torch's defaults for the mixer's projections, as in the Mamba code; the projections that write
    into the residual stream (out_proj, fc2) scaled by 1 / sqrt(their number), as there and in GPT-2; positions, class
    tokens and head normal with 0.02, MLP biases zero, as in ViT. The scan's own parameters: see `SelectiveSSM`.

    Raises:
        ValueError: an image size that patches do not fill, a drop path outside of [0, 1).
    """

    cos: Tensor
    sin: Tensor
    order: Tensor | None
    transposition: Tensor | None

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        stride = a.stride or a.patch_size
        if stride == a.patch_size and a.img_size % a.patch_size:
            raise ValueError(f"img_size {a.img_size} is not divisible by patch_size {a.patch_size}")
        if a.patch_size > a.img_size or (a.img_size - a.patch_size) % stride:
            raise ValueError(f"patches of {a.patch_size} every {stride} pixels do not fill img_size {a.img_size}")
        if not 0 <= a.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {a.drop_path}")
        if not 0 <= a.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {a.dropout}")
        if not 0 <= a.layer_shuffle <= 1:
            raise ValueError(f"layer_shuffle must be in [0, 1], got {a.layer_shuffle}")
        self.base = replace(a, blocks=())
        depth = len(a.blocks)
        rising = [i / max(1, depth - 1) for i in range(depth)]
        self.stack_name, self.norm_name = MODEL_NAMES[a.names]
        self.class_places = a.class_places
        self.patch_embed = _stem(a)
        for name in self.class_places:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, a.d_model)))
        learned = a.pos_embed in ("learned", "both")
        self.pos_embed = nn.Parameter(torch.zeros(1, a.num_tokens, a.d_model)) if learned else None
        blocks = (
            MambaBlock(a.d_model, shape, a.drop_path * rise, a.norm, a.names, a.layer_shuffle * rise, a.dropout)
            for shape, rise in zip(a.blocks, rising, strict=True)
        )
        self.add_module(self.stack_name, nn.ModuleList(blocks))
        self.add_module(self.norm_name, NORMS[a.norm](a.d_model))
        self.pool = HEADS[a.head](a.d_model, self.class_places.values())
        self.head = nn.Linear(a.d_model, a.num_classes)

        order = sequence_order(a.scan_order, a.grid, self.class_places.values())
        self.register_buffer("order", None if a.scan_order == "raster" else torch.tensor(order), persistent=False)
        across = any(DIRECTIONS[shape.direction].transposed for shape in a.blocks)
        places = transposition(order, a.grid, self.class_places.values())
        self.register_buffer("transposition", torch.tensor(places) if across else None, persistent=False)
        self.rotary = a.pos_embed in ("rope", "both")
        if self.rotary:
            cos, sin = rotary_tables(a.grid, a.d_model, self.class_places.values(), a.rope_grid)
            self.register_buffer("cos", cos[order], persistent=False)
            self.register_buffer("sin", sin[order], persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for name in self.class_places:
            nn.init.trunc_normal_(getattr(self, name), std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        blocks = self.stack
        writers = sum(1 if block.mlp is None else 2 for block in blocks)
        scale = 1.0 / math.sqrt(max(1, writers))
        with torch.no_grad():
            for block in blocks:
                block.token_mixer.out_proj.weight.mul_(scale)
                if block.mlp is not None:
                    block.mlp.fc2.weight.mul_(scale)
                    nn.init.zeros_(block.mlp.fc1.bias)
                    nn.init.zeros_(block.mlp.fc2.bias)

    @property
    def stack(self) -> Sequence[MambaBlock]:
        """The blocks, in order; a module list, called `stack_name` in the state dict."""
        return getattr(self, self.stack_name)

    @property
    def architecture(self) -> Architecture:
        """As the model is now: the blocks' widths are read from their tensors."""
        return replace(self.base, blocks=tuple(block.shape for block in self.stack))

    def forward(self, images: Tensor) -> Tensor:
        side, channels = self.base.img_size, self.base.in_chans
        if images.ndim != 4 or images.shape[1:] != (channels, side, side):  # as many tokens would have wrong places
            shape = tuple(images.shape)
            raise ValueError(
                f"images of shape {shape} for a model of {side}x{side} pixels; "
                f"valid: (batch, {channels}, {side}, {side})"
            )
        x = self._tokens(images)
        rotary = (self.cos, self.sin) if self.rotary else None
        for block in self.stack:
            x = block(x, rotary, self.transposition)
        pooled = self.pool(x, getattr(self, self.norm_name))
        if pooled.ndim != 2 or pooled.shape[1] != self.base.d_model:  # as one that was added may give
            raise ConfigError(
                f"model.head '{self.base.head}' makes {tuple(pooled.shape)} of tokens {tuple(x.shape)}; valid: "
                f"(batch, {self.base.d_model})"
            )
        return self.head(pooled)

    def _tokens(self, images: Tensor) -> Tensor:
        """Images to (batch, tokens, d_model): class tokens in place, positions added, in the order of the scan."""
        x = self.patch_embed(images)
        if x.ndim != 3 or x.shape[1] != self.base.grid**2 or x.shape[2] != self.base.d_model:
            raise ConfigError(
                f"model.stem '{self.base.stem}' makes {tuple(x.shape)} of images {tuple(images.shape)}; valid: "
                f"(batch, {self.base.grid**2}, {self.base.d_model})"
            )
        for name, place in self.class_places.items():
            token = getattr(self, name).expand(x.shape[0], -1, -1)
            x = torch.cat((x[:, :place], token.to(x.dtype), x[:, place:]), dim=1)
        # without positions too the residual stream leaves the stem in full precision
        x = x + self.pos_embed if self.pos_embed is not None else x.to(self.head.weight.dtype)
        x = drop(x, self.base.dropout, self.training)
        return x if self.order is None else x[:, self.order]


def _stem(a: Architecture) -> nn.Module:
    stem = STEMS[a.stem](*a.stem_arguments)
    return nn.Sequential(OrderedDict(proj=stem)) if a.names == "vim" and a.stem == "patch" else stem


def named_model(name: SizeName, num_classes: int, img_size: int, **overrides: Any) -> MambaModel:
    """A model of a named size. Overrides: any field of `ModelConfig`."""
    return MambaModel(Architecture.from_config(ModelConfig(name=name, **overrides), num_classes, img_size))


def mamba_tiny(num_classes: int = 10, img_size: int = 32, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 128, 16 blocks; 4,974,218 parameters at the defaults. Overrides: any field of `ModelConfig`."""
    return named_model("mamba_tiny", num_classes, img_size, drop_path=drop_path, **overrides)


def mamba_small(num_classes: int = 10, img_size: int = 32, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 192, 24 blocks; 16,488,394 parameters at the defaults. Overrides: any field of `ModelConfig`."""
    return named_model("mamba_small", num_classes, img_size, drop_path=drop_path, **overrides)


def mamba_base(num_classes: int = 10, img_size: int = 32, drop_path: float = 0.0, **overrides: Any) -> MambaModel:
    """d_model 384, 32 blocks; 86,420,362 parameters at the defaults. Overrides: any field of `ModelConfig`."""
    return named_model("mamba_base", num_classes, img_size, drop_path=drop_path, **overrides)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def parameters_of(config: ModelConfig, num_classes: int, img_size: int) -> int:
    """Parameter count of a model without making its weights."""
    with torch.device("meta"):
        return count_parameters(MambaModel(Architecture.from_config(config, num_classes, img_size)))
