"""B and C in groups and constant over time: every backend against the reference, that against plain scans."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from mamba.ops.scan import BACKENDS, bidirectional_scan, selective_scan
from tests.ops.scan.test_bidirectional import HAS_TRITON, outputs_and_gradients
from tests.ops.scan.test_selective_scan import FAST, assert_equal_to_reference, make_inputs

ROOT = Path(__file__).parents[3]
FORMS = ("plain", "one group", "groups", "single channels", "constant")
COMBINATIONS = [forms for forms in itertools.product(FORMS, FORMS) if forms != ("plain", "plain")]
FLAGS = {"delta_softplus": True, "return_last_state": True}


def in_form(form, plain, d_inner, seed):
    """A tensor of this form in place of a plain one, (batch, d_state, length)."""
    batch, d_state, length = plain.shape
    g = torch.Generator().manual_seed(seed)
    groups = {"one group": 1, "groups": 2, "single channels": d_inner}
    if form == "plain":
        return plain
    shape = (d_inner, d_state) if form == "constant" else (batch, groups[form], d_state, length)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(plain.dtype)


def inputs_in(forms, dtype=torch.float64, d_inner=6, length=7, d_state=3, seed=0):
    tensors = make_inputs(2, d_inner, length, d_state, dtype, seed, channels_last=True)
    for i, name in enumerate("BC"):
        tensors[name] = in_form(forms[i], tensors[name], d_inner, 10 * seed + i)
    return tensors


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("forms", COMBINATIONS, ids=", ".join)
def test_every_form_in_every_backend(backend, forms):
    """Outputs, last states and every gradient."""
    assert_equal_to_reference(backend, inputs_in(forms), FLAGS, 1e-12)
    few = {k: v for k, v in inputs_in(forms, torch.float32).items() if k not in ("D", "z", "delta_bias")}
    assert_equal_to_reference(backend, few, {}, 1e-5)


@pytest.mark.parametrize("forms", COMBINATIONS, ids=", ".join)
def test_the_reference_reads_forms_as_mamba_ssm_does(forms):
    """Channel by channel, each a plain scan of its own: channel d is in group d // (d_inner / groups)."""
    t = inputs_in(forms)

    def of_channel(x, d):
        if x.ndim == 2:
            return x[d][None, :, None].expand(2, -1, 7)
        return x if x.ndim == 3 else x[:, d // (6 // x.shape[1])]

    got, last = selective_scan(**t, **FLAGS, backend="reference")
    for d in range(6):
        one = {k: t[k][:, d : d + 1] for k in ("u", "delta", "z")} | {
            k: t[k][d : d + 1] for k in ("A", "D", "delta_bias")
        }
        one |= {k: of_channel(t[k], d) for k in "BC"}
        want, want_last = selective_scan(**one, **FLAGS, backend="reference")
        torch.testing.assert_close(got[:, d : d + 1], want)
        torch.testing.assert_close(last[:, d : d + 1], want_last)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "one, two", [("groups", "groups"), ("plain", "single channels"), ("constant", "constant"), ("groups", "constant")]
)
def test_both_directions(backend, one, two):
    pairs = {
        k: a if k == "z" else (a, b)
        for (k, a), b in zip(inputs_in((one, two)).items(), inputs_in((two, one), seed=1).values(), strict=True)
    }
    got = outputs_and_gradients(bidirectional_scan, pairs, delta_softplus=True, backend=backend)
    want = outputs_and_gradients(bidirectional_scan, pairs, delta_softplus=True, backend="reference")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)
    # and the reference is two scans, the second flipped, by its definition
    second = {k: pair[1] if isinstance(pair, tuple) else pair for k, pair in pairs.items()}
    second = {k: t.flip(-1) if t.ndim > 2 else t for k, t in second.items()}
    flipped = selective_scan(**second, delta_softplus=True, backend="reference").flip(-1)
    torch.testing.assert_close(want["out reversed"], flipped)


def test_it_compiles_in_one_graph():
    tensors = inputs_in(("groups", "plain"), torch.float32)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**tensors), selective_scan(**tensors))


@pytest.mark.parametrize(
    "name, shape",
    [("B", (2, 4, 3, 7)), ("C", (2, 0, 3, 7)), ("B", (2, 2, 4, 7)), ("C", (5, 3)), ("B", (6, 4)), ("C", (3,))],
)
def test_what_does_not_fit_is_refused(name, shape):
    tensors = inputs_in(("plain", "plain"), torch.float32) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"^{name} must be"):
        selective_scan(**tensors)


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="needs triton; on a GPU the kernels run")
def test_triton_in_the_interpreter(in_the_interpreter):
    in_the_interpreter("""
import torch
from tests.ops.scan.test_forms import FLAGS, inputs_in
from tests.ops.scan.test_selective_scan import assert_equal_to_reference
for forms in (("groups", "plain"), ("groups", "constant")):
    assert_equal_to_reference("triton", inputs_in(forms, torch.float32, 4, 3, 2), FLAGS, 1e-5)
""")


@pytest.mark.gpu
@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
@pytest.mark.parametrize("forms", COMBINATIONS, ids=", ".join)
def test_triton_on_a_gpu(forms):
    tensors = {k: v.cuda() for k, v in inputs_in(forms, torch.float32, 24, 33, 5).items()}
    leaves = [{k: v.to(kind).requires_grad_() for k, v in tensors.items()} for kind in (torch.float32, torch.float64)]
    results = []
    for scan, backend in zip(leaves, ("triton", "reference"), strict=True):
        out, last = selective_scan(**scan, **FLAGS, backend=backend)
        grads = torch.autograd.grad(out.square().sum() + last.square().sum(), list(scan.values()))
        results.append([t.double() for t in (out, last, *grads)])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()
