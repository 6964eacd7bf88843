"""Operations with an argument for each image, against Pillow's on one image at a time, as timm calls them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import v2

from mamba.data import operations as ops

FILL = (125, 123, 114)
AFFINE = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL}


def transformed(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **AFFINE)


def solarized_add(image, added):
    return image.point([min(255, i + int(added)) if i < 128 else i for i in range(256)] * 3)


CASES = {
    "invert": (lambda i, a: ImageOps.invert(i), [0, 0]),
    "autocontrast": (lambda i, a: ImageOps.autocontrast(i), [0, 0]),
    "equalize": (lambda i, a: ImageOps.equalize(i), [0, 0]),
    "posterize": (lambda i, a: ImageOps.posterize(i, int(a)), [1, 2, 3, 4]),
    "solarize": (lambda i, a: ImageOps.solarize(i, int(a)), [0, 26, 100, 256]),
    "solarize_add": (solarized_add, [0, 55, 99, 110]),
    "color": (lambda i, a: ImageEnhance.Color(i).enhance(a), [0.1, 0.19, 1.0, 1.81]),
    "contrast": (lambda i, a: ImageEnhance.Contrast(i).enhance(a), [0.1, 0.19, 1.0, 1.81]),
    "brightness": (lambda i, a: ImageEnhance.Brightness(i).enhance(a), [0.1, 0.19, 1.0, 1.81]),
    "sharpness": (lambda i, a: ImageEnhance.Sharpness(i).enhance(a), [0.1, 0.19, 1.0, 1.81]),
    "shear_x": (lambda i, a: transformed(i, (1, a, 0, 0, 1, 0)), [-0.3, -0.21, 0.11, 0.27]),
    "shear_y": (lambda i, a: transformed(i, (1, 0, 0, a, 1, 0)), [-0.3, -0.21, 0.11, 0.27]),
    "translate_x": (lambda i, a: transformed(i, (1, 0, a, 0, 1, 0)), [-13.1, -1.0, 4.3, 12.9]),
    "translate_y": (lambda i, a: transformed(i, (1, 0, 0, 0, 1, a)), [-13.1, -1.0, 4.3, 12.9]),
    "rotate": (lambda i, a: i.rotate(a, **AFFINE), [-27.3, -9.1, 0.0, 26.5]),
}
ROUNDING = {"invert": 0, "posterize": 0, "solarize": 0, "solarize_add": 0, "equalize": 0}


def pictures(side=32):
    """Noise, a smooth ramp, a dark one and one of few colours."""
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(side), np.arange(side))[..., None] * np.array([3, 2, 1])
    few = rng.choice([40, 41, 200], (side, side, 3))
    noise = rng.integers(0, 256, (side, side, 3))
    return np.stack([noise, ramp, noise // 5, few]).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", CASES)
def test_as_pillow(name):
    """Every picture with every argument in one batch."""
    reference, arguments = CASES[name]
    jobs = [(image, a) for image in pictures() for a in arguments]
    images = torch.from_numpy(np.stack([image for image, _ in jobs])).permute(0, 3, 1, 2)
    batch = torch.tensor([float(a) for _, a in jobs])
    out = getattr(ops, name)(images.contiguous(), batch, torch.tensor(FILL, dtype=torch.float32))
    assert out.dtype == torch.uint8 and out.shape == images.shape
    for mine, (image, a) in zip(out.permute(0, 2, 3, 1).numpy(), jobs, strict=True):
        theirs = np.asarray(reference(Image.fromarray(image), a))
        apart = np.abs(mine.astype(int) - theirs)
        assert apart.max() <= ROUNDING.get(name, 1), (name, a, apart.max())
        if name not in ROUNDING:
            assert apart.mean() < 0.1, (name, a, apart.mean())


def test_the_resized_crop_is_pillows():
    """Crop, bicubic resize and mirroring, for boxes at every edge, within rounding of Pillow's."""
    boxes = torch.tensor([[0, 0, 32, 32, 0], [0, 4, 30, 28, 0], [3, 0, 28, 31, 1], [1, 2, 29, 30, 1]])
    images = torch.from_numpy(pictures()).permute(0, 3, 1, 2).contiguous()
    out = ops.resample(images, boxes).permute(0, 2, 3, 1).numpy()
    for mine, image, (y, x, h, w, mirrored) in zip(out, pictures(), boxes.tolist(), strict=True):
        crop = v2.functional.resized_crop(Image.fromarray(image), y, x, h, w, [32, 32], v2.InterpolationMode.BICUBIC)
        theirs = np.asarray(crop)[:, ::-1] if mirrored else np.asarray(crop)
        assert np.abs(mine.astype(int) - theirs).max() <= 1
    assert np.array_equal(out[0], pictures()[0])
