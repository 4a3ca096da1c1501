"""One call of an op, as its rule sees it."""

from __future__ import annotations

from dataclasses import dataclass

from .axes import Size


@dataclass(frozen=True)
class Call:
    """The sizes of the results, and who calls: ``aten.cat (node cat_3, in blocks.0.attn)``."""

    shapes: tuple[tuple[Size, ...], ...]
    why: str

    @property
    def shape(self) -> tuple[Size, ...]:
        return self.shapes[0]
