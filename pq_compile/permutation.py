"""Permutations of channels as values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """A reordering of channels: position ``i`` afterwards holds channel ``order[i]`` of before."""

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"not a permutation of 0..{len(self.order) - 1}: {self}")

    @classmethod
    def identity(cls, size: int) -> Permutation:
        return cls(tuple(range(size)))

    @classmethod
    def of(cls, order: Tensor | Iterable[int]) -> Permutation:
        return cls(tuple(order.tolist() if isinstance(order, Tensor) else map(int, order)))

    @classmethod
    def random(cls, size: int, generator: torch.Generator) -> Permutation:
        return cls.of(torch.randperm(size, generator=generator))

    @classmethod
    def side_by_side(cls, parts: Sequence[Permutation]) -> Permutation:
        """One permutation of the concatenated axis that moves nothing across the parts' borders."""
        starts = accumulate((len(part) for part in parts[:-1]), initial=0)
        return cls(
            tuple(start + i for start, part in zip(starts, parts, strict=True) for i in part.order)
        )

    def __len__(self) -> int:
        return len(self.order)

    def __str__(self) -> str:
        shown = " ".join(map(str, self.order[:8]))
        return f"[{shown}{' ...' if len(self) > 8 else ''}]"

    @property
    def is_identity(self) -> bool:
        return self.order == tuple(range(len(self)))

    def inverse(self) -> Permutation:
        """``p.then(p.inverse())`` is the identity."""
        inverse = [0] * len(self)
        for position, channel in enumerate(self.order):
            inverse[channel] = position
        return Permutation(tuple(inverse))

    def then(self, second: Permutation) -> Permutation:
        """Both, one after the other: ``p.then(q).apply(x) == q.apply(p.apply(x))``."""
        return Permutation(tuple(self.order[i] for i in second.order))

    def apply(self, tensor: Tensor, dim: int) -> Tensor:
        """``tensor`` with its axis ``dim`` reordered; a new tensor of the same shape and dtype."""
        index = torch.tensor(self.order, dtype=torch.int64, device=tensor.device)
        return tensor.index_select(dim, index)
