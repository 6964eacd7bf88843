"""A process that serves many trials ends each as it began it: what one changes for the whole process is put back."""

from __future__ import annotations

import gc
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

CONFIGS = ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config", "torch.fx.experimental._config")
"""Modules of torch's settings; those of compiling are imported by the first trial that compiles."""


@contextmanager
def restored(threads: int, trains: bool = True) -> Iterator[None]:
    """Run a trial on so many CPU threads; afterwards its process has the random states, the settings of torch, cuDNN
    and torch.compile, the warnings, the environment and the GPU memory that it had before. `trains`: also collect the
    garbage of a trainer, which takes longer than a measurement."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    settings, environment, own_threads = _settings(), dict(os.environ), torch.get_num_threads()
    compiling = {name: _changed(sys.modules[name]) for name in CONFIGS if name in sys.modules}
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_num_threads(own_threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        _apply(settings)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # its graphs were made with the settings of the trial
        for name in CONFIGS:
            if name in sys.modules:
                _restore(sys.modules[name], compiling.get(name, {}))
        if trains:
            gc.collect()
        if torch.cuda.is_initialized():
            if cuda is not None:
                torch.cuda.set_rng_state_all(cuda)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _settings() -> dict[str, Any]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "reduced": (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction),
    }


def _apply(settings: dict[str, Any]) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    torch.set_grad_enabled(settings["grad"])
    torch.set_default_dtype(settings["dtype"])
    torch.use_deterministic_algorithms(settings["deterministic"], warn_only=settings["warn_only"])
    if torch.get_float32_matmul_precision() != settings["precision"]:
        torch.set_float32_matmul_precision(settings["precision"])
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = settings["cudnn"]
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = settings["reduced"]


def _changed(module: Any) -> dict[str, Any]:
    """The settings of a module of torch's that are not as by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are deprecated
        return {n: getattr(module, n) for n, e in module._config.items() if not e.alias and not module._is_default(n)}


def _restore(module: Any, before: dict[str, Any]) -> None:
    after = _changed(module)
    for name in before.keys() | after.keys():
        wanted = before.get(name, module._config[name].default)
        if name not in after or after[name] != wanted:
            setattr(module, name, wanted)
