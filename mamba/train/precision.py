"""Which number format the matrix products are computed in."""

from __future__ import annotations

import torch


def resolve_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of `optim.amp`: on GPUs auto is bf16 where it is native, else fp16; on CPU auto is off."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
