"""Data sets, their splits, and the loaders that feed one rank."""

from mamba.data.loader import load_data

__all__ = ["load_data"]
