"""Mixers, class tokens, positions, orders and stems of every model, and Vision Mamba as published: each against a
reference written here independently, with plain loops over tokens and scans, in float64."""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from torch import nn

from mamba.errors import CheckpointError
from mamba.models.embed import ConvStem, resize_positions, sequence_order
from mamba.models.model import Architecture, MambaModel, count_parameters, named_model
from mamba.models.vim import load_published, vim_base, vim_small, vim_tiny
from mamba.runs.checkpoint import load_model, save_checkpoint
from mamba.train.optim import parameter_groups

MIXERS = ("forward", "bidirectional", "bidirectional_shared", "multiscale")
CLASS_TOKENS = ("none", "start", "middle", "double")
POSITIONS = ("learned", "rope", "both", "none")


def small(seed=0, **overrides):
    """A two-block model in float64 whose every parameter is random and none zero. 25 patches: no scale divides them."""
    torch.manual_seed(seed)
    options = {"name": "mamba_tiny", "d_model": 8, "depth": 2, "d_state": 3, "patch_size": 2, **overrides}
    model = named_model(options.pop("name"), 5, options.pop("img_size", 10), **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def images(side=10, count=2):
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- the reference: one image, lists of token vectors ----------------------------------------------------------------


def silu(v):
    return v / (1 + torch.exp(-v))


def scan(w, end, xs, zs, order):
    """One selective scan over lists of x and z vectors, visiting the tokens in `order` -> outputs in token order."""
    conv, bias = w[f"conv1d{end}.weight"], w[f"conv1d{end}.bias"]
    rates = -torch.exp(w[f"A{end}_log"])
    d_inner, d_state = rates.shape
    rows = w[f"x_proj{end}.weight"]
    low_rank = f"dt_proj{end}.weight" in w
    taps = conv.shape[-1]
    state = torch.zeros(d_inner, d_state, dtype=torch.float64)
    out = [None] * len(xs)
    for t, token in enumerate(order):
        u = bias.clone()
        for back in range(taps):
            if t >= back:
                u = u + conv[:, 0, taps - 1 - back] * xs[order[t - back]]
        u = silu(u)
        if low_rank:
            rank = w[f"dt_proj{end}.weight"].shape[1]
            step, b, c = rows[:rank] @ u, rows[rank : rank + d_state] @ u, rows[rank + d_state :] @ u
            step = w[f"dt_proj{end}.weight"] @ step + w[f"dt_proj{end}.bias"]
        else:
            b, c, step = rows[:d_state] @ u, rows[d_state : 2 * d_state] @ u, rows[2 * d_state :] @ u
            step = step + w[f"delta_bias{end}"]
        delta = torch.log(1 + torch.exp(step))
        y = torch.zeros(d_inner, dtype=torch.float64)
        for n in range(d_state):
            state[:, n] = torch.exp(delta * rates[:, n]) * state[:, n] + delta * b[n] * u
            y = y + c[n] * state[:, n]
        out[token] = (y + w[f"D{end}"] * u) * silu(zs[token])
    return out


def averages(vectors, scale):
    return [torch.stack(vectors[i : i + scale]).mean(0) for i in range(0, len(vectors), scale)]


def mix(kind, w, tokens):
    """A mixer on a list of vectors."""
    d_inner = w["A_log"].shape[0]
    projected = [w["in_proj.weight"] @ token for token in tokens]
    pick = lambda k: [p[k * d_inner : (k + 1) * d_inner] for p in projected]  # noqa: E731
    ahead = list(range(len(tokens)))
    back = ahead[::-1]
    if kind == "forward":
        merged = scan(w, "", pick(0), pick(1), ahead)
    elif kind == "bidirectional_shared":
        a, b = scan(w, "", pick(0), pick(1), ahead), scan(w, "_b", pick(0), pick(1), back)
        merged = [(p + q) / 2 for p, q in zip(a, b, strict=True)]
    elif kind == "bidirectional":
        a, b = scan(w, "", pick(0), pick(1), ahead), scan(w, "_b", pick(2), pick(3), back)
        merged = [torch.cat(pair) for pair in zip(a, b, strict=True)]
    else:
        parts = []
        for i, scale in enumerate((1, 2, 4)):
            xs, zs = averages(pick(2 * i), scale), averages(pick(2 * i + 1), scale)
            ys = scan(w, f"_{scale}" if i else "", xs, zs, list(range(len(xs))))
            parts.append([ys[t // scale] for t in ahead])
        merged = [torch.cat(vectors) for vectors in zip(*parts, strict=True)]
    return [w["out_proj.weight"] @ y for y in merged]


def rms_norm(w, prefix, v):
    return v / torch.sqrt((v * v).mean() + 1e-5) * w[f"{prefix}.weight"]


def layer_norm(w, prefix, v):
    centred = v - v.mean()
    return centred / torch.sqrt((centred * centred).mean() + 1e-5) * w[f"{prefix}.weight"] + w[f"{prefix}.bias"]


def turned(v, place):
    """2D rotary embedding of one vector; place: (row, column), or None for a class token."""
    if place is None:
        return v
    out = v.clone()
    quarter = len(v) // 4
    for pair in range(2 * quarter):
        angle = place[pair // quarter] / 10000 ** ((pair % quarter) / quarter)
        a, b = v[2 * pair], v[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def walk(order, grid):
    """(row, column) of the patches in the order of a scan."""
    places = [(r, c) for r in range(grid) for c in range(grid)]
    if order == "column":
        return sorted(places, key=lambda p: (p[1], p[0]))
    if order == "snake":
        return sorted(places, key=lambda p: (p[0], p[1] if p[0] % 2 == 0 else -p[1]))
    return places


def reference(w, image, *, kind, vim=False, class_token="none", positions="learned", order="raster", patch=2, stride=2):
    """Logits of one image from a state dict."""
    weight, bias = (w[f"patch_embed.{'proj.' * vim}{p}"] for p in ("weight", "bias"))
    grid = (image.shape[-1] - patch) // stride + 1
    patches = {}
    for r, c in itertools.product(range(grid), repeat=2):
        window = image[:, r * stride : r * stride + patch, c * stride : c * stride + patch]
        patches[r, c] = (weight * window).flatten(1).sum(1) + bias
    n = grid * grid
    slots = {"none": [], "start": [0], "middle": [n // 2], "double": [0, n + 1]}[class_token]
    names = ["cls_token_head", "cls_token_tail"] if class_token == "double" else ["cls_token"]
    # the places of the raster sequence that patches and class tokens take; positions are stored by them
    raster = [place for place in range(n + len(slots)) if place not in slots]
    stored = dict(zip(walk("raster", grid), raster, strict=True))
    tokens, where = [], []
    way = iter(walk(order, grid))
    for i in range(n + len(slots)):
        if i in slots:
            token, place, row = w[names[slots.index(i)]][0, 0], None, i
        else:
            place = next(way)
            token, row = patches[place], stored[place]
        if positions in ("learned", "both"):
            token = token + w["pos_embed"][0, row]
        tokens.append(token)
        where.append(place)
    stack, mixer, first, norm = ("layers", "mixer", "norm", rms_norm) if vim else ("blocks", "ssm", "norm1", layer_norm)
    depth = len({name.split(".")[1] for name in w if name.startswith(stack)})
    for i in range(depth):
        block = f"{stack}.{i}"
        inside = f"{block}.{mixer}."
        own = {name.removeprefix(inside): t for name, t in w.items() if name.startswith(inside)}
        read = [norm(w, f"{block}.{first}", v) for v in tokens]
        if positions in ("rope", "both"):
            read = [turned(v, place) for v, place in zip(read, where, strict=True)]
        mixed = mix(kind, own, read)
        tokens = [v + m for v, m in zip(tokens, mixed, strict=True)]
        if not vim:
            for t, v in enumerate(tokens):
                hidden = w[f"{block}.mlp.fc1.weight"] @ norm(w, f"{block}.norm2", v) + w[f"{block}.mlp.fc1.bias"]
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
                tokens[t] = v + w[f"{block}.mlp.fc2.weight"] @ hidden + w[f"{block}.mlp.fc2.bias"]
    read = [tokens[s] for s in slots] or tokens
    features = torch.stack([norm(w, "norm_f" if vim else "norm", v) for v in read]).mean(0)
    return w["head.weight"] @ features + w["head.bias"]


def agree(model, side=10, tolerance=1e-9, **options):
    x = images(side)
    with torch.no_grad():
        expected = torch.stack([reference(model.state_dict(), image, **options) for image in x])
        difference = (model(x) - expected).abs().max()
    assert float(difference) < tolerance
    assert float(expected.std(0).max()) > 1e-3, "the logits do not depend on the image"


# --- every choice ----------------------------------------------------------------------------------------------------

ROPE = 1e-5
"""The tables of cosines are float32."""


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_equal_the_reference(mixer):
    agree(small(mixer=mixer), kind=mixer)


@pytest.mark.parametrize("mixer", MIXERS[1:])
def test_mixers_of_a_short_sequence(mixer):
    """Four tokens, then one: fewer than the convolution's taps, and than the largest scale."""
    agree(small(mixer=mixer, img_size=4), side=4, kind=mixer)
    agree(small(mixer=mixer, img_size=4, patch_size=4), side=4, kind=mixer, patch=4, stride=4)


@pytest.mark.parametrize("class_token", CLASS_TOKENS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_class_tokens_and_positions_equal_the_reference(class_token, positions):
    model = small(class_token=class_token, pos_embed=positions, mixer="bidirectional")
    tolerance = ROPE if positions in ("rope", "both") else 1e-9
    agree(model, tolerance=tolerance, kind="bidirectional", class_token=class_token, positions=positions)


@pytest.mark.parametrize("order", ["raster", "snake", "column"])
def test_scan_orders_equal_the_reference(order):
    model = small(scan_order=order, class_token="middle", pos_embed="both", mixer="bidirectional")
    options = {"class_token": "middle", "positions": "both", "order": order}
    agree(model, tolerance=ROPE, kind="bidirectional", **options)


def test_scan_orders_by_hand():
    assert sequence_order("snake", 3, []) == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert sequence_order("column", 3, []) == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert sequence_order("column", 2, [2]) == [0, 3, 2, 1, 4]  # the class token at 2 stays


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("class_token", ["middle", "double"])
def test_vim_equals_the_reference(mixer, class_token):
    model = small(name="vim_tiny", d_model=16, mixer=mixer, class_token=class_token)
    agree(model, vim=True, kind=mixer, class_token=class_token)


def test_vim_with_overlapping_patches_equals_the_reference():
    model = small(name="vim_tiny", d_model=16, patch_size=4, stride=2)
    assert model.architecture.grid == 4
    agree(model, vim=True, kind="bidirectional_shared", class_token="middle", patch=4, stride=2)


def test_conv_stem_is_what_it_says():
    model = small(stem="conv", patch_size=None, img_size=12).train()
    stem = model.patch_embed
    assert isinstance(stem, ConvStem) and model.pos_embed.shape == (1, 9, 8)
    convolutions = [m for m in stem.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (3, 64, (3, 3), (1, 1)),
        (64, 128, (3, 3), (2, 2)),
        (128, 8, (3, 3), (2, 2)),
    ]
    tokens = stem(images(12, 16))
    norm = stem.norm3
    expected = norm.bias.expand(8), norm.weight.abs()
    torch.testing.assert_close(tokens.flatten(0, 1).mean(0), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens.flatten(0, 1).std(0, correction=0), expected[1], rtol=1e-3, atol=0)
    assert model.eval()(images(12)).shape == (2, 5)
    # GELU after the first two, not after the last; every later tensor takes its memory order from the tokens
    x = images(12)
    for convolution, norm in zip(convolutions, (stem.norm1, stem.norm2, stem.norm3), strict=True):
        norm.running_mean.uniform_(-0.1, 0.1)
        x = norm(convolution(x if convolution is stem.conv1 else 0.5 * x * (1 + torch.erf(x / 2**0.5))))
    tokens = stem(images(12))
    torch.testing.assert_close(tokens, x.flatten(2).transpose(1, 2))
    assert tokens.is_contiguous() and small(img_size=12).patch_embed(images(12)).is_contiguous()


def test_shapes_that_make_no_model():
    whole = small().architecture
    with pytest.raises(ValueError, match="conv stem has a stride of 4"):
        MambaModel(replace(whole, stem="conv"))
    with pytest.raises(ValueError, match="img_size 10 is not divisible by patch_size 4"):
        MambaModel(replace(whole, patch_size=4, stride=4))
    with pytest.raises(ValueError, match="patches of 4 every 5 pixels do not fill img_size 10"):
        MambaModel(replace(whole, patch_size=4, stride=5))
    with pytest.raises(ValueError, match="needs dt_rank"):
        MambaModel(replace(whole, blocks=(replace(whole.blocks[0], learned_dt_bias=True),)))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", ["mamba_tiny", "vim_tiny"])
def test_every_parameter_gets_gradient(mixer, name):
    model = small(name=name, d_model=16, mixer=mixer, class_token="double", pos_embed="both", scan_order="snake")
    model(images()).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


def test_both_directions_see_the_whole_sequence():
    """The first token's output depends on the last token, and in one direction it does not."""
    for mixer, sees in (("forward", False), ("bidirectional", True), ("bidirectional_shared", True)):
        ssm = small(mixer=mixer).stack[0].token_mixer
        x = torch.randn(1, 12, 8, dtype=torch.float64)
        later = x.clone()
        later[:, -1] += 1
        assert bool((ssm(later)[:, 0] - ssm(x)[:, 0]).abs().max() > 1e-9) == sees


VARIANTS = (
    {"mixer": "bidirectional", "stem": "conv", "patch_size": None, "img_size": 8},
    {"mixer": "multiscale", "class_token": "double", "pos_embed": "both", "scan_order": "column"},
    {"name": "vim_tiny", "pos_embed": "rope"},
    {"name": "vim_tiny", "patch_size": 4, "stride": 2, "class_token": "start", "scan_order": "snake"},
)


@pytest.mark.parametrize("options", VARIANTS)
def test_checkpoints_rebuild_the_model(options, tmp_path):
    model = small(**options).float()
    save_checkpoint(tmp_path / "here", model, None, {}, None)
    again, _ = load_model(tmp_path / "here")
    x = images(model.base.img_size).float()
    assert again.architecture == model.architecture and torch.equal(again(x), model(x))
    assert list(again.state_dict()) == list(model.state_dict())


def test_a_description_from_before_the_family_still_builds():
    block = {"d_inner": 24, "d_state": 4, "d_conv": 4, "mlp_hidden": 48, "out_channels": None, "dt_rank": None}
    old = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 3,
        "num_classes": 5,
        "d_model": 12,
        "drop_path": 0.0,
        "blocks": [block | {"shared_bc": False, "separable_conv": False}] * 2,
    }
    model = MambaModel(Architecture.from_dict(old))
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 5)
    assert "blocks.1.ssm.delta_bias" in model.state_dict() and "patch_embed.weight" in model.state_dict()


@pytest.mark.parametrize("options", [{"mixer": m} for m in MIXERS] + list(VARIANTS))
def test_macs_count_the_matrix_products(options, monkeypatch):
    """Against torch's own counter; scans and depthwise convolutions, which it misses, are added by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr("mamba.models.ssm.selective_scan", lambda u, *args, **more: u)
    monkeypatch.setattr("mamba.models.ssm.bidirectional_scan", lambda u, *args, **more: u)
    model = small(**options).float()
    a = model.architecture
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(a.img_size, 1).float())
    steps = sum(math.ceil(a.num_tokens / s) for s in {"forward": (1,), "multiscale": (1, 2, 4)}.get(
        a.blocks[0].mixer, (1, 1)))  # fmt: skip
    by_hand = len(a.blocks) * steps * a.blocks[0].d_inner * (3 * a.blocks[0].d_state + 2 + a.blocks[0].d_conv)
    assert a.macs() == counter.get_total_flops() // 2 + by_hand


@pytest.mark.parametrize("options", VARIANTS)
def test_compiles_without_a_graph_break(options):
    model = small(**options).float()
    x = images(model.base.img_size).float()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_optimizer_groups_of_a_vim():
    model = small(name="vim_tiny", class_token="double", mixer="multiscale")
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05, 0.5)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    scale = {names[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    assert len(scale) == len(names)
    assert not any("_log" in n or "cls_token" in n or "embed" in n or "norm" in n or "bias" in n for n in decayed)
    assert {"layers.0.mixer.x_proj_4.weight", "layers.1.mixer.dt_proj_2.weight", "head.weight"} <= decayed
    assert scale["cls_token_tail"] == scale["pos_embed"] == 0.25 and scale["layers.0.mixer.D_2"] == 0.5


# --- Vision Mamba as published ---------------------------------------------------------------------------------------


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


def test_published_files(tmp_path):
    state = random_state(d=32, depth=1, classes=5, tokens=26, patch=2)
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
    state = random_state(d=32, depth=1, classes=5, tokens=26, patch=2)
    model = vim_tiny(5, d_model=32, depth=1, patch_size=2, **more)
    load_published(model, state)
    grid = model.architecture.grid
    assert grid in (7, 9) and model.pos_embed.shape == (1, grid**2 + 1, 32)
    middle = grid**2 // 2
    assert torch.equal(model.pos_embed[0, middle], state["pos_embed"][0, 12])  # the class token's, moved
    x = torch.randn(1, 3, more["img_size"], more["img_size"])
    assert model(x).isfinite().all()


@pytest.mark.parametrize("class_token", CLASS_TOKENS)
def test_resized_positions(class_token):
    """Linear over the image stays so inside, nearly; the same grid changes nothing; class tokens stay."""
    extra = {"none": 0, "double": 2}.get(class_token, 1)
    torch.manual_seed(0)
    own = torch.randn(1, 36 + extra, 4)
    torch.testing.assert_close(resize_positions(own, 6, class_token), own)
    model = small(class_token=class_token, img_size=12)
    places = list(model.class_places.values())
    field = torch.full((1, 36 + extra, 1), 99.0)
    patches = [i for i in range(36 + extra) if i not in places]
    field[0, patches, 0] = torch.arange(36.0) // 6  # the row
    big = resize_positions(field, 12, class_token)[0, :, 0]
    new = list(small(class_token=class_token, img_size=24).class_places.values())
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


@pytest.mark.parametrize("positions", ["learned", "none"])
def test_the_residual_stream_is_float32_under_autocast(positions):
    model, seen = small(pos_embed=positions).float(), []
    model.stack[0].register_forward_hook(lambda module, inputs, output: seen.extend((inputs[0], output)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images().float())
    assert [x.dtype for x in seen] == [torch.float32] * 2


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


def test_class_tokens_start_like_positions():
    torch.manual_seed(0)
    model = named_model("mamba_tiny", 10, 32, d_model=2000, depth=1, d_state=1, expand=0.01, class_token="double")
    for token in (model.cls_token_head, model.cls_token_tail):
        assert 0.015 < float(token.std()) < 0.025


def test_initial_time_step_of_a_vim():
    torch.manual_seed(0)
    mixer = vim_tiny(10, 32, depth=1).layers[0].mixer
    for projection in (mixer.dt_proj, mixer.dt_proj_b):
        step = nn.functional.softplus(projection.bias)
        assert float(step.min()) >= 0.001 and float(step.max()) <= 0.1001
        assert float(projection.weight.abs().max()) <= 12**-0.5
    assert not any("delta_bias" in name for name, _ in mixer.named_buffers())
