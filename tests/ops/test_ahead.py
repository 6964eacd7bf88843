"""Every Triton kernel, compiled ahead for GPUs that are not there: sm_80 (A100, A800) and sm_90 (H100, H200).

What is launched is only compiled, for the shapes and types of real training, and its registers and shared memory are
read from the machine code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mamba.ops.conv import HAS_TRITON

ROOT = Path(__file__).parents[2]
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of a block, at most (CUDA C++ Programming Guide)
MOST_SPILLED = 160  # bytes of a thread; the two-way scan has 128 on sm_90
SCRIPT = """
import json, re, subprocess, sys, tempfile
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

arch = int(sys.argv[1])
target = GPUTarget("cuda", arch, 32)
driver.set_active(SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_active_torch_device=lambda: torch.device("cpu"), map_python_to_cpp_type=lambda kind: "int",
))
found = {}

def compile_only(kernel, grid):
    def launch(*args, **options):
        made = kernel.run(*args, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            said = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", said).groups()
        old = found.get(kernel.fn.__name__, (0, 0, 0))
        new = (int(registers), int(stack), made.metadata.shared)
        found[kernel.fn.__name__] = [max(pair) for pair in zip(old, new)]
    return launch

JITFunction.__getitem__ = compile_only

from mamba.ops.conv import triton as conv
from mamba.ops.mixer import triton as mixer
from mamba.ops.mlp import triton as mlp
from mamba.ops.scan import triton as scan
from mamba.ops.scan.inputs import ScanInputs, pack
from mamba.ops.update import make_update

scan._has_tf32, scan._schedulers = lambda device: True, lambda device: 4 * 108
zeros = torch.zeros

def zeros16(*size):
    return torch.zeros(*size, dtype=torch.bfloat16)

for batch, length, channels, d_inner, hidden in [(256, 225, 128, 256, 512), (128, 64, 192, 384, 768)]:
    x, xz = zeros16(batch, length, d_inner), zeros16(batch, length, 2 * d_inner)
    taps, bias, A, project = zeros(d_inner, 1, 4), zeros(d_inner), zeros(d_inner, 16), zeros16(32 + d_inner, d_inner)
    conv._conv_backward(conv._conv(xz[..., :d_inner], taps, bias, False), xz[..., :d_inner], taps, bias, False)
    y, *kept = mixer._mixer(xz, taps, bias, project, A, bias, bias, True)
    mixer._mixer_backward(y, xz, taps, bias, project, A, bias, bias, *kept)
    B = zeros16(batch, 16, length)
    one = ScanInputs(x.transpose(1, 2), x.transpose(1, 2), A, B, B, bias, xz[..., d_inner:].transpose(1, 2), bias)
    for scans in ((one,), (one, one)):
        tensors, given = pack(*scans)
        y, y2, _, *kept = scan._selective_scan(tensors, given, True, True, False)
        scan._selective_scan_backward(y, y2 if len(scans) == 2 else None, None, tensors, given, kept, True)
    x, up, down = zeros16(batch * length, channels), zeros16(hidden, channels), zeros16(channels, hidden)
    y, a = mlp._mlp(x, up, zeros(hidden), down, zeros(channels))
    mlp._mlp_backward(y, x, a, up, zeros(hidden), down, zeros(channels))
weight = torch.nn.Parameter(zeros(64, 48))
weight.grad = zeros(64, 48)
update = make_update(torch.optim.AdamW([{"params": [weight], "lr_scale": 1.0}]), None, 1.0, True)
update.apply(torch.tensor(1e-3), update.norm(), torch.tensor(True))
print(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_fits(arch, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(arch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    sources = [path.read_text() for path in (ROOT / "mamba").rglob("*.py") if "@triton.jit" in path.read_text()]
    kernels = {line[4:].split("(")[0] for text in sources for line in text.splitlines() if line.startswith("def _")
               and line.split("(")[0].endswith("_kernel")}  # fmt: skip
    assert set(found) == kernels
    for name, (registers, spilled, shared) in found.items():
        fits = registers <= 255 and spilled <= MOST_SPILLED and shared <= SHARED[arch]
        assert fits, (name, registers, spilled, shared)
