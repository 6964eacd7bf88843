"""Mamba's published weights in our blocks: against transformers where it is installed, against a plain loop always."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mamba.errors import CheckpointError
from mamba.runs.published_mamba import load_published_mamba

WORDS, WIDTH, STATES, TAPS, RANK, DEPTH = 50, 16, 4, 3, 2, 3


def random_state(embedding="embeddings", seed=0):
    """A state dict with Hugging Face's names, or mamba-ssm's, whose every value is random."""
    g = torch.Generator().manual_seed(seed)
    inner = 2 * WIDTH
    layer = {
        "norm.weight": (WIDTH,),
        "mixer.A_log": (inner, STATES),
        "mixer.D": (inner,),
        "mixer.conv1d.weight": (inner, 1, TAPS),
        "mixer.conv1d.bias": (inner,),
        "mixer.in_proj.weight": (2 * inner, WIDTH),
        "mixer.x_proj.weight": (RANK + 2 * STATES, inner),
        "mixer.dt_proj.weight": (inner, RANK),
        "mixer.dt_proj.bias": (inner,),
        "mixer.out_proj.weight": (WIDTH, inner),
    }
    shapes = {f"backbone.{embedding}.weight": (WORDS, WIDTH), "backbone.norm_f.weight": (WIDTH,)}
    shapes |= {f"backbone.layers.{i}.{name}": shape for i in range(DEPTH) for name, shape in layer.items()}
    state = {name: torch.randn(shape, generator=g) * 0.3 for name, shape in shapes.items()}
    return state | {"lm_head.weight": state[f"backbone.{embedding}.weight"]}


def plainly(state, words):
    """The published model written again, in float64, one token after the other."""
    s = {name.removeprefix("backbone."): t.double() for name, t in state.items()}

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    x = s["embeddings.weight"][words]
    for i in range(DEPTH):
        p = {name.removeprefix(f"layers.{i}."): t for name, t in s.items() if name.startswith(f"layers.{i}.")}
        u, z = (norm(x, p["norm.weight"]) @ p["mixer.in_proj.weight"].T).chunk(2, -1)
        padded = F.pad(u, (0, 0, TAPS - 1, 0))
        taps = p["mixer.conv1d.weight"][:, 0]
        u = sum(padded[:, k : k + u.shape[1]] * taps[:, k] for k in range(TAPS)) + p["mixer.conv1d.bias"]
        u = F.silu(u)
        dt, B, C = (u @ p["mixer.x_proj.weight"].T).split((RANK, STATES, STATES), -1)
        delta = F.softplus(dt @ p["mixer.dt_proj.weight"].T + p["mixer.dt_proj.bias"])
        A, h, ys = -p["mixer.A_log"].exp(), 0.0, []
        for t in range(u.shape[1]):
            step = delta[:, t, :, None]
            h = (step * A).exp() * h + step * B[:, t, None] * u[:, t, :, None]
            ys.append((h * C[:, t, None]).sum(-1) + p["mixer.D"] * u[:, t])
        x = x + (torch.stack(ys, 1) * F.silu(z)) @ p["mixer.out_proj.weight"].T
    return norm(x, s["norm_f.weight"]) @ s["lm_head.weight"].T


def test_it_is_the_published_model():
    """Its output is the plain loop's, from Hugging Face's names and from mamba-ssm's."""
    words = torch.randint(WORDS, (2, 19), generator=torch.Generator().manual_seed(1))
    state = random_state()
    want = plainly(state, words)
    for weights in (state, random_state("embedding")):
        got = load_published_mamba(weights)(words)
        assert (got.double() - want).abs().max() < 1e-5 * want.abs().max()


def test_it_equals_transformers():
    """Logits of a randomly initialised MambaForCausalLM: published weights cannot be downloaded here."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (dev extra)")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=WORDS, hidden_size=24, state_size=5, num_hidden_layers=2)
    theirs = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # what starts at 0 or 1 must count too
            p.add_(0.1 * torch.randn_like(p))
            assert p.abs().min() > 0, name
        words = torch.randint(WORDS, (2, 33))
        want = theirs(words).logits
        got = load_published_mamba(theirs.state_dict())(words)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_files_and_a_head_of_its_own(tmp_path):
    state = {name: t.clone() for name, t in random_state().items()}
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "model.safetensors")
    model = load_published_mamba(tmp_path / "model.safetensors")
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert model.lm_head.weight is not model.embedding.weight
    del state["lm_head.weight"]  # as tied weights are saved
    torch.save({name: t.half() for name, t in state.items()}, tmp_path / "pytorch_model.bin")
    model = load_published_mamba(tmp_path / "pytorch_model.bin")
    assert model.lm_head.weight is model.embedding.weight and model.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"backbone.layers.1.mixer.D": None}, r"layers.1.mixer.D is absent there and \(32,\)"),
        ({"backbone.layers.1.mixer.D": torch.zeros(31)}, r"layers.1.mixer.D is \(31,\) there and \(32,\)"),
        ({"backbone.layers.0.mixer.in_proj.bias": torch.zeros(64)}, r"in_proj.bias is \(64,\) there and absent"),
        ({"backbone.layers.0.mixer.A_log": torch.zeros(8)}, "no weights of a Mamba 1"),  # Mamba 2's
        ({"backbone.embeddings.weight": None}, "backbone.embedding.weight is absent"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    state = {name: t for name, t in (random_state() | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        load_published_mamba(state)
    with pytest.raises(CheckpointError, match="no weights of a Mamba 1"):
        load_published_mamba({"weight": torch.zeros(1)})
