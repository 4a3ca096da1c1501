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
    packed: frozenset[str]  # weights wanted packed
    dense: frozenset[str]  # parameters that something reads as they are
    options: Options

    @torch.no_grad()
    def entry(self, name: str, tensor: Tensor) -> Entry:
        """Fold and pack one parameter; release it if nothing reads the original any more.

        One that was released and is read again as it is comes back. ``Refused`` if its values are
        needed and were dropped.
        """
        with torch.inference_mode(False):
            original = values(tensor)
            reordered = self.fold(name, original)
            folded = None
            if reordered is not original and name in self.dense:
                folded = _laid_out_as(tensor, reordered)
            packed = self._pack(name, reordered) if name in self.packed else None
            if name in self.dense and folded is None:
                restore(tensor)
        if self.releases(name, tensor, folded is not None):
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

    def not_given_back(self, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
        """After ``entries``: a sentence on the packed weights that take their old room as well."""
        names = sorted(
            n for n in self.packed & set(tensors) if not isinstance(tensors[n], Released)
        )
        if not names or self.options.release_weights == "keep":
            return ()
        size = sum(tensors[name].nbytes for name in names)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"{len(names)} packed weights stay in their own precision too, {size:,} bytes, as they "
            f"share their memory or are read otherwise as well: {', '.join(names[:3])}{more}",
        )

    def _pack(self, name: str, weight: Tensor) -> tuple[Tensor, ...]:
        format_ = FORMATS[self.options.format]
        packed = format_.quantize_by_rows(format_.pad(weight.contiguous()))
        if not bool(packed[1].to(torch.float32).isfinite().all()):  # the scales say it
            raise Refused(
                f"permuquant: the weight {name} holds NaN or Inf; load its real values first"
            )
        return packed

    def releases(self, name: str, tensor: Tensor, reordered: bool) -> bool:
        """Whether the memory of the original goes: it can, and something serves for every reader.

        A reordered copy alone is no reason where nothing is packed: its graph, which is compiled
        already, would have to be compiled again. Nor is it where the copy has strides of its own.
        """
        if self.options.release_weights == "keep" or not releasable(tensor):
            return False
        if name not in self.dense:
            return name in self.packed
        return reordered and bool(self.packed) and tensor.is_contiguous()


def bytes_by_kind(entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """What lies on the model's devices, ``tensors`` being its parameters by name."""
    kept = {name: t.nbytes for name, t in tensors.items() if not isinstance(t, Released)}
    beside = {name for name in kept if name in entries and entries[name].tensors}
    return {
        "packed weights": sum(t.nbytes for entry in entries.values() for t in entry.packed or ()),
        "reordered copies": sum(e.folded.nbytes for e in entries.values() if e.folded is not None),
        "as they were": sum(size for name, size in kept.items() if name not in beside),
        "originals kept": sum(kept[name] for name in beside),
    }


def _laid_out_as(parameter: Tensor, reordered: Tensor) -> Tensor:
    """``reordered`` in the strides that graphs are compiled for.

    They are the parameter's own; a released one has none, and its copy is contiguous.
    """
    if isinstance(parameter, Released):
        return reordered.contiguous()
    if reordered.stride() == parameter.stride():
        return reordered
    copied = torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device
    )
    return copied.copy_(reordered)
