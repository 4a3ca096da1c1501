"""From what the user holds (a module, a compiled one, a function) to the parameters behind it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, ModuleType
from typing import Any

from torch import Tensor, nn

from .errors import Refused

CALLABLES = ("__code__", "__self__", "_torchdynamo_orig_callable", "func")
WRAPPERS = ("_orig_mod", "_torchdynamo_orig_callable", "__wrapped__", "__self__", "func")


def parameters_of(obj: Any) -> dict[str, Tensor]:
    """Parameters and buffers reachable from ``obj``, by name.

    Follows an ``OptimizedModule`` to its module, a compiled or decorated function to the original,
    a bound method to its object, an object to its attributes, lists and dicts to what they hold,
    closure cells and the globals that a function names. Raises ``Refused`` where no module is
    found.
    """
    modules = list(dict.fromkeys(_modules(obj, set())))
    if not modules:
        raise Refused(
            f"permuquant: found no module behind {type(obj).__name__!r}; pass the model, the "
            "compiled model, or a function that uses it"
        )
    found: dict[str, Tensor] = {}
    for i, module in enumerate(modules):
        prefix = f"module{i}." if len(modules) > 1 else ""
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            found.setdefault(prefix + name, tensor)
    return found


def _modules(obj: Any, seen: set[int]) -> Iterator[nn.Module]:
    if id(obj) in seen:
        return
    seen.add(id(obj))
    inner = [vars(obj)[name] for name in WRAPPERS if name in getattr(obj, "__dict__", {})]
    if isinstance(obj, nn.Module):
        original = obj._modules.get("_orig_mod")
        yield original if original is not None else obj
        return
    if isinstance(obj, functools.partial):
        inner += [obj.func, *obj.args, *obj.keywords.values()]
    inner += [getattr(obj, name, None) for name in ("__self__", "__func__", "__wrapped__")]
    code = getattr(obj, "__code__", None)
    if isinstance(code, CodeType):
        inner += [cell.cell_contents for cell in obj.__closure__ or () if _filled(cell)]
        inner += [obj.__globals__[name] for name in code.co_names if name in obj.__globals__]
    elif hasattr(obj, "__dict__") and not isinstance(obj, type | ModuleType):
        inner += vars(obj).values()
    inner += obj.values() if isinstance(obj, dict) else obj if isinstance(obj, list | tuple) else ()
    owner = getattr(obj, "__self__", None)
    for thing in inner:
        followed = isinstance(thing, nn.Module | list | tuple | dict) or thing is owner
        if followed or any(hasattr(thing, mark) for mark in CALLABLES):
            yield from _modules(thing, seen)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
