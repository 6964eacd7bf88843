"""What a run is told: typed, validated, addressed by dotted keys. Nothing here imports torch."""

from mamba.config.schema import RunConfig

__all__ = ["RunConfig"]
