"""Distillation: the loss by hand, and what the teacher sees and how."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mamba.errors import CheckpointError
from mamba.runs.checkpoint import load_model, save_checkpoint
from mamba.train import trainer as training
from mamba.train.distributed import local_process
from mamba.train.loss import TrainingLoss, distillation_loss
from mamba.train.trainer import fit
from pruning import prune_mamba_structured


def softmax(row, temperature):
    powers = [math.exp(x / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def by_hand(student, teacher, targets, temperature, alpha, smoothing):
    """Targets as probabilities; lists of lists."""
    total = 0.0
    for s, t, y in zip(student, teacher, targets, strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        smooth = [(1 - smoothing) * v + smoothing / len(y) for v in y]
        entropy = -sum(v * math.log(b) for v, b in zip(smooth, softmax(s, 1), strict=True))
        total += alpha * temperature**2 * divergence + (1 - alpha) * entropy
    return total / len(student)


@pytest.mark.parametrize("temperature, alpha, smoothing", [(4.0, 0.5, 0.0), (1.0, 0.3, 0.1), (2.5, 1.0, 0.1)])
def test_the_loss_by_hand(temperature, alpha, smoothing):
    student = [[2.0, -1.0, 0.3], [0.1, 0.2, -3.0]]
    teacher = [[1.5, 0.4, -0.7], [-1.0, 2.0, 0.0]]
    labels, mixed = [[1, 0, 0], [0, 0, 1]], [[0.7, 0.3, 0.0], [0.2, 0.0, 0.8]]
    s, t = torch.tensor(student), torch.tensor(teacher)
    got = distillation_loss(s, t, torch.tensor([0, 2]), temperature, alpha, smoothing)
    assert float(got) == pytest.approx(by_hand(student, teacher, labels, temperature, alpha, smoothing), rel=1e-5)
    got = distillation_loss(s, t, torch.tensor(mixed), temperature, alpha, smoothing)
    assert float(got) == pytest.approx(by_hand(student, teacher, mixed, temperature, alpha, smoothing), rel=1e-5)


def test_a_student_like_its_teacher_loses_nothing_to_it():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = distillation_loss(logits, logits, torch.tensor([0, 1, 2, 0]), 4.0, 1.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(float(loss)) < 1e-6 and float(gradient.abs().max()) < 1e-6


def test_the_teacher_gets_no_gradient():
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = distillation_loss(student, teacher, torch.tensor([0, 1, 2, 0]), 4.0, 0.5)
    mine, its = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    assert its is None and float(mine.abs().max()) > 0


@pytest.fixture
def teacher(small_fit, tmp_path):
    """The folder of a trained run."""
    small_fit("teacher", optim__epochs=1)
    return tmp_path / "teacher"


def test_the_teacher_is_frozen_in_eval_mode_and_sees_each_mixed_batch_once(teacher, small_config, small_data, tmp_path):
    config = small_config(
        distill__teacher=teacher, optim__epochs=1, data__mixup=0.8, data__mix_prob=1.0, optim__amp="bf16",
        optim__accumulate=2, data__batch_size=24, optim__grad_clip=None,
    )  # fmt: skip
    run = training.Trainer(config, local_process(), tmp_path / "student", small_data)
    teacher_model = run.optimizer_step.loss.teacher
    before = {name: t.clone() for name, t in teacher_model.state_dict().items()}
    seen, steps = [], []
    teacher_model.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0], module.training, output.dtype, output.requires_grad))
    )
    plain_step = run.optimizer_step.take
    run.optimizer_step.take = lambda batches: (steps.append(batches), plain_step(batches))[1]
    try:
        run.run()
    finally:
        run.close()
    given = [images for micro_batches in steps for images, _ in micro_batches]
    assert len(steps) == 3 and len(seen) == len(given) == 6
    for (images, in_training, dtype, has_gradient), mixed in zip(seen, given, strict=True):
        assert images is mixed and not in_training and dtype == torch.bfloat16 and not has_gradient
    assert all(bool(((targets > 0) & (targets < 1)).any()) for _, targets in steps[0])
    assert all(torch.equal(t, before[name]) for name, t in teacher_model.state_dict().items())
    ours = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in ours or p.requires_grad for p in teacher_model.parameters())


def test_the_training_loss_is_the_formula(teacher, small_config):
    config = small_config(distill__teacher=teacher, distill__temperature=3.0, distill__alpha=0.25)
    loss = TrainingLoss(config, 3, 8, torch.device("cpu"), None)
    images, logits = torch.randn(5, 3, 8, 8), torch.randn(5, 3)
    targets = torch.tensor([0, 1, 2, 1, 0])
    taught = load_model(teacher)[0](images)
    expected = distillation_loss(logits, taught, targets, 3.0, 0.25, config.optim.label_smoothing)
    torch.testing.assert_close(loss(images, logits, targets), expected)
    plain = TrainingLoss(small_config(), 3, 8, torch.device("cpu"), None)
    torch.testing.assert_close(
        plain(images, logits, targets), F.cross_entropy(logits, targets, label_smoothing=config.optim.label_smoothing)
    )


def test_a_pruned_student_learns_from_its_dense_teacher(teacher, small_config, small_data, tmp_path):
    dense, description = load_model(teacher)
    pruned = prune_mamba_structured(dense, {"mlp": 0.5, "linear_in": 0.25})
    save_checkpoint(tmp_path / "pruned", pruned, None, {**description, "weights": "raw"}, None)
    config = small_config(model__checkpoint=tmp_path / "pruned", distill__teacher=teacher, optim__epochs=1)
    result = fit(config, local_process(), tmp_path / "tuned", small_data)
    assert result["status"] == "finished"
    assert load_model(tmp_path / "tuned")[0].architecture.blocks == pruned.architecture.blocks


def test_teachers_that_do_not_fit(teacher, small_config, tmp_path):
    config = small_config(distill__teacher=teacher)
    with pytest.raises(CheckpointError, match=r"distill.teacher .* is for 3 classes at 8 pixels, and the data has 10"):
        TrainingLoss(config, 10, 8, torch.device("cpu"), None)
    with pytest.raises(CheckpointError, match="distill.teacher: there is no .*nothing"):
        TrainingLoss(small_config(distill__teacher=tmp_path / "nothing"), 3, 8, torch.device("cpu"), None)
