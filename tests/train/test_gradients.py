"""Gradients summed over ranks during backward: what DDP would give, views of one tensor, missing ones left out."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from mamba.train import gradients as parallel
from mamba.train.distributed import Process
from mamba.train.gradients import FlatGradients


class Twin(Process):
    """Two ranks of which the other one has three times this one's gradients. Sums end when they are waited for."""

    def begin_sum(self, values):
        log = self.__dict__.setdefault("log", [])
        log.append(("begin", values.numel()))

        class Sum:
            def wait(self):
                log.append(("wait", values.numel()))
                values.mul_(4)

        return Sum()


def backward(model, flat=None):
    model.zero_grad(set_to_none=True)
    with flat.micro_batch(last=True) if flat else nullcontext():
        model[0](torch.randn(4, 5)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bucket", [1, 100, 2**22])
def test_sum_of_two_ranks(monkeypatch, bucket):
    monkeypatch.setattr(parallel, "BUCKET", bucket)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    flat = FlatGradients(model, Twin(world_size=2))
    for _ in range(2):  # the views are used again
        own = backward(model, flat)
        flat.wait()
        for name, p in model.named_parameters():
            if name in own:
                torch.testing.assert_close(p.grad, 4 * own[name])
                assert p.grad.untyped_storage().data_ptr() == flat.flat.untyped_storage().data_ptr()
                assert p.grad.stride() == p.stride()
            else:
                assert p.grad is None
    assert set(own) == {"0.weight", "0.bias"}


def test_buckets_go_out_during_backward(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 1)  # a bucket for each parameter
    model = nn.Sequential(nn.Linear(5, 3))
    flat = FlatGradients(model, Twin(world_size=2))
    backward(model, flat)
    assert flat.process.log == [("begin", 64), ("begin", 64)]  # before `wait`
    flat.wait()
    assert [what for what, _ in flat.process.log] == ["begin", "begin", "wait", "wait"]


def test_only_the_expected_backward_counts():
    """Micro-batches before the last one are this rank's own."""
    model = nn.Sequential(nn.Linear(5, 3))
    flat = FlatGradients(model, Twin(world_size=2))
    with flat.micro_batch(last=False):
        model[0](torch.ones(1, 5)).sum().backward()
    assert not hasattr(flat.process, "log")
    with flat.micro_batch(last=True):
        model[0](torch.ones(1, 5)).sum().backward()
    flat.wait()
    torch.testing.assert_close(model[0].bias.grad, torch.full((3,), 8.0))
    model.zero_grad(set_to_none=True)
    model[0](torch.ones(1, 5)).sum().backward()
    assert len(flat.process.log) == 2


def test_a_bucket_that_stayed_incomplete_does_not_count_on():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))  # the second has no gradients
    flat = FlatGradients(model, Twin(world_size=2))
    backward(model, flat)
    flat.wait()
    log = list(flat.process.log)
    for _ in range(2):
        backward(model)
    assert flat.process.log == log


def test_a_backward_that_failed_leaves_nothing(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 1)
    model = nn.Sequential(nn.Linear(5, 3))
    flat = FlatGradients(model, Twin(world_size=2))
    backward(model, flat)  # and no `wait`
    own = backward(model, flat)
    flat.wait()
    torch.testing.assert_close(model[0].weight.grad, 4 * own["0.weight"])


def test_the_last_parameters_go_first_and_keep_nothing_alive():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (1, 2)]
    flat = FlatGradients(nn.ParameterList(parameters), Process())
    assert flat.parameters == parameters[::-1]
    alive = weakref.ref(flat)
    del flat
    assert alive() is None


@pytest.mark.parametrize("sizes", [(1,), (64, 65)])
def test_views_do_not_overlap(sizes):
    parameters = [nn.Parameter(torch.zeros(n)) for n in sizes]
    flat = FlatGradients(nn.ParameterList(parameters), Process())
    for i, view in enumerate(flat.views):
        view.fill_(i + 1)
    expected = [p.numel() * (i + 1) for i, p in enumerate(flat.parameters)]
    assert [float(v.sum()) for v in flat.views] == expected
