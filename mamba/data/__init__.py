"""Data sets, their splits, and the loaders that feed one rank."""

from mamba.data.registry import load_data

__all__ = ["load_data"]
