"""Every line of the rule table, checked against the op it describes; views by random reshapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes import views
from passes.axes import PARTS, Channels, Fixed, Leaf, Row, Value, resolve, take, tie
from passes.calls import Call
from passes.equations import Undescribed, parse, read
from passes.propagate import random_orders
from passes.rules import POINTWISE, POINTWISE_OPS, RULES, rule_of
from pq_compile.show import show
from tests.graphs import trace

SIZES = {"k": 5, "n": 6, "m": 3, "c": 4, "b": 2, "_": 4}
EXTRA: dict[str, tuple[Any, ...]] = {
    "aten.upsample_nearest2d": ([8, 8],),
    "aten.upsample_bilinear2d": ([8, 8], False),
    "aten.avg_pool2d": ([2, 2],),
}
EQUATIONS = {
    name: rule for name, rule in RULES.items() if isinstance(rule, str) and rule != POINTWISE
}


def op_of(name: str) -> Any:
    return getattr(torch.ops.aten, name.removeprefix("aten."))


def spelled(term: Sequence[str]) -> list[str]:
    """The letters of a term, ``...`` as two, anonymous ones as they are."""
    return [
        letter
        for token in term
        for letter in (["x", "y"] if token == "..." else [token.strip("[]")])
    ]


def permuted(x: Tensor, letters: Sequence[str], letter: str, order: Tensor) -> Tensor:
    for dim, name in enumerate(letters):
        if name == letter:
            x = x.index_select(dim, order)
    return x


def operands_of(name: str, terms: Sequence[Sequence[str]]) -> list[Tensor]:
    shapes = [[SIZES.get(letter, 4) for letter in term] for term in terms]
    tensors = [torch.randint(-4, 5, shape).double() for shape in shapes]
    if name == "aten.embedding":
        tensors[1] = tensors[1].long() % SIZES["_"]
    if name == "aten.view_as_complex":
        tensors[0] = tensors[0][..., :2].contiguous()
    if name == "aten.view_as_real":
        tensors[0] = torch.complex(tensors[0], tensors[0] + 1)
    return tensors


@pytest.mark.parametrize("name", EQUATIONS)
def test_permuting_a_letter_commutes_with_the_op(name: str) -> None:
    operands, result = parse(EQUATIONS[name])
    terms, out = [spelled(term) for term in operands], spelled(result)
    tensors = operands_of(name, terms)
    extra = EXTRA.get(name, ())
    for letter in sorted({letter for term in terms for letter in term} - {"_", "1"}):
        order = torch.randperm(SIZES.get(letter, 4))
        moved = [permuted(x, term, letter, order) for x, term in zip(tensors, terms, strict=True)]
        found = op_of(name)(*moved, *extra)
        assert torch.equal(found, permuted(op_of(name)(*tensors, *extra), out, letter, order))


NUMBERS: dict[str, tuple[Any, ...]] = {
    "clamp": (-1.0, 1.0),
    "clamp_max": (1.0,),
    "clamp_min": (-1.0,),
    "clip": (-1.0, 1.0),
    "threshold": (0.5, 0.1),
    "logit": (1e-3,),
    "masked_fill": (0.5,),
}
TWO = {
    *("add", "atan2", "bitwise_and", "bitwise_or", "complex", "copy", "div", "divide", "eq"),
    *("floor_divide", "fmod", "greater", "gt", "ge", "le", "less", "logical_and", "logical_or"),
    *("logical_xor", "lt", "masked_fill", "maximum", "minimum", "mul", "multiply", "ne", "polar"),
    *("pow", "remainder", "rsub", "sub", "subtract", "true_divide"),
}
OPERANDS = {**dict.fromkeys(TWO, 2), "addcdiv": 3, "addcmul": 3, "lerp": 3, "where": 3}
INTEGERS = {"bitwise_and", "bitwise_not", "bitwise_or"}


@pytest.mark.parametrize("name", POINTWISE_OPS)
def test_a_pointwise_op_commutes_with_permutations(name: str) -> None:
    torch.manual_seed(0)
    tensors = [0.8 * torch.rand(3, 5).double() + 0.1 for _ in range(OPERANDS.get(name, 1))]
    if name in INTEGERS:
        tensors = [(10 * tensor).long() for tensor in tensors]
    if name == "where":
        tensors[0] = tensors[0] > 0.5
    if name == "masked_fill":
        tensors[1] = tensors[1] > 0.5
    if name in ("imag", "angle", "conj_physical"):
        tensors[0] = torch.complex(tensors[0], tensors[0].flip(1))
    order = torch.randperm(5)

    def run(*operands: Tensor) -> Tensor:
        result: Tensor = op_of(name)(*operands, *NUMBERS.get(name, ()))
        return result

    found = run(*(tensor[:, order] for tensor in tensors))
    torch.testing.assert_close(found, run(*tensors)[:, order], rtol=1e-12, atol=1e-12)


def test_a_wrong_equation_would_be_caught() -> None:
    x, order = torch.arange(4.0), torch.tensor([1, 0, 2, 3])
    assert not torch.equal(x[order].cumsum(0), x.cumsum(0)[order])
    assert rule_of(torch.ops.aten.cumsum.default) is None


def test_an_overload_that_is_something_else_is_not_described() -> None:
    assert rule_of(torch.ops.aten.view.default) is views.reshape
    assert rule_of(torch.ops.aten.view.dtype) is None
    assert rule_of(torch.ops.aten.where.default) is None
    assert rule_of(torch.ops.aten.where.self) == POINTWISE


# ---------------------------------------------------------------- equations


def value(*rows: Row | Fixed | None) -> Value:
    shape = [sum(leaf.size for leaf in row) if isinstance(row, tuple) else 1 for row in rows]
    dims = [Channels.of(*row) if isinstance(row, tuple) else row for row in rows]
    return Value(tuple(shape), tuple(dims))


def rows_of(x: Value, dim: int) -> list[Row]:
    order = x.dims[dim]
    assert isinstance(order, Channels)
    return [resolve(row) for row in order.rows.values()]


def test_equal_letters_are_one_axis() -> None:
    x, w = value((Leaf(3),), (Leaf(4),)), value((Leaf(2),), (Leaf(4),))
    result = read("... k, n k -> ... n", (x, w), (3, 2), "linear")
    assert rows_of(x, 1) == rows_of(w, 1)
    assert rows_of(result, 1) == rows_of(w, 0)
    assert rows_of(result, 0) == rows_of(x, 0)


def test_a_size_of_one_broadcasts_and_ties_nothing() -> None:
    x, one = value((Leaf(3),)), value(None)
    result = read("..., ... -> ...", (x, one), (3,), "mul")
    assert rows_of(result, 0) == rows_of(x, 0)


def test_an_axis_whose_order_has_a_meaning_is_pinned() -> None:
    x = value((Leaf(3),))
    read("_ -> _", (x,), (3,), "conv")
    assert rows_of(x, 0)[0][0].reasons == ("conv",)


def test_rows_that_depend_on_a_mixed_axis_are_tied() -> None:
    a, b = Leaf(4), Leaf(4)
    table = Channels({(0,): (a,), (1,): (b,)}, (0,))
    x = Value((2, 4), (Fixed(("split",)), table))
    read("[h] d -> h d", (x,), (2, 4), "softmax")
    assert resolve((a,)) == resolve((b,))


def test_ranks_that_do_not_fit_are_undescribed() -> None:
    with pytest.raises(Undescribed):
        read("m k, k n -> m n", (value((Leaf(3),)),), (3,), "mm")


def test_a_leaf_keeps_a_bounded_number_of_reasons_in_order() -> None:
    leaf = Leaf(2)
    for number in range(9):
        leaf.pin((f"reason {number}", "reason 0"))
    assert leaf.reasons == ("reason 0", "reason 1", "reason 2", "reason 3")


@given(st.data())
def test_tying_rows_refines_both_to_the_same_leaves(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 24))

    def row() -> Row:
        borders = sorted(data.draw(st.sets(st.integers(1, size)) if size > 1 else st.just({1})))
        ends = [0, *borders, size]
        return tuple(Leaf(b - a) for a, b in pairwise(ends) if b > a)

    first, second = row(), row()
    tie(first, second, "test")
    assert resolve(first) == resolve(second)
    assert sum(leaf.size for leaf in resolve(first)) == size
    cut = data.draw(st.integers(0, size))
    head, tail = take(first, cut, "test")
    assert sum(leaf.size for leaf in head) == cut
    assert resolve(second) == (*head, *tail)


# ---------------------------------------------------------------- views


@st.composite
def shapes(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Several shapes of equally many elements."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=2, max_size=6))

    def shape() -> tuple[int, ...]:
        cut = sorted(draw(st.sets(st.integers(1, len(primes) - 1), max_size=4)))
        ends = [0, *cut, len(primes)]
        return tuple(math.prod(primes[a:b]) for a, b in pairwise(ends))

    return [shape() for _ in range(draw(st.integers(2, 4)))]


@settings(max_examples=200, deadline=None)
@given(shapes(), st.randoms(use_true_random=False))
def test_reshapes_follow_their_elements(chain: list[tuple[int, ...]], random: Any) -> None:
    """Give every leaf a random permutation: reordering commutes with the reshapes."""
    leaves = [Leaf(size) for size in chain[0]]
    start = Value(chain[0], tuple(Channels.of(leaf) for leaf in leaves))
    end = start
    for shape in chain[1:]:
        end = views.reshape(Call((shape,), "view"), end)
    orders: dict[int, list[int]] = {}
    x = torch.arange(math.prod(chain[0])).reshape(chain[0])
    assert torch.equal(
        reordered(x, start, orders, random).reshape(chain[-1]),
        reordered(x.reshape(chain[-1]), end, orders, random),
    )


def reordered(x: Tensor, value: Value, orders: dict[int, list[int]], random: Any) -> Tensor:
    """``x`` with each dim in the order of its rows, tables looked up by the other dims' places."""
    result = torch.empty_like(x)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape)).reshape(-1, x.ndim).tolist():
        source = list(place)
        for dim, order in enumerate(value.dims):
            if isinstance(order, Channels):
                row = resolve(order.at(dict(enumerate(place))))
                source[dim] = channels(row, orders, random)[place[dim]]
        result[tuple(place)] = x[tuple(source)]
    return result


def channels(row: Row, orders: dict[int, list[int]], random: Any) -> list[int]:
    found: list[int] = []
    for leaf in row:
        drawn = list(range(leaf.size))
        if not leaf.reasons:
            random.shuffle(drawn)
        found += [len(found) + i for i in orders.setdefault(id(leaf), drawn)]
    return found


def test_cuts_are_found_between_symbolic_sizes() -> None:
    batch, length = sympy.symbols("s0 s1", positive=True, integer=True)
    before, after = (batch, length, 24), (batch, length, 3, 8)
    assert views.cuts(before, after) == [(0, 0), (1, 1), (2, 2), (3, 4)]
    merged = (batch * length, 24)
    assert views.cuts(before, merged) == [(0, 0), (2, 1), (3, 2)]


def test_a_split_of_a_symbolic_axis_pins_it() -> None:
    length = sympy.Symbol("s0", positive=True, integer=True)
    leaf = Leaf(12)
    x = Value((12, length), (Channels.of(leaf), Fixed(("input",))))
    views.reshape(Call(((12 * length,),), "view"), x)
    assert leaf.reasons == ("view",)


def test_too_many_parts_are_pinned_instead_of_listed() -> None:
    leaf = Leaf(2)
    x = Value((PARTS + 1, 2), (Fixed(("input",)), Channels.of(leaf)))
    views.reshape(Call(((2 * PARTS + 2,),), "flatten"), x)
    assert leaf.reasons == ("flatten",)


# ---------------------------------------------------------------- one op between two linears

BETWEEN: dict[str, Callable[[Any], Tensor]] = {
    "mean": lambda h: h - h.mean((0, 2), keepdim=True) + h.sum(),
    "amax": lambda h: h / (1 + h.abs().amax(-1, keepdim=True) + torch.linalg.vector_norm(h)),
    "var": lambda h: h + h.var(-1, keepdim=True) + h.std((1, 2), keepdim=True),
    "tile": lambda h: h + h.tile(1, 2, 1)[:, :3],
    "tiled part": lambda h: h[..., :4].tile(3),
    "stack": lambda h: torch.stack([h, 2 * h], -2).sum(-2),
    "stack of one": lambda h: torch.stack([h], 1).expand(2, 5, 3, 12).sum(1),
    "first head for all": lambda h: (
        h.unflatten(-1, (3, 4))[:, :, :1].expand(2, 3, 3, 4).flatten(-2)
    ),
    "cat of heads": lambda h: torch.cat(h.unflatten(-1, (3, 4)).split([1, 2], -2), -2).flatten(-2),
    "swapped heads": lambda h: (
        h.unflatten(-1, (3, 4)).transpose(-1, -2).transpose(-1, -2).flatten(-2)
    ),
    "mean of heads": lambda h: h + h.unflatten(-1, (3, 4)).mean(-2).repeat(1, 1, 3),
    "one head": lambda h: h + h.unflatten(-1, (3, 4))[:, :, 1].repeat(1, 1, 3),
    "softmax of heads": lambda h: h.unflatten(-1, (3, 4)).softmax(-2).flatten(-2),
    "flipped": lambda h: h.flip(-1),
    "rolled": lambda h: h.roll(1, -1),
    "sorted": lambda h: h.sort(-1).values,
    "top": lambda h: h + h.topk(2, -1).values.sum(-1, keepdim=True),
    "gathered": lambda h: h.gather(-1, torch.arange(12).flip(0).expand_as(h)),
    "reflected": lambda h: torch.nn.functional.pad(h, (1, 1), mode="reflect")[..., :12],
    "interleaved": lambda h: h.repeat_interleave(2, -1)[..., :12],
    "indexed": lambda h: h[..., torch.tensor([3, 1, 2] * 4)],
    "indexed rows": lambda h: h[:, torch.tensor([2, 0, 1])],
    "masked": lambda h: h.masked_fill(h > 0, 0.5) + torch.where(h > 0, h, -h),
    "diagonal": lambda h: h * torch.eye(12, dtype=h.dtype).sum(0),
    "outer": lambda h: h + torch.outer(h[0, 0], h[0, 1]).sum(0),
    "einsum": lambda h: torch.einsum("bsd,btd->bst", h, h) @ h,
    "vector": lambda h: h * (h @ h[0, 0]).unsqueeze(-1),
    "narrow": lambda h: torch.cat([h.narrow(-1, 4, 8), h.narrow(-1, 0, 4)], -1),
    "moved": lambda h: h.movedim((0, 1), (1, 2)).movedim(0, -1).swapaxes(0, 1).transpose(0, 1),
    "in place": lambda h: h.clone().mul_(2).add_(h).clamp_(-3, 3),
    "written row": lambda h: h.clone().index_fill_(1, torch.tensor([0]), 2.0),
    "written slice": lambda h: torch.zeros_like(h).copy_(h).relu_(),
    "fill": lambda h: h + h.clone().zero_() + torch.ones_like(h) + h.new_full((12,), 2.0),
    "group norm": lambda h: torch.nn.functional.group_norm(h.transpose(1, 2), 1).transpose(1, 2),
    "norm over two": lambda h: torch.nn.functional.layer_norm(h, h.shape[1:]),
    "where it is positive": lambda h: h + torch.where(h > 9)[0].sum(),
    "bytes": lambda h: h.view(torch.int64).view(torch.float64),
    "written elsewhere": lambda h: torch.add(torch.zeros_like(h), h, out=h.relu()),
    "mapped": lambda h: torch.vmap(torch.sin)(h),
    "written halves": lambda h: torch.empty_like(h).copy_(h) + torch.zeros(12).add_(h[0, 0]),
    "outside the table": lambda h: h + h.logcumsumexp(-1),
    "grouped convolution": lambda h: torch.nn.functional.conv1d(
        h.transpose(1, 2), torch.ones(12, 4, 1, dtype=h.dtype), groups=3
    ).transpose(1, 2),
}
FREE = {  # every channel, or every channel of each part, can move
    *("mean", "amax", "var", "tile", "tiled part", "stack", "stack of one", "cat of heads"),
    *("swapped heads", "mean of heads", "first head for all", "one head", "softmax of heads"),
    *("indexed rows", "masked", "einsum", "vector", "narrow", "moved", "in place", "fill"),
    *("group norm", "norm over two", "outer"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_one_op_between_two_linears(name: str) -> None:
    torch.manual_seed(0)
    up, down = torch.nn.Linear(8, 12).double(), torch.nn.Linear(12, 8).double()

    def model(x: Tensor) -> Tensor:
        result: Tensor = down(BETWEEN[name](up(x)))
        return result

    found = trace(model, torch.randn(2, 3, 8).double())
    between = [row for row in found.groups.segments.values() if sum(s.size for s in row) == 12]
    free = {found.groups.owners[one.leaf].free for row in between for one in row}
    assert free == {name in FREE}, show(found.groups)
    assert "its rule failed" not in " ".join(show(found.groups).split())
    orders = random_orders(found.groups, 0)
    for a, b in zip(found.run(orders), found.run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
