"""Image operations for a batch in which every image has an argument of its own.

Each is timm's (https://github.com/huggingface/pytorch-image-models), which calls Pillow for one image at a time;
results differ from Pillow's by rounding (tests/data/test_operations.py compares them). Arguments are what Pillow is
given: bits, thresholds, factors, pixels, degrees. Images are (n, 3, side, side) uint8 on any device, arguments (n,)
float. Constants are no tensors: making one on a GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images, argument, fill) -> images. `fill`: (3,) float in 0..255, the colour outside of the image."""


def each(argument: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1)."""
    return argument[:, None, None, None]


def invert(images: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    return 255 - images


def autocontrast(images: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    """Each channel stretched to 0..255."""
    low, high = (images.amin((2, 3), True).float(), images.amax((2, 3), True).float())
    flat = high <= low
    scale = torch.where(flat, 1.0, 255 / (high - low))
    low = torch.where(flat, 0.0, low)
    return ((images - low) * scale).clamp(0, 255).byte()


def equalize(images: Tensor, _: Tensor, fill: Tensor) -> Tensor:
    """Each channel's histogram made flat: a look-up table from its cumulative sum, as Pillow's ImageOps.equalize."""
    n, channels, height, width = images.shape
    flat = images.reshape(n * channels, height * width).long()
    histogram = torch.zeros(n * channels, 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(1, flat, torch.ones_like(flat))
    last = 255 - (histogram.flip(1) > 0).long().argmax(1, keepdim=True)
    step = (height * width - histogram.gather(1, last)) // 255
    before = histogram.cumsum(1) - histogram
    table = ((before + step // 2) // step.clamp_min(1)).clamp_max(255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    return table.gather(1, flat).view_as(images).byte()


def posterize(images: Tensor, bits: Tensor, fill: Tensor) -> Tensor:
    """Keep this many of the highest bits, 0 to 8."""
    step = 2 ** (8 - bits.long())
    return images - (images % each(step)).byte()


def solarize(images: Tensor, threshold: Tensor, fill: Tensor) -> Tensor:
    """Invert what is at least the threshold."""
    return torch.where(images >= each(threshold), 255 - images, images)


def solarize_add(images: Tensor, added: Tensor, fill: Tensor) -> Tensor:
    """Brighten what is below 128."""
    brighter = (images + each(added)).clamp_max(255).byte()
    return torch.where(images < 128, brighter, images)


def grey(images: Tensor) -> Tensor:
    """(n, 1, side, side) float luma, whole numbers, as Pillow's mode L."""
    red, green, blue = images.float().split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor()


def blend(images: Tensor, degenerate: Tensor, factor: Tensor) -> Tensor:
    """degenerate at factor 0, the image at 1, more of what distinguishes it above."""
    return torch.lerp(degenerate, images.float(), each(factor)).clamp(0, 255).byte()


def color(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    return blend(images, grey(images).expand(-1, 3, -1, -1), factor)


def contrast(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    mean = (grey(images).mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return blend(images, mean.expand(images.shape), factor)


def brightness(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    return blend(images, images.new_zeros((), dtype=torch.float32).expand(images.shape), factor)


def sharpness(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Against a 3x3 blur in which the middle counts five times, and which leaves the border as it is."""
    smooth = images.float()
    inner = smooth[:, :, 1:-1, 1:-1]
    inner.copy_(((F.avg_pool2d(smooth, 3, stride=1) * 9 + 4 * inner) / 13 + 0.5).floor())
    return blend(images, smooth, factor)


def affine(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Read each output pixel (x, y), counted from the image's centre, at `matrix` (n, 2, 3) times (x, y, 1): bilinear,
    `fill` where that is outside, as Pillow's Image.transform."""
    side = images.shape[-1]
    at = torch.arange(side, device=images.device) + 0.5 - side / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    base = torch.stack((x, y, torch.ones_like(x)), -1).view(1, side * side, 3)
    grid = (base @ matrix.float().transpose(1, 2) / (side / 2)).view(-1, side, side, 2)
    read = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return torch.where(inside, read + 1e-2, fill[None, :, None, None]).clamp(0, 255).byte()  # Pillow cuts off too


def _matrix(argument: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    matrix = torch.eye(2, 3, device=argument.device).repeat(len(argument), 1, 1)
    for (row, column), values in entries.items():
        matrix[:, row, column] = values
    return matrix


def shear_x(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Rows moved by factor times their distance from the top edge."""
    shift = factor * images.shape[-1] / 2
    return affine(images, _matrix(factor, {(0, 1): factor, (0, 2): shift}), fill)


def shear_y(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    """Columns moved by factor times their distance from the left edge."""
    shift = factor * images.shape[-1] / 2
    return affine(images, _matrix(factor, {(1, 0): factor, (1, 2): shift}), fill)


def translate_x(images: Tensor, pixels: Tensor, fill: Tensor) -> Tensor:
    return affine(images, _matrix(pixels, {(0, 2): pixels}), fill)


def translate_y(images: Tensor, pixels: Tensor, fill: Tensor) -> Tensor:
    return affine(images, _matrix(pixels, {(1, 2): pixels}), fill)


def rotate(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    """Counter-clockwise about the centre."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return affine(images, _matrix(degrees, {(0, 0): cos, (0, 1): -sin, (1, 0): sin, (1, 1): cos}), fill)


def resample(images: Tensor, boxes: Tensor) -> Tensor:
    """Crop each image to its box and resize it to the whole side: bicubic, as Pillow does one after the other.

    Args:
        images: (n, 3, side, side) uint8.
        boxes: (n, 5) integers: first row, first column, rows, columns (all inside of the image), mirrored (0 or 1).
    """
    top, left, height, width, mirrored = boxes.unbind(1)
    rows, columns = (_cubic(o, s, images.shape[-1]) for o, s in ((top, height), (left, width)))
    columns = torch.where(mirrored[:, None, None] > 0, columns.flip(1), columns)
    across = (images.float() @ columns.transpose(1, 2)[:, None]).add_(0.5).floor_().clamp_(0, 255)
    return (rows[:, None] @ across).add_(0.5).clamp_(0, 255).byte()


def _cubic(offset: Tensor, size: Tensor, side: int) -> Tensor:
    """(n, side, side): row i holds what output pixel i takes of each pixel of offset..offset + size, summing to 1."""
    at = torch.arange(side, device=offset.device, dtype=torch.float32)
    offset, size = offset[:, None, None].float(), size[:, None, None].float()
    centre = (at[:, None] + 0.5) * size / side + offset
    distance = (at + 0.5 - centre).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weight = weight * ((at >= offset) & (at < offset + size))
    return weight / weight.sum(-1, keepdim=True)
