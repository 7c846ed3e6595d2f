"""Pictures of letters, drawn in the fonts that matplotlib brings and distorted: as many as a task wants."""

import functools
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

SIZE = 16
"""Pixels of a side."""

_DRAWN = 32
"""Pixels of a side before the distortion."""

_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)
_TURN, _SHEAR, _SHIFT, _NOISE = math.radians(12), 0.15, 0.1, 0.15
_SCALES = (0.9, 1.4)


def pictures(letters: str, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw letters: each as often as the others, in a random font, turned, sheared, scaled, moved and noisy.

    Args:
        letters: The classes.
        number: How many pictures.
        seed: Of everything random.

    Returns:
        Pictures of shape (number, SIZE, SIZE), about -1 to 1, and the classes, shape (number,), int64.
    """
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(number, generator=generator)

    labels = torch.arange(number) % len(letters)
    fonts = torch.randint(len(_FONTS), (number,), generator=generator)
    drawn = torch.stack([_drawn(letters)[label, font] for label, font in zip(labels, fonts, strict=True)])
    turn, shear, scale = between(-_TURN, _TURN), between(-_SHEAR, _SHEAR), 1 / between(*_SCALES)
    cos, sin = turn.cos() * scale, turn.sin() * scale
    across = torch.stack([cos, shear * cos - sin, between(-_SHIFT, _SHIFT)], dim=1)
    down = torch.stack([sin, shear * sin + cos, between(-_SHIFT, _SHIFT)], dim=1)
    grid = functional.affine_grid(torch.stack([across, down], dim=1), [number, 1, SIZE, SIZE], align_corners=False)
    distorted = functional.grid_sample(drawn[:, None], grid, align_corners=False)[:, 0]
    noise = torch.randn(number, SIZE, SIZE, generator=generator)
    order = torch.randperm(number, generator=generator)
    return (2 * distorted - 1 + _NOISE * noise)[order], labels[order]


@functools.cache
def _drawn(letters: str) -> Tensor:
    """Each letter in each font, undistorted. Shape (letters, fonts, _DRAWN, _DRAWN), 0 to 1."""
    return torch.stack([torch.stack([_draw(letter, font) for font in _FONTS]) for letter in letters])


def _draw(letter: str, font: str) -> Tensor:
    import matplotlib
    import numpy
    from PIL import Image, ImageDraw, ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    picture = Image.new("L", (_DRAWN, _DRAWN))
    pen = ImageDraw.Draw(picture)
    middle = _DRAWN / 2
    pen.text((middle, middle), letter, fill=255, font=ImageFont.truetype(str(path), 26), anchor="mm")
    return torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32) / 255)


def patches(some: Tensor, side: int) -> Tensor:
    """Cut pictures into squares.

    Args:
        some: Shape (number, height, width).
        side: Pixels of a square's side.

    Returns:
        Shape (number, squares, side * side).
    """
    squares = some.unfold(1, side, side).unfold(2, side, side)
    return squares.reshape(len(some), -1, side * side)
