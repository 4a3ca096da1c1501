"""What a function of torch does to the parameters that it is given, told by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

METADATA = frozenset(
    (
        *("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "__len__"),
        *("data_ptr", "untyped_storage", "storage_offset", "get_device"),
        *("requires_grad_", "__hash__", "_has_compatible_shallow_copy_type"),
    )
)
"""Methods that are answered without the weight's values, beside all named ``is_...``."""

OVERWRITES = frozenset(("copy_", "fill_", "zero_"))
"""Writes that need nothing of what was there, so that a dropped weight can be loaded again."""

VIEWS = (Tensor.data, Tensor.T, Tensor.mT, Tensor.H, Tensor.mH, Tensor.real, Tensor.imag)
"""Properties that are made of the weight's values."""

INDEXING = ("__index__", "__int__", "__iter__", "__invert__")


def sets_data(func: Callable[..., Any]) -> bool:
    return getattr(func, "__self__", None) is Tensor.data and func.__name__ == "__set__"


def overwrites(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "") in OVERWRITES


def reads_only_metadata(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(func, "__self__", None) not in VIEWS
    asks = name.startswith(("is_", "_is_")) and name != "is_nonzero"
    return asks or name in METADATA


def writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = name.startswith("__i") and name.endswith("__") and name not in INDEXING
    return in_place or augmented or name == "__setitem__"
