"""Augmentation: torchvision's transforms for single images, mixup and cutmix for batches.

Each image is transformed under a seed of its own, and each batch is mixed under one of its own, so that results do
not depend on how batches are shared out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Normalise = Callable[[Tensor], Tensor]


class SampleTransform:
    """Crop, flip and a policy on the image, then erasing on the normalised image.

    RandAugment: https://arxiv.org/abs/1909.13719; AutoAugment: https://arxiv.org/abs/1805.09501; random erasing:
    https://arxiv.org/abs/1708.04896.
    """

    def __init__(self, augment: str, random_erasing: float, side: int) -> None:
        self.image = self.erase = None
        if augment == "none" and random_erasing == 0:
            return
        from torchvision.transforms import v2  # it imports torch.compile: seconds that not every process needs

        steps: list[torch.nn.Module] = []
        if augment != "none":
            steps += [v2.RandomCrop(side, padding=max(1, side // 8)), v2.RandomHorizontalFlip()]
        if augment == "randaugment":
            steps.append(v2.RandAugment(num_ops=2, magnitude=9))
        if augment == "autoaugment":
            steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))
        self.image = v2.Compose(steps) if steps else None
        self.erase = v2.RandomErasing(p=random_erasing) if random_erasing > 0 else None

    @property
    def active(self) -> bool:
        return self.image is not None or self.erase is not None

    def __call__(self, images: NDArray[np.uint8], seeds: NDArray[np.int64], normalise: Normalise) -> Tensor:
        """(n, side, side, 3) uint8 and n seeds -> (n, 3, side, side) float32. The global random state is restored."""
        if not self.active:
            return normalise(torch.from_numpy(images))
        generator = torch.default_generator  # not torch.manual_seed: that would reseed the GPUs too
        before = generator.get_state()
        try:
            if self.image is not None:
                transformed = np.empty_like(images)
                for i, seed in enumerate(seeds.tolist()):
                    generator.manual_seed(seed)
                    transformed[i] = np.asarray(self.image(Image.fromarray(images[i])))
                images = transformed
            batch = normalise(torch.from_numpy(images))
            if self.erase is not None:
                for i, seed in enumerate(seeds.tolist()):
                    generator.manual_seed(seed ^ 1)  # not the crop's numbers again
                    batch[i] = self.erase(batch[i])
            return batch
        finally:
            generator.set_state(before)


class BatchMix:
    """Mixup (https://arxiv.org/abs/1710.09412) and cutmix (https://arxiv.org/abs/1905.04899) on part of the batches.

    Partners are neighbours in the (shuffled) batch: 0 with 1, 2 with 3, ..., an odd last image with itself. Unlike a
    permutation of the whole batch this gives the same pairs however the batch is shared out over workers.
    """

    def __init__(self, mixup: float, cutmix: float, prob: float, num_classes: int, seed: int) -> None:
        self.alphas = {"mixup": mixup, "cutmix": cutmix}
        self.kinds = [kind for kind, alpha in self.alphas.items() if alpha > 0]
        self.prob, self.num_classes, self.seed = prob, num_classes, seed

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """(n, c, side, side) and (n,) -> images, and targets (n, num_classes) as probabilities."""
        targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        rng = np.random.default_rng([self.seed, epoch, step, 1])
        if not self.kinds or rng.random() >= self.prob:
            return images, targets
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        keep = float(rng.beta(self.alphas[kind], self.alphas[kind]))
        partner = _neighbour(len(images), images.device)
        if kind == "mixup":
            images = keep * images + (1 - keep) * images[partner]
        else:
            side = images.shape[-1]
            half = 0.5 * side * (1 - keep) ** 0.5
            cy, cx = rng.integers(side, size=2).tolist()
            y0, y1, x0, x1 = (int(np.clip(round(v), 0, side)) for v in (cy - half, cy + half, cx - half, cx + half))
            images = images.clone()
            images[:, :, y0:y1, x0:x1] = images[partner][:, :, y0:y1, x0:x1]
            keep = 1 - (y1 - y0) * (x1 - x0) / side**2  # the area that was really kept
        return images, keep * targets + (1 - keep) * targets[partner]


def _neighbour(n: int, device: torch.device) -> Tensor:
    """0 <-> 1, 2 <-> 3, ...; an odd last one stays."""
    return (torch.arange(n, device=device) ^ 1).clamp_max(n - 1)


def tta_views(images: Tensor, views: int) -> list[Tensor]:
    """The views averaged in test-time augmentation: the image, its mirror image, then both shifted by an eighth of
    the side right, left, down and up (edges repeated). (n, c, side, side) -> that many tensors of the same shape."""
    shift = max(1, images.shape[-1] // 8)
    result = [images, images.flip(-1)]
    for dy, dx in ((0, shift), (0, -shift), (shift, 0), (-shift, 0)):
        if len(result) >= views:
            break
        padded = F.pad(images, (shift, shift, shift, shift), mode="replicate")
        side = images.shape[-1]
        shifted = padded[:, :, shift - dy : shift - dy + side, shift - dx : shift - dx + side]
        result += [shifted, shifted.flip(-1)]
    return result[:views]
