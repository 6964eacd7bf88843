"""What the Triton kernels share: element functions in few instructions, and the device that they are launched on.

exp2 and 1 / x are the hardware's approximations (2 ulp, denormals flushed). On AMD, and in Triton's interpreter, the
line of PTX is replaced; only NVIDIA has been measured.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
NVIDIA = not INTERPRETED and torch.version.hip is None

_PTX = tl.constexpr(NVIDIA)
LOG2E = tl.constexpr(1.4426950408889634)


def device_of(t: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1, in one instruction where there is one (1 ulp)."""
    if _PTX:
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + exp(-x))


@triton.jit
def softplus(x):
    """log(1 + e^x) to float32 accuracy also where e^x is tiny: max(x, 0) + e P(e), e = e^-|x|.

    e P(e) is log(1 + e) on [0, 1] with a relative error of 5e-9; the C++ scan has the same polynomial.
    """
    e = exp(-tl.abs(x))
    p = tl.fma(e, -3.2440256327e-03, 1.9851464778e-02)
    p = tl.fma(e, p, -5.6959543377e-02)
    p = tl.fma(e, p, 1.0603655875e-01)
    p = tl.fma(e, p, -1.5305593610e-01)
    p = tl.fma(e, p, 1.9675940275e-01)
    p = tl.fma(e, p, -2.4954134226e-01)
    p = tl.fma(e, p, 3.3329963684e-01)
    p = tl.fma(e, p, -4.9999901652e-01)
    p = tl.fma(e, p, 1.0)
    return tl.fma(e, p, tl.maximum(x, 0.0))
