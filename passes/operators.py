"""Ops whose axis equation depends on their arguments: it is composed here, then read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import views
from .axes import Value
from .calls import Call
from .equations import Undescribed, read


def _names(rank: int) -> list[str]:
    return [f"x{dim}" for dim in range(rank)]


def matmul(call: Call, a: Value, b: Value) -> Value:
    """``... m k, ... k n -> ... m n``, and the forms with vectors."""
    left, m = ("k", "") if len(a.shape) == 1 else ("... m k", "m")
    right, n = ("k", "") if len(b.shape) == 1 else ("... k n", "n")
    batch = "" if len(a.shape) == len(b.shape) == 1 else "..."
    return read(f"{left}, {right} -> {batch} {m} {n}", (a, b), call.shape, call.why)


def addmm(call: Call, c: Value, a: Value, b: Value, **_: object) -> Value:
    """``c + a @ b``, where ``c`` broadcasts."""
    return read("..., ... -> ...", (matmul(call, a, b), c), call.shape, call.why)


def einsum(call: Call, equation: str, operands: Sequence[Value], **_: object) -> Value:
    """The equation is there already: ``nhwc,cd->nhwd``."""
    inputs, arrow, result = equation.replace(" ", "").replace("...", ".").partition("->")
    if not arrow:
        raise Undescribed
    spaced = [" ".join(term).replace(".", "...") for term in (*inputs.split(","), result)]
    text = f"{', '.join(spaced[:-1])} -> {spaced[-1]}"
    return read(text, operands, call.shape, call.why)


def permute(call: Call, x: Value, order: Sequence[int]) -> Value:
    """``a b c -> c a b``."""
    names = _names(len(x.shape))
    result = " ".join(names[dim] for dim in order)
    return read(f"{' '.join(names)} -> {result}", (x,), call.shape, call.why)


def transpose(call: Call, x: Value, a: int, b: int) -> Value:
    """Two dims change places."""
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return permute(call, x, order)


def swap_last(call: Call, x: Value) -> Value:
    """``x.t()``, ``x.mT``: the last two dims change places."""
    return transpose(call, x, -2, -1) if len(x.shape) > 1 else x


def movedim(call: Call, x: Value, source: Any, destination: Any) -> Value:
    """Some dims move to given places, the others keep their order."""
    rank = len(x.shape)
    pairs = zip(*(_dims(which, rank) for which in (destination, source)), strict=True)
    order = [dim for dim in range(rank) if dim not in _dims(source, rank)]
    for place, dim in sorted(pairs):
        order.insert(place, dim)
    return permute(call, x, order)


def _dims(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """The dims meant, counted from the left; all of them for ``None``."""
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)]


def mix(call: Call, x: Value, dim: int, *_: object, **__: object) -> Value:
    """Softmax along ``dim``: each position is one of many alike."""
    names = _names(len(x.shape))
    mixed = [f"[{name}]" if i == dim % len(names) else name for i, name in enumerate(names)]
    return read(f"{' '.join(mixed)} -> {' '.join(names)}", (x,), call.shape, call.why)


def reduce(call: Call, x: Value, dim: Any = None, *_: object, **__: object) -> Value:
    """Sum, mean, maximum, ... over dims: they disappear, or stay with size 1."""
    rank = len(x.shape)
    gone = _dims(None if isinstance(dim, bool) else dim, rank)
    keepdim = len(call.shape) == rank
    names = _names(rank)
    left = [n if i not in gone else "1" for i, n in enumerate(names) if keepdim or i not in gone]
    return read(f"{' '.join(names)} -> {' '.join(left)}", (x,), call.shape, call.why)


def norm(
    call: Call, x: Value, _: object = None, dim: Any = None, *__: object, **___: object
) -> Value:
    """A vector norm is a reduction; its order comes first."""
    return reduce(call, x, dim)


def layer_norm(
    call: Call, x: Value, shape: Sequence[int], *weights: Value | float | bool | None, **named: Any
) -> Value:
    """``... [c], c, c -> ... c``: the statistics do not see the order; so too over several dims."""
    plain = " ".join(f"c{i}" for i in range(len(shape)))
    mixed = " ".join(f"[c{i}]" for i in range(len(shape)))
    affine = (*weights, *named.values())
    operands = [x, *(weight for weight in affine if isinstance(weight, Value))]
    terms = ", ".join([f"... {mixed}", *[plain] * (len(operands) - 1)])
    return read(f"{terms} -> ... {plain}", operands, call.shape, call.why)


def group_norm(
    call: Call,
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    *_: object,
    **__: object,
) -> Value:
    """Channels may move within their group: ``b (g c) ... `` is split, normalised and merged."""
    channels = x.shape[1]
    if not isinstance(channels, int):
        raise Undescribed
    split = (groups, channels // groups) if groups > 1 else (channels,)
    terms = "g c" if groups > 1 else "c"
    wide = views.regroup(x, 1, 1, split, call.why)
    affine = [
        None if one is None else views.regroup(one, 0, 1, split, call.why) for one in (weight, bias)
    ]
    rest = " ".join(f"[s{i}]" for i in range(len(x.shape) - 2))
    mixed = terms.replace("c", "[c]")
    text = (
        f"b {mixed} {rest}, {terms}, {terms} -> b {terms} {rest.replace('[', '').replace(']', '')}"
    )
    normed = read(text, (wide, *affine), wide.shape, call.why)
    return views.regroup(normed, 1, len(split), (channels,), call.why)


def conv(
    call: Call,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *_: object,
    groups: int = 1,
    **__: object,
) -> Value:
    """Dense: ``b i _ _, o i _ _, o -> b o _ _``; depthwise: ``b c _ _, c 1 _ _, c -> b c _ _``."""
    groups = _[3] if len(_) > 3 else groups  # type: ignore[assignment]
    places = " _" * (len(weight.shape) - 2)
    batch = "b " if len(x.shape) == len(weight.shape) else ""
    if groups == 1:
        text = f"{batch}i{places}, o i{places}, o -> {batch}o{places}"
    elif groups == weight.shape[0] == x.shape[-1 - len(places) // 2]:
        text = f"{batch}c{places}, c 1{places}, c -> {batch}c{places}"
    else:
        raise Undescribed
    return read(text, (x, weight, bias), call.shape, call.why)


def attention(
    call: Call,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Value:
    """``... q d, ... k d, ... k e, ... q k -> ... q e``: softmax(Q Kᵀ) V sums over ``k``.

    With fewer key heads than query heads, each key head serves neighbouring query heads.
    """
    if dropout_p:
        raise Undescribed
    if enable_gqa:
        key, value = (_serve(call, one, query) for one in (key, value))
    text = "... q d, ... k d, ... k e, ... q k -> ... q e"
    if is_causal:
        text = "... _ d, ... _ d, ... _ e, ... _ _ -> ... _ e"
    return read(text, (query, key, value, attn_mask), call.shape, call.why)


def _serve(call: Call, x: Value, query: Value) -> Value:
    heads, wanted = x.shape[-3], query.shape[-3]
    if heads == wanted:
        return x
    if not isinstance(heads, int) or not isinstance(wanted, int):
        raise Undescribed
    shape = (*x.shape[:-3], wanted, *x.shape[-2:])
    return views.repeat_interleave(Call((shape,), call.why), x, wanted // heads, -3)


def keep(call: Call, x: Value, *_: object, **__: object) -> Value:
    """The same value, whatever the other arguments say (a dtype, a memory format)."""
    return Value(call.shape, x.dims)


def dropout(call: Call, x: Value, p: float = 0.5, train: bool = False) -> Value:
    """Nothing happens outside training; within, the draw depends on the position."""
    if train and p:
        raise Undescribed
    return keep(call, x)


def constant(call: Call, *_: object, **__: object) -> Value:
    """One number everywhere: any order does."""
    return Value(call.shape, (None,) * len(call.shape))


def pad_sequence(
    call: Call, values: Sequence[Value], batch_first: bool = False, *_: object, **__: object
) -> Value:
    """Sequences of rows padded to one length: only the last dims are shared."""
    text = ", ".join(["_ ..."] * len(values))
    result = "_ _ ..."
    return read(f"{text} -> {result}", values, call.shape, call.why)
