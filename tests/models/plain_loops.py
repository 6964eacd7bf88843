"""Every model written again with plain loops over tokens and scans, in float64: what the models are tested against."""

from __future__ import annotations

import itertools
import math

import torch

from mamba.models.model import named_model

ROPE = 1e-5
"""Tolerance with rotary positions: the tables of cosines are float32."""


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


def mix(kind, w, tokens, visit=None):
    """A mixer on a list of vectors; `visit`: the order of its tokens, if it is another than theirs."""
    d_inner = w["A_log"].shape[0]
    projected = [w["in_proj.weight"] @ token for token in tokens]
    pick = lambda k: [p[k * d_inner : (k + 1) * d_inner] for p in projected]  # noqa: E731
    ahead = list(range(len(tokens)))
    back = ahead[::-1]
    if kind in ("forward", "alternating", "cross"):
        merged = scan(w, "", pick(0), pick(1), visit or ahead)
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


def convolved(w, image, stem, stride):
    """A stem of 3x3 convolutions -> place -> vector, and the grid's side. The last convolutions of `conv` halve it."""
    layers = len([name for name in w if name.startswith("patch_embed.conv")])
    halvings = round(math.log2(stride))
    side = image.shape[-1]
    pixels = {(r, c): image[:, r, c] for r, c in itertools.product(range(side), repeat=2)}
    around = list(itertools.product((-1, 0, 1), repeat=2))
    for i in range(1, layers + 1):
        weight = w[f"patch_embed.conv{i}.weight"]
        step = 2 if stem == "conv" and i > layers - halvings else 1
        out = {}
        for r, c in itertools.product(range(side // step), repeat=2):
            here = [(a, b, (step * r + a, step * c + b)) for a, b in around]
            out[r, c] = sum(weight[:, :, a + 1, b + 1] @ pixels[p] for a, b, p in here if p in pixels)
        side //= step
        if stem == "conv":
            mean, var, gain, bias = (
                w[f"patch_embed.norm{i}.{p}"] for p in ("running_mean", "running_var", "weight", "bias")
            )
            out = {p: (v - mean) / torch.sqrt(var + 1e-5) * gain + bias for p, v in out.items()}
            if i < layers:
                out = {p: v * (1 + torch.erf(v / math.sqrt(2))) / 2 for p, v in out.items()}
        else:
            rectified = {p: v.clamp(min=0) for p, v in out.items()}
            side //= 2
            out = {}
            for r, c in itertools.product(range(side), repeat=2):
                near = [rectified[p] for p in ((2 * r + a, 2 * c + b) for a, b in around) if p in rectified]
                out[r, c] = torch.stack(near).amax(0)
        pixels = out
    return pixels, side


def reference(
    w,
    image,
    *,
    kind,
    vim=False,
    class_token="none",
    positions="learned",
    order="raster",
    patch=2,
    stride=2,
    stem="patch",
    head="auto",
):
    """Logits of one image from a state dict."""
    if stem == "patch":
        weight, bias = (w[f"patch_embed.{'proj.' * vim}{p}"] for p in ("weight", "bias"))
        grid = (image.shape[-1] - patch) // stride + 1
        patches = {}
        for r, c in itertools.product(range(grid), repeat=2):
            window = image[:, r * stride : r * stride + patch, c * stride : c * stride + patch]
            patches[r, c] = (weight * window).flatten(1).sum(1) + bias
    else:
        patches, grid = convolved(w, image, stem, stride)
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
    # the orders that blocks visit the tokens in: as they are, and as they would be in the transposed image
    ahead = list(range(len(tokens)))
    place = iter([(c, r) for r, c in walk(order, grid)])
    across = [i if i in slots else where.index(next(place)) for i in ahead]
    ways = {"alternating": [ahead, ahead[::-1]], "cross": [ahead, ahead[::-1], across, across[::-1]]}
    stack, mixer, first, norm = ("layers", "mixer", "norm", rms_norm) if vim else ("blocks", "ssm", "norm1", layer_norm)
    depth = len({name.split(".")[1] for name in w if name.startswith(stack)})
    for i in range(depth):
        block = f"{stack}.{i}"
        inside = f"{block}.{mixer}."
        own = {name.removeprefix(inside): t for name, t in w.items() if name.startswith(inside)}
        read = [norm(w, f"{block}.{first}", v) for v in tokens]
        if positions in ("rope", "both"):
            read = [turned(v, place) for v, place in zip(read, where, strict=True)]
        mixed = mix(kind, own, read, ways[kind][i % len(ways[kind])] if kind in ways else None)
        tokens = [v + m for v, m in zip(tokens, mixed, strict=True)]
        if not vim:
            for t, v in enumerate(tokens):
                hidden = w[f"{block}.mlp.fc1.weight"] @ norm(w, f"{block}.norm2", v) + w[f"{block}.mlp.fc1.bias"]
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
                tokens[t] = v + w[f"{block}.mlp.fc2.weight"] @ hidden + w[f"{block}.mlp.fc2.bias"]
    read = ([tokens[s] for s in slots] or tokens) if head == "auto" else tokens
    read = [norm(w, "norm_f" if vim else "norm", v) for v in read]
    shares = [1.0] * len(read)
    if head == "attention":
        shares = [math.exp(float(w["pool.score.weight"][0] @ v)) for v in read]
    features = sum(share / sum(shares) * v for share, v in zip(shares, read, strict=True))
    return w["head.weight"] @ features + w["head.bias"]


def agree(model, side=10, tolerance=1e-9, **options):
    x = images(side)
    with torch.no_grad():
        expected = torch.stack([reference(model.state_dict(), image, **options) for image in x])
        difference = (model(x) - expected).abs().max()
    assert float(difference) < tolerance
    assert float(expected.std(0).max()) > 1e-3, "the logits do not depend on the image"
