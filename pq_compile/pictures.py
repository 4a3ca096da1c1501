"""Rows of pictures with their names, as one image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SCALE = 2
GAP = 8
CAPTION = 16  # pixels above each row
LINE = 12  # pixels per line of a label


def grid(rows: Sequence[tuple[str, Tensor]], names: Sequence[str]) -> Image.Image:
    """One captioned row per (caption, pictures [B, 3, H, W] in [-1, 1]), ``names`` underneath."""
    from PIL import Image, ImageDraw

    side = rows[0][1].shape[-1] * SCALE
    labels = [textwrap.wrap(name, side // 7) or [""] for name in names]
    width = GAP + len(names) * (side + GAP)
    height = len(rows) * (side + CAPTION + GAP) + GAP + LINE * max(map(len, labels))
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, pictures) in enumerate(rows):
        top = GAP + row * (side + CAPTION + GAP)
        draw.text((GAP, top), caption, fill="black")
        for column, picture in enumerate(pictures):
            image = Image.fromarray(_bytes(picture).numpy()).resize(
                (side, side), Image.Resampling.NEAREST
            )
            sheet.paste(image, (GAP + column * (side + GAP), top + CAPTION))
    bottom = GAP + len(rows) * (side + CAPTION + GAP)
    for column, label in enumerate(labels):
        draw.text((GAP + column * (side + GAP), bottom), "\n".join(label), fill="black")
    return sheet


def _bytes(picture: Tensor) -> Tensor:
    """[3, H, W] in [-1, 1] -> uint8 [H, W, 3]."""
    scaled = (picture.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(1, 2, 0).contiguous().cpu()
