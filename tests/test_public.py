"""What other code may rely on: the public names, and when they are imported.

A name that is added belongs into these lists; one that goes, or that changes what it takes, breaks somebody's code: it
needs a reason and an entry in docs/LOG.md.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mamba
import pruning

ROOT = Path(__file__).parent.parent

MAMBA = """
    Architecture ForgeError MambaModel RunConfig bidirectional_scan get_preset load load_data load_model
    load_published mamba_base mamba_small mamba_tiny selective_scan vim_base vim_small vim_tiny
"""
PRUNING = """
    COMPONENTS PLANS MaskHook Record apply_mask_mamba apply_plan build_mamba_lite check_sparsity_mamba compute_rsst_loss
    extract_mask_mamba get_prunable_layers is_mamba_model load_masks load_record prune_component prune_mamba_structured
    prune_mamba_unstructured prune_multiple refill_masks rsst_schedule_exp save_masks transfer_pruned_weights
    verify_selective_scan_compatibility
"""


@pytest.mark.parametrize("module, names", [(mamba, MAMBA), (pruning, PRUNING)], ids=["mamba", "pruning"])
def test_public_names(module, names):
    assert sorted(module.__all__) == sorted(names.split())
    for name in module.__all__:
        value = getattr(module, name)
        assert name in dir(module)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert (value.__doc__ or "").strip(), f"{name} has no description"


def test_public_names_are_typed():
    """What is offered lazily is also imported for type checkers."""
    text = (ROOT / "mamba" / "__init__.py").read_text()
    assert all(f" import {name} as {name}\n" in text for name in mamba.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'mamba_huge'; public: Architecture"):
        mamba.mamba_huge  # noqa: B018
    assert not hasattr(mamba, "Mamba")


@pytest.mark.parametrize(
    "code",
    [
        "import mamba; dir(mamba); mamba.ForgeError; mamba.RunConfig; mamba.get_preset('v2').resolve()",
        "import mamba.config, mamba.config.cli, mamba.config.help, mamba.config.presets, mamba.config.resolve",
        "from mamba.config import RunConfig; RunConfig().check_workers(2, True)",
    ],
)
def test_no_torch_before_it_is_used(code):
    check = f"{code}\nimport sys\nsys.exit(', '.join({{'torch', 'numpy', 'ray'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_lazy_name_is_the_one_at_home():
    from mamba.models.vim import vim_tiny

    assert mamba.vim_tiny is vim_tiny and "vim_tiny" in vars(mamba)
