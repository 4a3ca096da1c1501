"""Other sizes: as few graphs as the model itself would need, and the same packed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pq_compile.backend import permuquant
from tests.models import CLOSE, denoiser, inputs, relative_error, run, served_by_hand, unit_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Sizes = Sequence[tuple[int, int]]
"""Batch and tokens of one call after another."""

RESOLUTIONS = ((2, 12), (2, 20), (2, 12), (1, 33), (3, 5), (2, 48))
LENGTHS = tuple((2, tokens) for tokens in (3, 7, 16, 31, 100))


def counting(backend: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """``backend``, and where each of its calls leaves a mark."""
    calls: list[int] = []

    def count(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        calls.append(len(calls))
        compiled: Callable[..., Any] = backend(module, examples)
        return compiled

    return count, calls


def ours(module: fx.GraphModule, examples: Sequence[Any], release: str) -> Callable[..., Any]:
    options = {"recipe": "random", "progress": False, "release_weights": release}
    return permuquant(module, examples, options=options)


def graphs_of_the_model(sizes: Sizes, dynamic: bool | None) -> list[int]:
    """How many graphs the plain model has had compiled after each call."""
    backend, calls = counting(lambda module, examples: module.forward)
    fast: Any = torch.compile(denoiser(blocks=1), backend=backend, dynamic=dynamic)
    found = []
    for batch, tokens in sizes:
        run(fast, *inputs(0, batch, tokens))
        found.append(len(calls))
    torch._dynamo.reset()
    return found


def packed(model: nn.Module) -> list[Tensor]:
    return [tensor for tensors in unit_of(model).served().values() for tensor in tensors]


def check(model: nn.Module, fast: Any, size: tuple[int, int]) -> None:
    given = inputs(1, *size)
    with served_by_hand(copy.deepcopy(model), model) as plain:
        assert relative_error(run(fast, *given), run(plain, *given)) < CLOSE


@pytest.mark.parametrize("release", ["backup", "keep"])
@pytest.mark.parametrize("dynamic", [None, False, True], ids=str)
def test_another_size_compiles_no_more_often_than_for_the_model_itself(
    dynamic: bool | None, release: str
) -> None:
    expected = graphs_of_the_model(RESOLUTIONS, dynamic)
    backend, calls = counting(lambda module, examples: ours(module, examples, release))
    model = denoiser(blocks=1)
    fast: Any = torch.compile(model, backend=backend, dynamic=dynamic)
    for _ in range(3):
        run(fast, *inputs(0))
    before, weights = len(calls), packed(model)
    assert before == (1 if release == "keep" else 2)  # to observe; to serve without the originals
    for size, most in zip(RESOLUTIONS, expected, strict=True):
        check(model, fast, size)
        assert len(calls) - before <= most - expected[0]
    assert all(map(is_, packed(model), weights))


@pytest.mark.parametrize("release", ["backup", "keep", "drop"])
def test_sequences_of_any_length_are_served_by_one_graph(release: str) -> None:
    assert graphs_of_the_model(LENGTHS, True)[-1] == 1
    backend, calls = counting(lambda module, examples: ours(module, examples, release))
    model, plain = denoiser(blocks=1), denoiser(blocks=1)
    fast: Any = torch.compile(model, backend=backend, dynamic=True)
    run(fast, *inputs(0, *LENGTHS[0]))
    weights: list[Tensor] = []
    with served_by_hand(plain, model):
        for size in LENGTHS:
            given = inputs(1, *size)
            assert relative_error(run(fast, *given), run(plain, *given)) < CLOSE
            weights = weights or packed(model)
    assert all(map(is_, packed(model), weights))
    assert len(calls) == (1 if release == "keep" else 2)


class Cached(nn.Module):
    """Tokens attend to what was computed for earlier ones: two lengths that grow apart."""

    def __init__(self) -> None:
        super().__init__()
        self.block = denoiser(blocks=1).blocks[0]

    def forward(self, x: Tensor, condition: Tensor, memory: Tensor) -> Tensor:
        both = torch.cat([memory, x], 1)
        out: Tensor = self.block(both, condition)
        return out[:, memory.shape[1] :]


def test_two_lengths_that_change_apart_are_served_by_one_graph() -> None:
    backend, calls = counting(lambda module, examples: ours(module, examples, "backup"))
    model, plain = Cached(), Cached()
    fast: Any = torch.compile(model, backend=backend, dynamic=True)
    sizes = ((5, 3), (5, 3), (9, 4), (64, 7), (2, 50))
    for tokens, remembered in sizes:
        given = [torch.randn(2, n, 64).double() for n in (tokens, remembered)]
        condition = torch.randn(2, 64).double()
        found = run(fast, given[0], condition, given[1])
    with served_by_hand(plain, model):
        assert relative_error(found, run(plain, given[0], condition, given[1])) < CLOSE
    assert len(calls) == 2
