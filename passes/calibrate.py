"""What the model's own calls say about each linear's input, in memory that does not grow.

Per input channel the sum of ``x**2`` over every row of every call, in fp64; and a few rows of a
few calls, drawn by Algorithm R: call ``n`` takes a random place among ``n`` and is kept if the
place is one of the first ``blocks``, so every call is kept with the same chance.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pq_compile.errors import Refused
from pq_compile.plan import Statistics

from .split import SHARE, Contents, Split, split

CHUNK = 1 << 22
"""Elements turned into fp64 at a time."""

TIMES = 1024
"""The largest input of rank at most 1 that is read as timesteps, and how many values are kept."""


@dataclass
class _Input:
    """One tensor that several weights read, as seen so far."""

    sums: Tensor  # fp64 [K], sum of x**2
    rows: int = 0
    seen: list[int] = field(default_factory=list)  # number of the call, per observation
    blocks: list[tuple[int, Tensor]] = field(default_factory=list)  # (call, rows [R, K])


@dataclass(frozen=True)
class _Seen:
    """What one call brings for one input, still on its device."""

    key: tuple[str, ...]
    sums: Tensor  # fp64 [K]
    rows: int
    place: int  # among the blocks
    block: Tensor | None  # rows [R, K] for that place


class Observer:
    """Accumulates what ``observe`` sees; the one mutable value between the passes.

    Keeps at most ``blocks`` calls with ``rows_per_block`` rows each for every tensor observed, in
    host memory, and of each call one number per input. What the current call brings stays on its
    GPU, so that nothing waits for it before the call ends. Not thread-safe.
    """

    def __init__(self, seed: int, blocks: int = 64, rows_per_block: int = 16) -> None:
        self._seed, self._blocks, self._rows = seed, blocks, rows_per_block
        self._inputs: dict[tuple[str, ...], _Input] = {}
        self._contents: list[Contents] = []
        self._known: dict[tuple[object, ...], int] = {}
        self._times: dict[str, set[int | float]] = {}
        self._current: list[_Seen] = []

    @property
    def calls(self) -> int:
        return len(self._contents)

    @torch.no_grad()
    def begin_call(self, inputs: Mapping[str, Tensor]) -> None:
        """A call begins with these inputs (parameters left out), by name.

        Floating ones of rank 2 and more are told apart by shape, sum and norm, which finds the
        calls of one prompt; smaller ones are read as timesteps. Raises ``Refused``, and does not
        count the call, if a floating input holds NaN or Inf.
        """
        self.end_call()
        contents: Contents = {}
        times: dict[str, list[int | float]] = {}
        for name, x in inputs.items():
            if x.is_floating_point():
                total = x.sum(dtype=torch.float64)
                norm = torch.linalg.vector_norm(x, dtype=torch.float64)
                finger = torch.stack([total, norm]).tolist()
                if not all(map(math.isfinite, finger)):
                    raise Refused(_not_finite(f"the input {name} of call {self.calls + 1}"))
                if x.ndim >= 2:
                    contents[name] = self._known.setdefault(
                        (tuple(x.shape), *finger), len(self._known)
                    )
            if x.ndim <= 1 and x.numel() <= TIMES and x.dtype != torch.bool and not x.is_complex():
                times[name] = x.reshape(-1).tolist()
        for name, values in times.items():
            known = self._times.setdefault(name, set())
            known.update(values[: TIMES - len(known)])
        self._contents.append(contents)

    @torch.no_grad()
    def observe(self, x: Tensor, weights: Sequence[str]) -> None:
        """``x`` [..., K], floating, is read by the linears of these weights in the current call.

        The same weights must come together each time. Raises ``Refused``, naming the first weight,
        if ``x`` holds NaN or Inf; for an ``x`` on a GPU it is ``end_call`` that does.
        """
        if not self.calls:
            raise RuntimeError("begin_call comes before observe")
        x = x.reshape(-1, x.shape[-1])
        key = tuple(weights)
        self._current.append(_Seen(key, sums_of_squares(x), len(x), *self._drawn(key, x)))
        if not x.is_cuda:
            self.end_call()

    def _drawn(self, key: tuple[str, ...], x: Tensor) -> tuple[int, Tensor | None]:
        """The place of this observation among the blocks, and its rows; None where it has none."""
        before = len(self._inputs[key].seen) if key in self._inputs else 0
        number = before + sum(new.key == key for new in self._current) + 1
        draw = random.Random(f"{self._seed}/{key[0]}/{number}")
        drawn = draw.randrange(number)
        place = number - 1 if number <= self._blocks else drawn
        if place >= self._blocks:
            return place, None
        chosen = sorted(draw.sample(range(len(x)), min(len(x), self._rows)))
        rows = torch.tensor(chosen, dtype=torch.int64).to(x.device, non_blocking=True)
        return place, x.index_select(0, rows)

    @torch.no_grad()
    def end_call(self) -> None:
        """Take in what was observed since the call began, with one wait for the device.

        The next call, and whoever asks for statistics, ends a call that nobody ended. Raises
        ``Refused``, and forgets what the call brought, if an input held NaN or Inf.
        """
        current, self._current = self._current, []
        if not current:
            return
        totals = torch.stack([new.sums.sum().to(current[0].sums.device) for new in current])
        for new, total in zip(current, totals.tolist(), strict=True):  # finite if the input is
            if not math.isfinite(total):
                name = new.key[0].removesuffix(".weight")
                raise Refused(_not_finite(f"the input of {name} in call {self.calls}"))
        for new in current:
            seen = self._inputs.setdefault(new.key, _Input(torch.zeros_like(new.sums)))
            seen.sums = seen.sums + new.sums.to(seen.sums.device)
            seen.rows += new.rows
            seen.seen.append(self.calls)
            if new.block is not None:
                seen.blocks[new.place : new.place + 1] = [(self.calls, new.block.cpu())]

    def finish(self) -> dict[str, Statistics]:
        """What was seen so far, by name of weight; weights that read one tensor share one value."""
        self.end_call()
        readers = self._readers()
        found = {keys: self._statistics([self._inputs[key] for key in keys]) for keys in readers}
        return {weight: found[keys] for keys, weights in readers.items() for weight in weights}

    def warnings(self) -> tuple[str, ...]:
        """Sentences on what the calls do not cover, for the report."""
        self.end_call()
        reasons = {
            self._split([self._inputs[key] for key in keys]).reason for keys in self._readers()
        }
        return (
            *sorted(reason for reason in reasons if reason),
            *_timesteps_not_spanned(self._times),
        )

    def _readers(self) -> dict[tuple[tuple[str, ...], ...], list[str]]:
        """The tensors that a weight reads -> the weights that read just these."""
        tensors: dict[str, tuple[tuple[str, ...], ...]] = {}
        for key in self._inputs:
            for weight in dict.fromkeys(key):
                tensors[weight] = (*tensors.get(weight, ()), key)
        readers: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for weight, keys in tensors.items():
            readers.setdefault(keys, []).append(weight)
        return readers

    def _split(self, parts: Sequence[_Input]) -> Split:
        seen = sorted({call for part in parts for call in part.seen})
        kept = sorted({call for part in parts for call, _ in part.blocks})
        contents = {call: self._contents[call - 1] for call in seen}
        return split(contents, kept, self._seed)

    def _statistics(self, parts: Sequence[_Input]) -> Statistics:
        sides = self._split(parts)
        blocks = sorted(
            (block for part in parts for block in part.blocks), key=lambda block: block[0]
        )
        rows = sum(part.rows for part in parts)
        fit, held_out = _sides(blocks, sides)
        return Statistics(
            second_moment=torch.stack([part.sums.cpu() for part in parts]).sum(0) / max(rows, 1),
            rows=rows,
            fit=fit,
            held_out=held_out,
            held_out_by=sides.by,
        )


def sums_of_squares(x: Tensor) -> Tensor:
    """fp64 [K]: the sum of ``x**2`` over the rows of ``x`` [R, K], on its device."""
    sums = x.new_zeros(x.shape[1], dtype=torch.float64)
    for chunk in torch.split(x, max(1, CHUNK // max(1, x.shape[1]))):
        sums += chunk.to(torch.float64).square().sum(0)
    return sums


def _sides(blocks: Sequence[tuple[int, Tensor]], sides: Split) -> tuple[Tensor, Tensor]:
    """(rows to fit to, rows to judge by); of a single row, both are that row."""
    if sides.by != "none":
        return (
            torch.cat([rows for call, rows in blocks if call not in sides.held_out]),
            torch.cat([rows for call, rows in blocks if call in sides.held_out]),
        )
    rows = torch.cat([rows for _, rows in blocks])
    apart = torch.arange(len(rows)) % SHARE == min(SHARE, len(rows)) - 1
    return (rows, rows) if len(rows) < 2 else (rows[~apart], rows[apart])


def _timesteps_not_spanned(times: Mapping[str, set[int | float]]) -> Iterator[str]:
    """A warning unless an input has four values and more, the least at most a quarter of the top.

    No model says which input carries the timestep: an integer that never changes does not.
    """
    spans = [
        sorted(map(abs, values))
        for values in times.values()
        if len(values) > 1 or any(isinstance(value, float) for value in values)
    ]
    if not spans or any(len(s) >= 4 and s[0] <= 0.25 * s[-1] for s in spans):
        return
    widest = max(spans, key=len)
    seen = (
        f"{len(widest)} timesteps, from {widest[-1]:g} down to {widest[0]:g}"
        if len(widest) > 1
        else f"a single timestep, {widest[0]:g}"
    )
    yield (
        f"calibration saw only {seen}, which does not span a schedule: later steps may lose more "
        "than reported; observe whole runs of the pipeline"
    )


def _not_finite(where: str) -> str:
    return (
        f"permuquant: {where} holds NaN or Inf, and statistics of it would be worthless; find out "
        "where they come from, or keep such calls out of calibration"
    )
