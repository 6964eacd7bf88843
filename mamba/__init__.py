"""Vision Mamba classifiers: the models, the selective scan, and everything that one training process needs.

    model = mamba.mamba_small(num_classes=10, img_size=32)
    print(mamba.load("runs/v2/first").predict("cat.jpg"))
    model, description = mamba.load_model("runs/v2/first")
    y = mamba.selective_scan(u, delta, A, B, C, D)

The names in `__all__` are what other code may rely on (with those of `pruning`); they change only with a note in
docs/LOG.md. Each is imported when it is first used, so `import mamba` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba.config.presets import get_preset as get_preset
    from mamba.config.schema import RunConfig as RunConfig
    from mamba.data.registry import load_data as load_data
    from mamba.errors import ForgeError as ForgeError
    from mamba.models.model import Architecture as Architecture
    from mamba.models.model import MambaModel as MambaModel
    from mamba.models.model import mamba_base as mamba_base
    from mamba.models.model import mamba_small as mamba_small
    from mamba.models.model import mamba_tiny as mamba_tiny
    from mamba.models.vim import vim_base as vim_base
    from mamba.models.vim import vim_small as vim_small
    from mamba.models.vim import vim_tiny as vim_tiny
    from mamba.ops.scan import bidirectional_scan as bidirectional_scan
    from mamba.ops.scan import selective_scan as selective_scan
    from mamba.predict.predictor import load as load
    from mamba.runs.checkpoint import load_model as load_model
    from mamba.runs.published import load_published as load_published

_HOMES = {
    "mamba.config.presets": ("get_preset",),
    "mamba.config.schema": ("RunConfig",),
    "mamba.data.registry": ("load_data",),
    "mamba.errors": ("ForgeError",),
    "mamba.models.model": ("Architecture", "MambaModel", "mamba_base", "mamba_small", "mamba_tiny"),
    "mamba.models.vim": ("vim_base", "vim_small", "vim_tiny"),
    "mamba.ops.scan": ("bidirectional_scan", "selective_scan"),
    "mamba.predict.predictor": ("load",),
    "mamba.runs.checkpoint": ("load_model",),
    "mamba.runs.published": ("load_published",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Architecture",
    "ForgeError",
    "MambaModel",
    "RunConfig",
    "bidirectional_scan",
    "get_preset",
    "load",
    "load_data",
    "load_model",
    "load_published",
    "mamba_base",
    "mamba_small",
    "mamba_tiny",
    "selective_scan",
    "vim_base",
    "vim_small",
    "vim_tiny",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mamba' has no attribute '{name}'; public: {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
