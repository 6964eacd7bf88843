"""Both directions at once against two scans of the reference, with flips: outputs and every gradient."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mamba.ops.scan import BACKENDS, bidirectional_scan, selective_scan
from tests.ops.scan.test_selective_scan import make_inputs

ROOT = Path(__file__).parents[3]
CPU_BACKENDS = [name for name in BACKENDS if name not in ("reference", "triton")]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def make_pairs(shape, dtype=torch.float64, shared=("z",), missing=(), device="cpu"):
    """Arguments of `bidirectional_scan`: pairs, or one tensor where it is shared."""
    one, two = (make_inputs(*shape, dtype, seed, channels_last=True) for seed in (0, 1))
    pairs = {k: one[k] if k in shared else (one[k], two[k]) for k in one if k not in missing}
    return {
        k: tuple(t.to(device) for t in pair) if isinstance(pair, tuple) else pair.to(device)
        for k, pair in pairs.items()
    }


def outputs_and_gradients(scan, pairs, **flags):
    leaves = {
        k: tuple(t.detach().requires_grad_() for t in pair)
        if isinstance(pair, tuple)
        else pair.detach().requires_grad_()
        for k, pair in pairs.items()
    }
    outs = scan(**leaves, **flags)
    g = torch.Generator().manual_seed(2)
    loss = sum((o.double() * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device)).sum() for o in outs)
    named = {
        f"{k} {i}": t for k, pair in leaves.items() for i, t in enumerate(pair if isinstance(pair, tuple) else (pair,))
    }
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"out": outs[0], "out reversed": outs[1], **dict(zip(named, grads, strict=True))}


def two_scans(**pairs):
    """The definition: flip the sequences of the reversed scan, and its output."""
    flags = {k: pairs.pop(k) for k in ("delta_softplus",)}
    one, two = ({k: pair[i] if isinstance(pair, tuple) else pair for k, pair in pairs.items()} for i in (0, 1))
    two = {k: t.flip(-1) if t.ndim == 3 else t for k, t in two.items()}
    out, reversed_out = (selective_scan(**x, **flags, backend="reference") for x in (one, two))
    return out, reversed_out.flip(-1)


def assert_equal_to_two_scans(backend, pairs, tolerance, softplus=True):
    got = outputs_and_gradients(bidirectional_scan, pairs, delta_softplus=softplus, backend=backend)
    oracle = {k: tuple(t.double() for t in x) if isinstance(x, tuple) else x.double() for k, x in pairs.items()}
    want = outputs_and_gradients(two_scans, oracle, delta_softplus=softplus)
    for name, b in want.items():
        error = (got[name].double() - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{backend}, {name}: relative error {error:.2e} above {tolerance:.0e}"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 18, 4), (3, 37, 33, 5), (2, 20, 64, 16)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_equals_two_scans(backend, shape, dtype, tolerance):
    assert_equal_to_two_scans(backend, make_pairs(shape, dtype), tolerance)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shared", [(), ("u", "z"), ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")], ids=str)
def test_what_is_shared(backend, shared):
    assert_equal_to_two_scans(backend, make_pairs((2, 5, 19, 4), torch.float32, shared), 1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_without_options(backend):
    pairs = make_pairs((2, 5, 19, 4), torch.float32, missing=("D", "z", "delta_bias"))
    pairs["delta"] = tuple(t.abs() for t in pairs["delta"])  # without softplus a negative step makes the state grow
    assert_equal_to_two_scans(backend, pairs, 1e-5, softplus=False)


@pytest.mark.parametrize("backend", ["reference", *CPU_BACKENDS])
def test_reversed_scan_looks_at_later_tokens_only(backend):
    pairs = make_pairs((1, 3, 12, 4), torch.float32)
    before = bidirectional_scan(**pairs, delta_softplus=True, backend=backend)
    changed = {**pairs, "u": tuple(t.clone() for t in pairs["u"])}
    for t in changed["u"]:
        t[..., 5] += 1.0
    after = bidirectional_scan(**changed, delta_softplus=True, backend=backend)
    same = [[torch.equal(a[..., t], b[..., t]) for t in range(12)] for a, b in zip(before, after, strict=True)]
    assert same == [[t < 5 for t in range(12)], [t > 5 for t in range(12)]]


def test_wrong_sizes():
    pairs = make_pairs((2, 5, 7, 4), torch.float32)
    with pytest.raises(ValueError, match="same sizes"):
        bidirectional_scan(**make_longer(pairs))
    with pytest.raises(ValueError, match="valid: auto"):
        bidirectional_scan(**pairs, backend="cuda")
    with pytest.raises(ValueError, match="both directions or for none"):
        bidirectional_scan(**{**pairs, "D": (pairs["D"][0], None)})


def make_longer(pairs):
    other = make_pairs((2, 5, 8, 4), torch.float32, shared=())
    return {k: (x[0] if isinstance(x, tuple) else x, other[k][1]) for k, x in pairs.items()}


def test_compiles_in_one_graph():
    pairs = make_pairs((2, 20, 18, 3), torch.float32)

    def scan(**leaves):
        return torch.compile(bidirectional_scan, fullgraph=True, backend="aot_eager")(**leaves)

    got = outputs_and_gradients(scan, pairs, delta_softplus=True)
    want = outputs_and_gradients(bidirectional_scan, pairs, delta_softplus=True)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="needs triton; on a GPU the kernels run")
def test_triton_in_the_interpreter(in_the_interpreter):
    in_the_interpreter("""
import torch; from tests.ops.scan.test_bidirectional import assert_equal_to_two_scans, make_pairs
pairs = make_pairs((1, 3, 18, 2), torch.float32)
assert_equal_to_two_scans("triton", pairs, 1e-5)
pairs = make_pairs((2, 3, 5, 2), torch.float32)
pairs["B"] = (pairs["B"][0], pairs["B"][1].contiguous())  # other strides than its partner
assert_equal_to_two_scans("triton", {k: v for k, v in pairs.items() if k not in ("D", "z")}, 1e-5)
""")


@pytest.mark.gpu
@pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason="needs a CUDA device and triton")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 18, 4), (4, 100, 33, 13), (2, 64, 196, 16)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_triton_on_a_gpu(shape, dtype, tolerance):
    pairs = make_pairs(shape, dtype, device="cuda")
    assert_equal_to_two_scans("triton", pairs, tolerance)
    results = [outputs_and_gradients(bidirectional_scan, pairs, delta_softplus=True) for _ in range(2)]
    assert all(torch.equal(results[1][k], v) for k, v in results[0].items())
