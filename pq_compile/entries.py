"""What serves in place of parameters: packed weights and reordered copies, one entry each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import Refused
from .formats import FORMATS
from .options import Options
from .released import Released, discard_backup, releasable, release, restore, staleness_key, values

Fold = Callable[[str, Tensor], Tensor]
"""(name, values) -> reordered copy, or the very tensor where nothing moves."""


@dataclass(frozen=True)
class Entry:
    """What serves in place of one parameter, and the key of the values it was made from."""

    packed: tuple[Tensor, ...] | None
    folded: Tensor | None
    key: tuple[Any, ...]
    storage: StorageWeakRef  # that the key speaks of

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*(self.packed or ()), *(() if self.folded is None else (self.folded,)))


@dataclass(frozen=True)
class Maker:
    """How a unit's entries are made."""

    fold: Fold
    packed: Collection[str]  # weights wanted packed
    dense: Collection[str]  # parameters that something reads as they are
    options: Options

    @torch.no_grad()
    def entry(self, name: str, tensor: Tensor) -> Entry:
        """Fold and pack one parameter; release it if nothing reads the original any more.

        One that was released and is read again as it is comes back. ``Refused`` if its values are
        needed and were dropped.
        """
        with torch.inference_mode(False):
            if name in self.dense:
                restore(tensor)
            original = values(tensor)
            reordered = _laid_out_as(original, self.fold(name, original))
            folded = None if reordered is original or name not in self.dense else reordered
            packed = self._pack(name, reordered) if name in self.packed else None
        if packed is not None and name not in self.dense and self._may_release(tensor):
            release(tensor, name, keep_backup=True)
        with torch._C.DisableTorchFunctionSubclass():
            storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            return Entry(packed, folded, staleness_key(tensor), storage)

    def entries(self, tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
        """An entry for each parameter; if one fails, every one of them is restored."""
        made: dict[str, Entry] = {}
        try:
            for name in sorted({*self.packed, *self.dense} & set(tensors)):
                made[name] = self.entry(name, tensors[name])
        except BaseException:
            for tensor in tensors.values():
                with suppress(Refused):
                    restore(tensor)
            raise
        self.drop_backups(tensors.values())
        return made

    def drop_backups(self, tensors: Collection[Tensor]) -> None:
        """With release_weights="drop", forget the originals: the entries are safe."""
        if self.options.release_weights == "drop":
            for tensor in tensors:
                if isinstance(tensor, Released):
                    discard_backup(tensor)

    def _pack(self, name: str, weight: Tensor) -> tuple[Tensor, ...]:
        format_ = FORMATS[self.options.format]
        packed = format_.quantize_by_rows(format_.pad(weight.contiguous()))
        if not bool(packed[1].to(torch.float32).isfinite().all()):  # the scales say it
            raise Refused(
                f"permuquant: the weight {name} holds NaN or Inf; load its real values first"
            )
        return packed

    def _may_release(self, tensor: Tensor) -> bool:
        return self.options.release_weights != "keep" and releasable(tensor)


def _laid_out_as(original: Tensor, reordered: Tensor) -> Tensor:
    """``reordered`` in the strides of ``original``, which compiled graphs take for granted."""
    if reordered.stride() == original.stride():
        return reordered
    return torch.empty_strided(
        original.shape, original.stride(), dtype=original.dtype, device=original.device
    ).copy_(reordered)
