"""Published weights from files: read, refused by name, interpolated for another grid."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from mamba.config.schema import RunConfig
from mamba.errors import CheckpointError
from mamba.models.model import named_model
from mamba.models.vim import vim_tiny
from mamba.runs.checkpoint import save_checkpoint
from mamba.runs.published import load_published
from mamba.runs.start import described, fitted


def random_state(seed=0):
    """A state dict of random values with the published names, of width 32, one layer and 5 x 5 patches."""
    generator = torch.Generator().manual_seed(seed)
    names = vim_tiny(5, 10, d_model=32, depth=1, patch_size=2).state_dict()  # equal to the authors': tests/models
    return {name: torch.randn(tensor.shape, generator=generator) * 0.2 for name, tensor in names.items()}


def test_published_files(tmp_path):
    state = random_state()
    make = lambda **more: vim_tiny(5, 10, d_model=32, depth=1, patch_size=2, **more)  # noqa: E731
    torch.save({"model": state, "epoch": 3, "args": Namespace(lr=1e-3)}, tmp_path / "vim.pth")
    model = make()
    load_published(model, tmp_path / "vim.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="missing.pth is missing"):
        load_published(make(), tmp_path / "missing.pth")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="bad.pth cannot be read as weights"):
        load_published(make(), tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"cls_token_head is absent there and \(1, 1, 32\)"):
        load_published(make(class_token="double"), state)
    with pytest.raises(CheckpointError, match=r"head.weight is \(5, 32\) there and \(7, 32\)"):
        load_published(vim_tiny(7, 10, d_model=32, depth=1, patch_size=2), state)


@pytest.mark.parametrize("more", [{"img_size": 14}, {"img_size": 10, "stride": 1}])
def test_positions_are_interpolated_for_another_grid(more):
    state = random_state()
    model = vim_tiny(5, d_model=32, depth=1, patch_size=2, **more)
    load_published(model, state)
    grid = model.architecture.grid
    assert grid in (7, 9) and model.pos_embed.shape == (1, grid**2 + 1, 32)
    middle = grid**2 // 2
    assert torch.equal(model.pos_embed[0, middle], state["pos_embed"][0, 12])  # the class token's, moved
    x = torch.randn(1, 3, more["img_size"], more["img_size"])
    assert model(x).isfinite().all()


def test_rotary_positions_of_a_checkpoint_stretch_to_larger_images(tmp_path):
    """Twice the side: every other token of a row turns as it did."""
    model = vim_tiny(5, 10, d_model=32, depth=1, patch_size=2, pos_embed="both")
    larger = fitted(model, 5, 20, False, tmp_path)
    assert larger.architecture.rope_grid == 5 and larger.architecture.grid == 10
    places = [p for p in range(101) if p != 50], [p for p in range(26) if p != 12]
    big, small = larger.cos[places[0]].view(10, 10, -1), model.cos[places[1]].view(5, 5, -1)
    torch.testing.assert_close(big[::2, ::2], small)
    assert fitted(larger, 5, 40, False, tmp_path).architecture.rope_grid == 5


def test_a_config_says_the_stem_and_head_of_what_it_starts_from(tmp_path):
    model = named_model(
        "mamba_tiny", 3, 8, d_model=8, depth=1, stem="conv", stem_layers=2, head="attention", dropout=0.1
    )
    save_checkpoint(tmp_path / "start", model, None, {}, None)
    config = described(RunConfig().with_values({"model.checkpoint": str(tmp_path / "start")})).model
    assert (config.stem, config.stem_layers, config.stride, config.head) == ("conv", 2, 4, "attention")
    assert (config.dropout, config.rope_grid) == (0.1, None)
