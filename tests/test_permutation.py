"""The algebra of permutations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pq_compile.permutation import Permutation

orders = st.integers(1, 12).flatmap(lambda n: st.permutations(range(n))).map(Permutation.of)


def test_a_position_afterwards_holds_the_channel_it_names() -> None:
    x = torch.tensor([10, 11, 12])
    assert Permutation((2, 0, 1)).apply(x, 0).tolist() == [12, 10, 11]


@given(orders)
def test_the_inverse_undoes(p: Permutation) -> None:
    assert p.then(p.inverse()).is_identity
    assert p.inverse().then(p).is_identity
    assert p.inverse().inverse() == p


@given(orders, st.data())
def test_then_applies_the_first_first(p: Permutation, data: st.DataObject) -> None:
    q = Permutation.of(data.draw(st.permutations(range(len(p)))))
    x = torch.arange(2 * len(p)).reshape(2, -1)
    assert torch.equal(q.apply(p.apply(x, 1), 1), p.then(q).apply(x, 1))


@given(orders, orders)
def test_side_by_side_moves_nothing_across_the_border(p: Permutation, q: Permutation) -> None:
    x, y = torch.arange(len(p)), 100 + torch.arange(len(q))
    both = Permutation.side_by_side([p, q])
    expected = torch.cat([p.apply(x, 0), q.apply(y, 0)])
    assert torch.equal(both.apply(torch.cat([x, y]), 0), expected)
    assert len(both) == len(p) + len(q)


@pytest.mark.parametrize("order", [(0, 0), (1, 2), (-1, 0)])
def test_what_is_not_a_permutation_is_refused(order: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        Permutation(order)


def test_a_long_permutation_prints_short() -> None:
    assert str(Permutation.identity(3)) == "[0 1 2]"
    assert str(Permutation.identity(20)) == "[0 1 2 3 4 5 6 7 ...]"


def test_random_is_reproducible_and_tensors_are_taken() -> None:
    p = Permutation.random(16, torch.Generator().manual_seed(0))
    assert p == Permutation.random(16, torch.Generator().manual_seed(0))
    assert Permutation.of(torch.tensor(p.order)) == p
    assert not p.is_identity
