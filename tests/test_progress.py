"""One bar counts the calls of all units and closes with the last."""

from __future__ import annotations

import io
import sys

import pytest

from pq_compile import progress


class Unit:
    """What is observed; a bar holds it weakly."""


def test_units_share_a_bar_that_closes_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    first, second = Unit(), Unit()
    for _ in range(2):
        progress.observed(first, 2)
        progress.observed(second, 2)
    progress.done(first)
    assert progress._BARS
    progress.done(second)
    assert not progress._BARS
    assert "4/4" in shown.getvalue()


def test_an_open_ended_calibration_only_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    unit = Unit()
    for _ in range(3):
        progress.observed(unit, None)
    progress.done(unit)
    assert "3call" in shown.getvalue()


def test_a_bar_does_not_wait_for_a_unit_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    first, second = Unit(), Unit()
    progress.observed(first, 2)
    progress.observed(second, 2)
    del first
    progress.done(second)
    assert not progress._BARS
