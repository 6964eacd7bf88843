"""Knowledge distillation (https://arxiv.org/abs/1503.02531): a trained model's outputs as a second target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba.config.schema import RunConfig
from mamba.runs.checkpoint import load_model
from mamba.runs.start import check_start


def distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float, label_smoothing: float = 0.0
) -> Tensor:
    """alpha T^2 KL(teacher || student) + (1 - alpha) CE(student, targets), the mean over a batch.

    The divergence is between both softmaxes at temperature T; T^2 keeps its gradients as large as those of the
    cross-entropy, whatever T is.

    Args:
        student: (batch, classes), logits.
        teacher: (batch, classes), logits of the same images; it gets no gradient.
        targets: (batch,) labels or (batch, classes) probabilities.
        temperature: T, above 0.
        alpha: weight of the teacher, in [0, 1].
        label_smoothing: of the cross-entropy.
    """
    soft = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.detach().float() / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    hard = F.cross_entropy(student.float(), targets, label_smoothing=label_smoothing)
    return alpha * temperature**2 * soft + (1 - alpha) * hard


class TrainingLoss:
    """What a run minimises: cross-entropy, or with `distill.teacher` the loss above.

    The teacher is frozen, in eval mode, and sees each batch once, as the student does: augmented and mixed.

    Raises:
        CheckpointError: the teacher is missing, damaged, or for other classes or another image size.
    """

    def __init__(
        self, config: RunConfig, classes: int, img_size: int, device: torch.device, amp: torch.dtype | None
    ) -> None:
        self.label_smoothing, self.distill, self.amp = config.optim.label_smoothing, config.distill, amp
        self.teacher = None
        if config.distill.teacher is not None:
            check_start(config.distill.teacher, classes, img_size, key="distill.teacher")
            self.teacher = load_model(config.distill.teacher, device=device)[0].requires_grad_(False)

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over a batch. images: as the student saw them; logits: (batch, classes); targets: (batch,) labels
        or (batch, classes) probabilities."""
        if self.teacher is None:
            return F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
        with torch.no_grad(), torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            taught = self.teacher(images)
        temperature, alpha = self.distill.temperature, self.distill.alpha
        return distillation_loss(logits, taught, targets, temperature, alpha, self.label_smoothing)
