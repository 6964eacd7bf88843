"""Every backend against the reference, and the reference against the mathematics."""

from __future__ import annotations

import itertools

import pytest
import torch

from mamba.ops.scan import BACKENDS, selective_scan
from mamba.ops.scan.reference import selective_scan_reference

FAST = [name for name in BACKENDS if name not in ("reference", "triton")]
OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "return_last_state")


def make_inputs(batch=2, d_inner=5, length=7, d_state=4, dtype=torch.float64, seed=0, channels_last=False):
    """Random inputs with a realistic, stable A; `channels_last` gives (batch, length, channel) tensors transposed."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def sequence(channels):
        t = rand(batch, length, channels)
        return t.transpose(1, 2) if channels_last else t.transpose(1, 2).contiguous()

    return {
        "u": sequence(d_inner),
        "delta": (sequence(d_inner).double() * 0.5).to(dtype),
        "A": (-rand(d_inner, d_state).double().exp()).to(dtype),
        "B": sequence(d_state),
        "C": sequence(d_state),
        "D": rand(d_inner),
        "z": sequence(d_inner),
        "delta_bias": rand(d_inner) * 0.5,
    }


def run_with_gradients(backend, tensors, flags, seed=1):
    """Outputs and the gradient of a random projection of them with respect to every tensor."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    out = selective_scan(**leaves, **flags, backend=backend)
    outs = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(seed)
    loss = sum((o.double() * torch.randn(o.shape, generator=g, dtype=torch.float64)).sum() for o in outs)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return [*outs, *grads], [*(f"out{i}" for i in range(len(outs))), *(f"grad {k}" for k in leaves)]


def assert_equal_to_reference(backend, tensors, flags, tolerance):
    got, names = run_with_gradients(backend, tensors, flags)
    oracle = {k: v.double() for k, v in tensors.items()}
    want, _ = run_with_gradients("reference", oracle, flags)
    for name, a, b in zip(names, got, want, strict=True):
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{backend} {name}: relative error {error:.2e} above {tolerance:.0e}"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=len(OPTIONS))))
def test_every_option_on_and_off(backend, options):
    on = dict(zip(OPTIONS, options, strict=True))
    tensors = {k: v for k, v in make_inputs().items() if on.get(k, True)}
    flags = {k: on[k] for k in ("delta_softplus", "return_last_state")}
    assert_equal_to_reference(backend, tensors, flags, 1e-12)


SHAPES = [(1, 1, 1, 1), (2, 3, 1, 4), (1, 4, 5, 1), (3, 6, 64, 16), (2, 4, 33, 5), (1, 2, 196, 16)]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_shapes_and_types(backend, shape, dtype, tolerance):
    batch, d_inner, length, d_state = shape
    tensors = make_inputs(batch, d_inner, length, d_state, dtype)
    assert_equal_to_reference(backend, tensors, {"delta_softplus": True, "return_last_state": True}, tolerance)


@pytest.mark.parametrize("backend", FAST)
def test_any_strides(backend):
    wide = make_inputs(d_inner=10, length=9, channels_last=True)
    tensors = {k: v[:, ::2] if v.ndim == 3 and v.shape[1] == 10 else v for k, v in wide.items()}
    tensors |= {k: wide[k][::2] for k in ("A", "D", "delta_bias")}
    assert not tensors["u"].is_contiguous()
    assert_equal_to_reference(backend, tensors, {"delta_softplus": True}, 1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_gradcheck(backend):
    tensors = make_inputs(batch=1, d_inner=2, length=4, d_state=3)
    leaves = [v.requires_grad_() for v in tensors.values()]

    def scan(*args):
        return selective_scan(*args, delta_softplus=True, return_last_state=True, backend=backend)

    assert torch.autograd.gradcheck(scan, leaves)


def test_reference_equals_the_closed_form():
    """h_t = sum_s exp(A sum of delta after s) delta_s B_s u_s: the recurrence unrolled, no loop shared."""
    t = make_inputs(batch=2, d_inner=3, length=6, d_state=2)
    u, delta, A, B, C = (t[k] for k in ("u", "delta", "A", "B", "C"))
    total = delta.cumsum(-1)
    y = torch.zeros_like(u)
    for i, j in itertools.product(range(6), range(6)):
        if j <= i:
            weight = torch.exp((total[..., i] - total[..., j])[..., None] * A)
            y[..., i] += torch.einsum("bdn,bd,bn,bn->bd", weight, (delta * u)[..., j], B[..., j], C[..., i])
    torch.testing.assert_close(selective_scan_reference(u, delta, A, B, C), y)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_causal_with_memory(backend):
    """A later token never changes an earlier output; the first token reaches the last output."""
    t = make_inputs(batch=1, d_inner=3, length=12)
    base = selective_scan(**t, delta_softplus=True, backend=backend)
    for position in (0, 5, 11):
        changed = {k: v.clone() for k, v in t.items()}
        for name in ("u", "delta", "B", "C", "z"):
            changed[name][..., position] += 1.0
        out = selective_scan(**changed, delta_softplus=True, backend=backend)
        assert torch.equal(out[..., :position], base[..., :position])
        assert not torch.allclose(out[..., position:], base[..., position:])
    changed = {**t, "u": t["u"].clone()}
    changed["u"][..., 0] += 1.0
    out = selective_scan(**changed, delta_softplus=True, backend=backend)
    assert (out[..., -1] - base[..., -1]).abs().min() > 0


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_does_not_reach_inside(backend):
    """The state stays in float32 under autocast (whose backward is called outside of it, as torch asks)."""
    tensors = make_inputs(dtype=torch.float32, length=20)
    results = []
    for enabled in (False, True):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = selective_scan(**leaves, delta_softplus=True, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"delta": torch.zeros(2, 4, 7)}, "delta must be"),
        ({"B": torch.zeros(2, 3, 7)}, "B must be"),
        ({"D": torch.zeros(4)}, "D must be"),
        ({"u": torch.zeros(5, 7)}, "u must be"),
        ({"backend": "cuda"}, "valid: auto, reference, two_phase"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**make_inputs(dtype=torch.float32), **change})


@pytest.mark.parametrize("backend", ["auto", *FAST, "reference"])
@pytest.mark.parametrize(
    "name, kind", [("A", torch.complex64), ("B", torch.complex64), ("u", torch.int32), ("delta", torch.bool)]
)
def test_what_the_scan_cannot_do_is_refused_by_name(backend, name, kind):
    tensors = make_inputs(dtype=torch.float32)
    tensors[name] = tensors[name].to(kind)
    with pytest.raises(TypeError, match=f"^{name} is {kind}"):
        selective_scan(**tensors, backend=backend)
