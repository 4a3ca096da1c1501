"""Parameters whose memory has been given back while the user's model keeps them.

A released parameter is the same Python object as before: identity, name, shape and dtype stay.
Its storage is one NaN, expanded, so that whatever gets past Python meets NaN and never freed memory
(``untyped_storage().resize_(0)`` crashes the process in clone, sum, deepcopy and load_state_dict).

    reads       see the weight again, copied from the backup in CPU memory
    views       bring it back: writing to ``p.detach()`` or ``p[0]`` must reach the parameter, which
                is an ordinary one from then on; ``state_dict()`` alone counts as a read
    writes      bring it back
    gradients   bring it back: what is differentiated is the parameter itself
    data = ...  replaces the contents, so the parameter is an ordinary one again
    no backup   reads and writes raise ``Refused`` with the parameter's name

Writing to a value of ``state_dict()`` therefore does not reach the model, nor does a view taken
before the weight was released.

The changed class and strides fail Dynamo's guards once per graph, which is wanted: the new
compilation finds the packed weights.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.convert_frame import compile_lock
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from .accesses import overwrites, reads_only_metadata, sets_data, writes
from .errors import Refused
from .staging import to_host


@dataclass(frozen=True)
class Backup:
    """What brings a released parameter back: its values in CPU memory, or nothing."""

    name: str
    values: Tensor | None


_BACKUPS: WeakIdKeyDictionary = WeakIdKeyDictionary()


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
        if torch.compiler.is_compiling() or reads_only_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        caller = sys._getframe(1).f_code if func is Tensor.detach else None
        target = args[0] if args else None
        if isinstance(target, Released):
            if _moves_nowhere(func, target, args[1:], kwargs):
                return target
            if caller is nn.Parameter.__new__.__code__:
                restore(target)  # it asks for a tensor of the class of ``target``
                return nn.Parameter(target, target.requires_grad)
            if sets_data(func):
                return None if args[1] is target else _replace(target, values(args[1]))
            if overwrites(func):
                return _overwrite(func, target, args[1:], kwargs)
        for parameter in _touched(func, args, kwargs):
            restore(parameter)
        saved = caller is nn.Module._save_to_state_dict.__code__  # must not fill the device
        return _read(func, args, kwargs, bring_back=not saved)

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
        backup = to_host(parameter.detach()) if keep_backup else None
        nan = torch.full((1,), float("nan"), dtype=parameter.dtype, device=parameter.device)
        # NOTE another thread's compilation must find the weight the same from trace to guards; and
        # in this order an interrupt finds it whole or released, never lost.
        with compile_lock, torch._C.DisableTorchFunctionSubclass():
            _BACKUPS[parameter] = Backup(name, backup)
            parameter.__class__ = Released
            parameter.data = nan.expand(parameter.shape)


def releasable(tensor: Tensor) -> bool:
    """Whether it is an ordinary parameter that has its memory to itself.

    A slice of a larger memory gives nothing back, and writes to the whole must go on reaching it.
    """
    return (
        type(tensor) is nn.Parameter
        and not tensor.is_inference()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    )


def restore(parameter: Tensor) -> None:
    """Make a released parameter an ordinary one again. ``Refused`` if it has no backup."""
    if isinstance(parameter, Released):
        _replace(parameter, values(parameter))


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

    Inference tensors have no version counter; for them only replacement is seen. Memory that is
    given back may be used again at the same address, and the storage's number as well: whoever
    keeps a key keeps a ``StorageWeakRef`` too, which reserves the number.
    """
    version = -1 if parameter.is_inference() else parameter._version
    storage = parameter.untyped_storage()._cdata
    return storage, parameter.data_ptr(), version, parameter.device, parameter.dtype


_last_change = object()


def last_change() -> object:
    """Another object once any released parameter has become an ordinary one again.

    Its values change in no other way: every write goes through ``Released``.
    """
    return _last_change


def _replace(parameter: Tensor, contents: Tensor) -> None:
    """An ordinary parameter again, with these contents."""
    global _last_change  # not a count, which two threads might set to the same number
    parameter.__class__ = nn.Parameter
    with contextlib.suppress(KeyError):
        del _BACKUPS[parameter]
    parameter.data = contents
    _last_change = object()


def _overwrite(
    func: Callable[..., Any], parameter: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """Written into new memory first, so that a write that fails loses nothing."""
    with torch.inference_mode(False), torch.no_grad():
        room = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    args, kwargs = tree_map_only(Released, values, (args, kwargs))
    func(room.requires_grad_(parameter.requires_grad), *args, **kwargs)
    _replace(parameter, room.detach())
    return parameter


def _touched(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Released]:
    """The released parameters that a call writes to or differentiates."""
    written = (args[0] if args else kwargs) if writes(func) else None
    found = _released((written, kwargs.get("out")))
    if torch.is_grad_enabled() and func is not Tensor.detach:
        found += [p for p in _released((args, kwargs)) if p.requires_grad]
    return found


def _released(tree: Any) -> list[Released]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Released)]


def _read(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], bring_back: bool
) -> Any:
    """Call ``func`` on copies; one whose memory the result shares becomes the parameter's."""
    read = {id(parameter): parameter for parameter in _released((args, kwargs))}
    copies = {key: values(parameter) for key, parameter in read.items()}
    args, kwargs = tree_map_only(Released, lambda p: copies[id(p)], (args, kwargs))
    result = func(*args, **kwargs)
    for key, copied in copies.items():
        if bring_back and _shares_memory(result, copied):
            _replace(read[key], copied)
    return result


def _shares_memory(result: Any, copied: Tensor) -> bool:
    storage = copied.untyped_storage()._cdata
    return any(
        isinstance(leaf, Tensor)
        and leaf.layout == torch.strided
        and leaf.untyped_storage()._cdata == storage
        for leaf in tree_leaves(result)
    )


def _moves_nowhere(
    func: Callable[..., Any], parameter: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """``p.to(...)`` to where it is, which returns ``p`` itself."""
    if func is not Tensor.to:
        return False
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (RuntimeError, TypeError):  # to(other), or a copy is asked for
        return False
    where = parameter.device if device is None else torch.empty(0, device=device).device
    same = where == parameter.device and dtype in (None, parameter.dtype)
    return same and memory_format is None
