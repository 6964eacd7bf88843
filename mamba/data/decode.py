"""From an image file to pixels: every mode that Pillow opens is converted faithfully, or refused by name.

Also a program, `python -m mamba.data.decode`: one of several processes that fill a cache, fed through a pipe. Nothing
of torch is imported here.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mamba.errors import DataError

VERSION = 2
"""Of what a file decodes to: a cache of another version is made anew."""
GROUND = (255, 255, 255)
"""What transparent images are laid on: white, as a page."""
PADDING = (0, 0, 0)
"""What `data.fit` pad puts beside an image."""
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")


def read_rgb(file: Path) -> Image.Image:
    """A file's (first) image, upright by its EXIF orientation, as RGB with 8 bits a channel.

    Raises:
        DataError: no readable image, or of a mode or with values that have no faithful conversion.
    """
    try:
        with Image.open(file) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return to_rgb(image if upright is None else upright)
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        # what Pillow raises for files that are no images, or only the beginning of one
        text = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{file} is not a readable image ({text}); mend or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: grey levels scaled from their range to 0..255, what is transparent laid on `GROUND`.

    Raises:
        ValueError: a mode or values without a known range.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep(image)
    if image.mode in ALPHA or (image.mode in PLAIN and image.has_transparency_data):
        if image.mode == "La":  # which Pillow converts to nothing else
            image = image.convert("LA")
        ground = Image.new("RGBA", image.size, (*GROUND, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    if image.mode not in PLAIN:
        raise ValueError(f"images of mode {image.mode} have no conversion to RGB here")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey. 32-bit numbers must be within the range of 16 bits, which such files hold; floats
    from 0 to 1: any other scale would be a guess."""
    values = np.asarray(image).astype(np.float64)
    tags = getattr(image, "tag_v2", {})
    key = image.info.get("transparency")
    if image.mode == "F":
        top = 1.0
    else:
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        top = 2.0**bits - 1 if bits < 16 else 65535.0  # 12-bit TIFF opens as 16-bit
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):  # NaN neither
        raise ValueError(f"mode {image.mode} with values from {low:g} to {high:g}; valid are 0 to {top:g}")
    opaque = np.full(values.shape, 255, np.uint8)
    if isinstance(key, int):
        opaque[values == key] = 0
    values *= 255 / top
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 255 - values
    grey = np.rint(values).astype(np.uint8)
    grey[opaque == 0] = GROUND[0]
    return Image.fromarray(grey).convert("RGB")


def fit_image(image: Image.Image, side: int, fit: str) -> NDArray[np.uint8]:
    """(side, side, 3): the largest square in the middle of the image (crop), all of it with bars (pad) or out of
    proportion (stretch), bicubic."""
    size, how = (side, side), Image.Resampling.BICUBIC
    if fit == "crop":
        image = ImageOps.fit(image, size, how)
    elif fit == "pad":
        image = ImageOps.pad(image, size, how, color=PADDING)
    else:
        image = image.resize(size, how)
    return np.asarray(image)


def read_fitted(file: Path, side: int, fit: str) -> NDArray[np.uint8]:
    """(side, side, 3); raises DataError as `read_rgb` does."""
    return fit_image(read_rgb(file), side, fit)


def hash_images(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(n, ...) -> (n,): 64 bits of each image's BLAKE2b."""
    digests = b"".join(hashlib.blake2b(np.ascontiguousarray(i).data, digest_size=8).digest() for i in images)
    return np.frombuffer(digests, np.uint64)


def decode_rows(out: NDArray[np.uint8], lo: int, files: list[str], side: int, fit: str) -> list[int]:
    """Decode files into out[lo:], and return the hashes of these rows; raises DataError."""
    for row, file in enumerate(files, lo):
        out[row] = read_fitted(Path(file), side, fit)
    return hash_images(out[lo : lo + len(files)]).tolist()


def main() -> None:
    """Read the job, then pieces of it, a line each; answer each piece with its hashes or with what is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that feeds this one decides when it ends
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    out = np.lib.format.open_memmap(job["path"], mode="r+")
    for line in sys.stdin:
        piece = json.loads(line)
        try:
            answer: dict[str, Any] = {"hashes": decode_rows(out, piece["lo"], piece["files"], job["side"], job["fit"])}
        except DataError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    out.flush()
    os._exit(0)  # nothing to tidy up


if __name__ == "__main__":
    main()
