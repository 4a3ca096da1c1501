"""What an optimised step must not do: wait for a device, or hold more memory than it says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the times that a number is asked of a tensor: each would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``peak``: the most bytes alive at once in memory that was made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs or {})
        self.alive()
        for storage in _storages(result):
            if storage._cdata not in given:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._alive.setdefault(storage._cdata, (reference, storage.nbytes()))
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Bytes of it that are still there."""
        self._alive = {
            key: (reference, size)
            for key, (reference, size) in self._alive.items()
            if not reference.expired()  # type: ignore[no-untyped-call]
        }
        return sum(size for _, size in self._alive.values())


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
