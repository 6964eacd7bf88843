"""Data sets, their splits, and the loaders that feed one rank. Nothing of torch is imported before it is used."""

from typing import Any

__all__ = ["ImageData", "ImageSet", "load_data"]
_HOME = {"ImageData": "images", "ImageSet": "images", "load_data": "registry"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
