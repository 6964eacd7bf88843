"""Vision Mamba as published: counts, names, logits; and positions for another grid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mamba.models.embed import resize_positions
from mamba.models.model import count_parameters
from mamba.models.vim import vim_base, vim_small, vim_tiny
from tests.models.plain_loops import agree, small


@pytest.mark.parametrize("make, count", [(vim_tiny, 7_148_008), (vim_small, 25_796_584), (vim_base, 97_598_440)])
def test_parameter_counts(make, count):
    with torch.device("meta"):
        assert count_parameters(make()) == count


def published(d, depth=24, classes=1000, tokens=197, patch=16):
    """Names and shapes of the authors' state dict of width d."""
    inner, rank, state, taps = 2 * d, d // 16, 16, 4
    shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, tokens, d),
        "patch_embed.proj.weight": (d, 3, patch, patch),
        "patch_embed.proj.bias": (d,),
        "head.weight": (classes, d),
        "head.bias": (classes,),
        "norm_f.weight": (d,),
    }
    for i in range(depth):
        mixer = f"layers.{i}.mixer."
        shapes |= {
            f"layers.{i}.norm.weight": (d,),
            mixer + "in_proj.weight": (2 * inner, d),
            mixer + "out_proj.weight": (d, inner),
            mixer + "A_log": (inner, state),
            mixer + "A_b_log": (inner, state),
            mixer + "D": (inner,),
            mixer + "D_b": (inner,),
        }
        for end in ("", "_b"):
            shapes |= {
                f"{mixer}conv1d{end}.weight": (inner, 1, taps),
                f"{mixer}conv1d{end}.bias": (inner,),
                f"{mixer}x_proj{end}.weight": (rank + 2 * state, inner),
                f"{mixer}dt_proj{end}.weight": (inner, rank),
                f"{mixer}dt_proj{end}.bias": (inner,),
            }
    return shapes


@pytest.mark.parametrize("make, d", [(vim_tiny, 192), (vim_small, 384), (vim_base, 768)])
def test_published_names_and_shapes(make, d):
    with torch.device("meta"):
        model = make()
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == published(d)
    assert {name for name, _ in model.named_parameters()} == set(published(d))


def random_state(seed=0, **sizes):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in published(**sizes).items()}


def test_a_published_state_dict_loads_strictly_and_gives_its_logits():
    state = random_state(d=32, depth=2, classes=5, tokens=26, patch=2)
    model = vim_tiny(5, 10, d_model=32, depth=2, patch_size=2)
    model.load_state_dict(state, strict=True)
    agree(model.double().eval(), vim=True, kind="bidirectional_shared", class_token="middle")


@pytest.mark.parametrize("class_token", ["none", "start", "middle", "double"])
def test_resized_positions(class_token):
    """Linear over the image stays so inside, nearly; the same grid changes nothing; class tokens stay."""
    extra = {"none": 0, "double": 2}.get(class_token, 1)
    torch.manual_seed(0)
    own = torch.randn(1, 36 + extra, 4)
    torch.testing.assert_close(resize_positions(own, 6, class_token), own)
    model = small(class_token=class_token, mixer="bidirectional", img_size=12)
    places = list(model.class_places.values())
    field = torch.full((1, 36 + extra, 1), 99.0)
    patches = [i for i in range(36 + extra) if i not in places]
    field[0, patches, 0] = torch.arange(36.0) // 6  # the row
    big = resize_positions(field, 12, class_token)[0, :, 0]
    new = list(small(class_token=class_token, mixer="bidirectional", img_size=24).class_places.values())
    assert big.shape == (144 + extra,) and all(big[p] == 99 for p in new)
    rows = big[[i for i in range(144 + extra) if i not in new]].view(12, 12)
    expected = (torch.arange(12.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(rows[4:8], expected[4:8, None].expand(4, 12), rtol=0, atol=0.05)


def test_positions_are_interpolated_by_cubics():
    near, far = (1.25 * d**3 - 2.25 * d**2 + 1 for d in (0.25, 0.75))  # Keys' kernel with a = -0.75
    tail, end = (-0.75 * (d**3 - 5 * d**2 + 8 * d - 4) for d in (1.25, 1.75))
    field = torch.zeros(6, 6)
    field[:, 2] = 1.0
    big = resize_positions(field.view(1, 36, 1), 12, "none").view(12, 12)
    columns = torch.tensor([0, end, tail, far, near, near, far, tail, end, 0, 0, 0])
    torch.testing.assert_close(big, columns.expand(12, 12), rtol=0, atol=1e-6)


def test_positions_that_make_no_square():
    with pytest.raises(ValueError, match="24 patches, which make no square"):
        resize_positions(torch.zeros(1, 25, 4), 3, "middle")


def test_vim_for_cifar():
    with torch.device("meta"):
        model = vim_tiny(10, 32)
    assert model.pos_embed.shape == (1, 65, 192) and model.class_places == {"cls_token": 32}


def test_plus_variants():
    with torch.device("meta"):
        model = vim_small(stride=8)
    assert model.architecture.grid == 27 and model.pos_embed.shape == (1, 730, 384)


def test_initial_time_step_of_a_vim():
    torch.manual_seed(0)
    mixer = vim_tiny(10, 32, depth=1).layers[0].mixer
    for projection in (mixer.dt_proj, mixer.dt_proj_b):
        step = nn.functional.softplus(projection.bias)
        assert float(step.min()) >= 0.001 and float(step.max()) <= 0.1001
        assert float(projection.weight.abs().max()) <= 12**-0.5
    assert not any("delta_bias" in name for name, _ in mixer.named_buffers())
