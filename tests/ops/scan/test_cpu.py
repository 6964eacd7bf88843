"""The C++ scan: its arithmetic in float32, its operator, and how it is built, kept and done without."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.one_channel_scan import one_channel_scan
from mamba.cache import cache_folder
from mamba.ops.scan import cpu, selective_scan
from tests.ops.scan.test_selective_scan import OPTIONS, assert_equal_to_reference, make_inputs, run_with_gradients

ROOT = Path(__file__).parents[3]
ALL = {"delta_softplus": True, "return_last_state": True}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SCAN = """
import warnings; warnings.simplefilter("error")
import torch; from mamba.ops.scan import cpu
torch.set_num_threads(1)
x = torch.ones(1, 2, 3)
y = cpu.selective_scan_cpu(x, x, -torch.ones(2, 4), torch.ones(1, 4, 3), torch.ones(1, 4, 3))
assert cpu.available() and torch.isfinite(y).all()
"""

needs_kernel = pytest.mark.skipif(not cpu.available(), reason="the C++ scan cannot be built here")


@pytest.fixture
def fresh(monkeypatch):
    """As in a process that has not tried to build yet."""
    monkeypatch.setattr(cpu, "_tried", False)
    monkeypatch.setattr(cpu, "_library", None)


# ---------------------------------------------------------------- the arithmetic


@needs_kernel
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=len(OPTIONS))))
def test_every_option_in_float32(options):
    """Two chunks, a vector that is not full. Small steps: without softplus some are negative."""
    on = dict(zip(OPTIONS, options, strict=True))
    tensors = {k: v for k, v in make_inputs(d_inner=21, length=19, dtype=torch.float32).items() if on.get(k, True)}
    tensors["delta"] = tensors["delta"] * 0.1
    flags = {k: on[k] for k in ("delta_softplus", "return_last_state")}
    assert_equal_to_reference("cpu", tensors, flags, 1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 300, 33, 13), (3, 40, 17, 130), (40, 33, 48, 3), (2, 17, 64, 16)], ids=str)
def test_shapes_with_several_tasks(shape, dtype):
    channels_last = shape[0] > 2
    assert_equal_to_reference("cpu", make_inputs(*shape, dtype, channels_last=channels_last), ALL, TOLERANCE[dtype])


@needs_kernel
@pytest.mark.parametrize("gradients", [False, True])
def test_what_the_kernel_is_told(monkeypatch, gradients):
    """torch's threads; checkpoints where there will be gradients, so that forward runs once, and else none."""
    kernel, told = cpu._kernel(), []

    class Spy:
        def __getattr__(self, name):
            def call(scans, count):
                told.append((name.rpartition("_")[2], scans[0].threads, scans[0].states is not None))
                getattr(kernel, name)(scans, count)

            return call

    monkeypatch.setattr(cpu, "_kernel", Spy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    tensors = [t.requires_grad_(gradients) for t in make_inputs(length=19, dtype=torch.float32).values()]
    y = cpu.selective_scan_cpu(*tensors)
    if gradients:
        y.sum().backward()
    assert told == [("forward", 2, gradients), ("backward", 2, True)][: 1 + gradients]
    with torch.no_grad():
        cpu.selective_scan_cpu(*tensors)
    assert told[-1] == ("forward", 2, False)


@needs_kernel
def test_long_sequence():
    """63 chunks. The oracle is two_phase in float64: the reference would take seconds."""
    tensors = make_inputs(1, 20, 1000, 8, torch.float32)
    got, names = run_with_gradients("cpu", tensors, ALL)
    want, _ = run_with_gradients("two_phase", {k: v.double() for k, v in tensors.items()}, ALL)
    for name, a, b in zip(names, got, want, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm(), name


@needs_kernel
def test_strides_and_mixed_types():
    """Every second channel of bfloat16 sequences, parts of one projection, float32 parameters, as autocast gives."""
    wide = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(0)).bfloat16().transpose(1, 2)
    tensors = make_inputs(d_inner=10, length=9, dtype=torch.float32)
    tensors |= {"u": wide[:, 0:20:2], "delta": wide[:, 20:30], "B": wide[:, 30:34], "C": wide[:, 34:42:2]}
    assert_equal_to_reference("cpu", tensors, ALL, 1e-2)


@needs_kernel
def test_extreme_values():
    """Steps from 1e-9 to 1e4: exponents underflow to 0 and softplus stays accurate; a NaN is not lost."""
    delta = torch.linspace(-20.0, 30.0, 64).repeat(1, 3, 1)
    delta[0, 2, -1] = 1e4
    tensors = make_inputs(1, 3, 64, 4, torch.float32) | {"delta": delta}
    assert_equal_to_reference("cpu", tensors, ALL, 1e-5)
    tensors["delta"][0, 1, 30] = torch.nan
    out = selective_scan(**tensors, delta_softplus=True, backend="cpu")
    assert out[0, 1, 30:].isnan().all()
    assert out[0, 1, :30].isfinite().all() and out[0, [0, 2]].isfinite().all()


@needs_kernel
def test_threads_do_not_change_the_result():
    tensors = make_inputs(3, 200, 40, 16, torch.float32, channels_last=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(run_with_gradients("cpu", tensors, ALL)[0])
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_auto_takes_it_and_float64_does_not():
    tensors = make_inputs(dtype=torch.float32)
    assert torch.equal(selective_scan(**tensors), selective_scan(**tensors, backend="cpu"))
    tensors = make_inputs()
    assert torch.equal(selective_scan(**tensors), selective_scan(**tensors, backend="two_phase"))


# ---------------------------------------------------------------- the operator


@needs_kernel
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_contract(keep, dtype):
    tensors = [v.requires_grad_() for v in make_inputs(2, 20, 18, 3, dtype, channels_last=True).values()]
    torch.library.opcheck(cpu._selective_scan, (tensors, [True] * 8, True, keep, True))
    first = tensors[:5]  # without D, z and the bias
    first[1] = tensors[1].detach().abs().requires_grad_()
    second = [t.detach().clone().requires_grad_() for t in first]
    given = ([True] * 5 + [False] * 3) * 2
    torch.library.opcheck(cpu._selective_scan, ([*first, *second], given, False, keep, False))


@needs_kernel
def test_compiles_in_one_graph_with_autocast(fresh):
    """Also when the kernel is loaded while torch.compile traces."""
    tensors = make_inputs(2, 20, 18, 3, torch.float32, channels_last=True)
    project = torch.nn.Linear(20, 40)

    def layer(tensors):
        with torch.autocast("cpu", torch.bfloat16):
            u, z = project(tensors["u"].transpose(1, 2)).transpose(1, 2).chunk(2, dim=1)
            return selective_scan(**{**tensors, "u": u, "z": z}, delta_softplus=True).float().square().mean()

    leaves = {k: v.requires_grad_() for k, v in tensors.items() if k != "z"}
    parameters = [*leaves.values(), *project.parameters()]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(leaves)
    got = torch.autograd.grad(compiled, parameters)
    plain = layer(leaves)
    torch.testing.assert_close(compiled, plain)
    for a, b in zip(got, torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(a, b)


@needs_kernel
def test_baseline_of_the_benchmark():
    """It must do the same work to be compared with."""
    tensors = make_inputs(2, 5, 19, 4, torch.float32, channels_last=True)
    want = selective_scan(**{k: v.double() for k, v in tensors.items()}, delta_softplus=True, backend="reference")
    assert (one_channel_scan(**tensors).double() - want).norm() <= 1e-5 * want.norm()


@needs_kernel
def test_faster_than_the_reference():
    """A ratio within one run; measured 13 to 27, see docs/cpu-scan-notes.md."""
    tensors = make_inputs(4, 96, 32, 16, torch.float32, channels_last=True)
    seconds = {"cpu": [], "reference": []}
    for _ in range(5):
        for backend, times in seconds.items():
            start = time.perf_counter()
            selective_scan(**tensors, delta_softplus=True, backend=backend)
            times.append(time.perf_counter() - start)
    assert min(seconds["reference"]) > 4 * min(seconds["cpu"])


# ---------------------------------------------------------------- building


def test_without_a_compiler_one_warning_and_two_phase(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    tensors = make_inputs(dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler found"):
        first = selective_scan(**tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = selective_scan(**tensors)
    want = selective_scan(**tensors, backend="two_phase")
    assert torch.equal(first, want) and torch.equal(second, want)


def test_failed_build_says_what_the_compiler_said(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'error: no such luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MAMBA_FORGE_CACHE", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="no such luck"):
        assert not cpu.available()
    assert not list(tmp_path.glob("*.so"))


@needs_kernel
def test_processes_that_build_at_once_then_reuse(tmp_path, fresh, monkeypatch):
    """Two processes start on an empty cache: one library, no leftovers. A third use needs no compilation."""
    environment = {**os.environ, "MAMBA_FORGE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", SCAN]
    running = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".so"]

    monkeypatch.setenv("MAMBA_FORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_build", lambda *_: pytest.fail("built again"))
    assert cpu.available()


@needs_kernel
def test_broken_library_is_built_again(tmp_path, fresh, monkeypatch):
    monkeypatch.setenv("MAMBA_FORGE_CACHE", str(tmp_path / "good"))
    assert cpu.available()
    (good,) = tmp_path.glob("good/*.so")
    broken = tmp_path / "broken" / good.name
    broken.parent.mkdir()
    broken.write_bytes(b"half a library")
    monkeypatch.setenv("MAMBA_FORGE_CACHE", str(broken.parent))
    monkeypatch.setattr(cpu, "_tried", False)
    assert cpu.available()
    assert broken.stat().st_size > 1000


def test_cache_that_cannot_be_written_falls_back(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBA_FORGE_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAMBA_FORGE_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cpu.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache_folder().parent == tmp_path
