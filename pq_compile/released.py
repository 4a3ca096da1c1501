"""Parameters whose memory has been given back while the user's model keeps them.

A released parameter is the same Python object as before: identity, name, shape and dtype stay.
Its storage is one NaN, expanded, so that whatever gets past Python meets NaN and never freed memory
(``untyped_storage().resize_(0)`` crashes the process in clone, sum, deepcopy and load_state_dict).

    reads       see the weight again, copied from the backup in CPU memory
    writes      bring the weight back first; the parameter is then an ordinary one
    data = ...  replaces the contents, so the parameter is an ordinary one again
    no backup   reads and writes raise ``Refused`` with the parameter's name

The changed class and strides fail Dynamo's guards once per graph, which is wanted: the new
compilation finds the packed weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.convert_frame import compile_lock
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from .errors import Refused


@dataclass(frozen=True)
class Backup:
    """What brings a released parameter back: its values in CPU memory, or nothing."""

    name: str
    values: Tensor | None


_BACKUPS: WeakIdKeyDictionary = WeakIdKeyDictionary()

METADATA = frozenset(
    (
        *("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "__len__"),
        *("data_ptr", "untyped_storage", "storage_offset", "get_device"),
        *("requires_grad_", "__hash__"),
    )
)
"""Methods that are answered without the weight's values, beside all named ``is_...``."""

OVERWRITES = frozenset(("copy_", "fill_", "zero_"))
"""Writes that need nothing of what was there, so that a dropped weight can be loaded again."""

INDEXING = ("__index__", "__int__", "__iter__", "__invert__")


class Released(nn.Parameter):
    """A parameter whose storage was given back; see the module's docstring."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.compiler.is_compiling() or _reads_only_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        target = args[0] if args else None
        if isinstance(target, Released) and _is_data(func, "__set__"):
            _forget(target)
        elif isinstance(target, Released) and getattr(func, "__name__", "") in OVERWRITES:
            _blank(target)
        elif isinstance(target, Released) and (_is_data(func, "__get__") or _writes(func)):
            restore(target)
        args, kwargs = tree_map_only(Released, values, (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        memo[id(self)] = copy = nn.Parameter(values(self), requires_grad=self.requires_grad)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        whole = nn.Parameter(values(self), requires_grad=self.requires_grad)
        return whole.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def release(parameter: Tensor, name: str, keep_backup: bool) -> None:
    """Give ``parameter``'s memory back, in place.

    With ``keep_backup`` its values move to CPU memory first; without, they are gone.
    """
    with torch.inference_mode(False), torch.no_grad():
        backup = parameter.detach().to("cpu", copy=True) if keep_backup else None
        nan = torch.full((1,), float("nan"), dtype=parameter.dtype, device=parameter.device)
        # NOTE another thread's compilation must find the weight the same from trace to guards; and
        # in this order an interrupt finds it whole or released, never lost.
        with compile_lock, torch._C.DisableTorchFunctionSubclass():
            _BACKUPS[parameter] = Backup(name, backup)
            parameter.__class__ = Released
            parameter.data = nan.expand(parameter.shape)


def restore(parameter: Tensor) -> None:
    """Make a released parameter an ordinary one again. ``Refused`` if it has no backup."""
    if isinstance(parameter, Released):
        whole = values(parameter)
        _forget(parameter)
        parameter.data = whole


def discard_backup(parameter: Tensor) -> None:
    """Drop the CPU copy of a released parameter: reading it is an error from now on."""
    _BACKUPS[parameter] = Backup(_BACKUPS[parameter].name, None)


def readable(parameter: Tensor | None) -> bool:
    """Whether the parameter's values are still to be had."""
    return not isinstance(parameter, Released) or _BACKUPS[parameter].values is not None


def values(parameter: Tensor) -> Tensor:
    """The dense values of a parameter on its own device, a new tensor if it was released."""
    if not isinstance(parameter, Released):
        return parameter.detach()
    backup: Backup = _BACKUPS[parameter]
    if backup.values is None:
        raise Refused(
            f"permuquant: the values of {backup.name} were dropped after packing "
            "(release_weights='drop'); load the model's weights again, or compile with "
            "release_weights='backup'"
        )
    with torch.inference_mode(False), torch.no_grad():
        return backup.values.to(parameter.device, copy=True)


def staleness_key(parameter: Tensor) -> tuple[Any, ...]:
    """Changes whenever the parameter is written, replaced or moved, but for ``p.data.add_(...)``.

    Inference tensors have no version counter; for them only replacement is seen.
    """
    with torch._C.DisableTorchFunctionSubclass():
        version = -1 if parameter.is_inference() else parameter._version
        return parameter.data_ptr(), version, parameter.device, parameter.dtype


def _forget(parameter: Tensor) -> None:
    parameter.__class__ = nn.Parameter
    with contextlib.suppress(KeyError):
        del _BACKUPS[parameter]


def _blank(parameter: Tensor) -> None:
    """An ordinary parameter again, its contents undefined."""
    with torch.inference_mode(False), torch.no_grad():
        room = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    _forget(parameter)
    parameter.data = room


def _is_data(func: Callable[..., Any], accessor: str) -> bool:
    return getattr(func, "__self__", None) is Tensor.data and func.__name__ == accessor


def _reads_only_metadata(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(func, "__self__", None) not in (Tensor.data, Tensor.T, Tensor.mT)
    asks = name.startswith(("is_", "_is_")) and name != "is_nonzero"
    return asks or name in METADATA


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = name.startswith("__i") and name.endswith("__") and name not in INDEXING
    return in_place or augmented or name == "__setitem__"
