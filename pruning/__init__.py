"""What to cut from a vision Mamba, how to score it, how to cut it, and what it bought. Knows `mamba`, not Ray.

    smaller = pruning.prune_mamba_structured(model, {"mlp": 0.5}, scope="global", score="l1")
    masks = pruning.prune_mamba_unstructured(model, {"linear_out": 0.7, "linear_gate": 0.5})

docs/PRUNING.md says what each component is and draws what is coupled. Exactness: a rate takes round(rate n) of n units,
and a masked model and the smaller one made of it (`pruning.shrink.shrink`) compute the same.
"""

from pruning.components import COMPONENTS, get_prunable_layers, is_mamba_model
from pruning.cut import (
    prune_component,
    prune_mamba_structured,
    prune_mamba_unstructured,
    prune_multiple,
    verify_selective_scan_compatibility,
)
from pruning.lite import build_mamba_lite, transfer_pruned_weights
from pruning.masks import (
    MaskHook,
    apply_mask_mamba,
    check_sparsity_mamba,
    extract_mask_mamba,
    load_masks,
    save_masks,
)
from pruning.penalty import compute_rsst_loss, rsst_schedule_exp
from pruning.plans import PLANS, apply_plan
from pruning.record import Record, load_record
from pruning.refill import refill_masks

__all__ = [
    "COMPONENTS",
    "PLANS",
    "MaskHook",
    "Record",
    "apply_mask_mamba",
    "apply_plan",
    "build_mamba_lite",
    "check_sparsity_mamba",
    "compute_rsst_loss",
    "extract_mask_mamba",
    "get_prunable_layers",
    "is_mamba_model",
    "load_masks",
    "load_record",
    "prune_component",
    "prune_mamba_structured",
    "prune_mamba_unstructured",
    "prune_multiple",
    "refill_masks",
    "rsst_schedule_exp",
    "save_masks",
    "transfer_pruned_weights",
    "verify_selective_scan_compatibility",
]
