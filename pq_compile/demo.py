"""What ``permuquant demo`` does: the same pictures by the original model and by 4-bit ones.

Every method starts from the same noise and the same prompts. Velocity errors are teacher-forced:
each model is asked at the states of the original's trajectory, so errors do not add up over steps.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pq_compile

from . import emoji_flux
from .emoji_flux import Prompts
from .options import Options
from .pictures import grid

PROMPTS = (
    "sleeping face",
    "lion face",
    "woman artist",
    "butterfly",
    "sandwich",
    "police car",
    "octopus",
    "gem stone",
)
Model = Callable[..., Any]
PROMPTS_PER_RUN = 8
STEPS_PER_RUN = 16
STATES_COMPARED = 7


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    model: Path = emoji_flux.DEFAULT_FOLDER
    prompts: tuple[str, ...] = PROMPTS
    steps: int = 28
    calibration_calls: int = 64
    recipe: str = "best"
    seed: int = 0
    out: Path = Path("out/demo")
    device: str = "cpu"


@dataclass(frozen=True)
class Row:
    """One line of the table: what a method did and how far it is from the original."""

    method: str
    linears_total: int
    linears_quantised: int
    groups_found: int
    groups_free: int
    groups_accepted: int
    weight_bytes_before: int
    weight_bytes_after: int
    velocity_error: float  # mean of |v_q - v|^2 / |v|^2
    psnr: float  # dB, mean over the pictures


def run(settings: Settings) -> tuple[Row, ...]:
    """Sample with every method and write ``grid.png``, ``report.html`` and ``results.json``.

    Returns the table's rows. Raises ``Refused`` for unknown prompts, an unknown recipe and missing weights.
    """
    Options.parse(options_of(settings.recipe, settings))
    prompts = emoji_flux.load_prompts(settings.model, device=settings.device)
    prompts = prompts.select(settings.prompts)
    model = emoji_flux.load_model(settings.model, settings.device)
    noise = emoji_flux.starting_noise(len(prompts), settings.seed, settings.device)
    call = emoji_flux.velocity(model, prompts)
    _say(f"original: {len(prompts)} prompts, {settings.steps} steps on {settings.device}")
    states = _watched(emoji_flux.trajectory(call, noise, settings.steps), settings.steps)
    original = emoji_flux.unpatchify(states[-1][1])
    shown, rows = [(f"original ({prompts.tokens.dtype})".replace("torch.", ""), original)], []
    reference = [(z, t, call(z, t)) for t, z in spread(states[:-1], STATES_COMPARED)]

    for recipe in ("rtn", settings.recipe):
        compiled, report = prepared(model, recipe, settings)
        quantised = emoji_flux.velocity(compiled, prompts)
        _say(f"{recipe}: sampling")
        walk = _watched(emoji_flux.trajectory(quantised, noise, settings.steps), settings.steps)
        pictures = emoji_flux.unpatchify(walk[-1][1])
        facts = report.to_dict()
        rows.append(
            table_row(
                method_name(recipe),
                facts,
                velocity_error(quantised, reference),
                psnr(original, pictures),
            )
        )
        shown.insert(1, (rows[-1].method, pictures))

    settings.out.mkdir(parents=True, exist_ok=True)
    grid(shown, prompts.names).save(settings.out / "grid.png")
    report.to_html(settings.out / "report.html")
    (settings.out / "results.json").write_text(
        json.dumps([asdict(row) for row in rows], indent=2) + "\n"
    )
    return tuple(rows)


def prepared(model: nn.Module, recipe: str, settings: Settings) -> tuple[Model, Any]:
    """A copy of ``model``, compiled, calibrated on the calibration prompts and frozen; its report.

    The first call after freezing is made here, so that compiling is not mistaken for sampling.
    """
    started = time.perf_counter()
    options = options_of(recipe, settings)
    compiled = torch.compile(copy.deepcopy(model), backend="permuquant", options=options)
    prompts = emoji_flux.load_prompts(settings.model, ("calibration",), settings.device)
    if recipe != "rtn":
        _say(f"{recipe}: observing {settings.calibration_calls} calls")
        calibrate(compiled, prompts, settings.calibration_calls, settings.seed + 1)
        _say(f"{recipe}: choosing permutations and packing weights")
        pq_compile.freeze(compiled)
    first = prompts.chunks(len(settings.prompts))[0]
    noise = emoji_flux.starting_noise(len(first), settings.seed, settings.device)
    emoji_flux.velocity(compiled, first)(noise, 1.0)
    _say(f"{recipe}: ready after {time.perf_counter() - started:.0f} s")
    return compiled, pq_compile.report(compiled)


def options_of(recipe: str, settings: Settings) -> dict[str, Any]:
    """What ``torch.compile`` is given."""
    return {"recipe": recipe, "calibration_calls": settings.calibration_calls}


def calibrate(model: Model, prompts: Prompts, calls: int, seed: int) -> None:
    """Call ``model`` ``calls`` times: short runs over the whole schedule, each with new prompts.

    Rows are held out by run, so at least two runs are made where ``calls`` allows it.
    """
    runs = min(calls, max(2, -(-calls // STEPS_PER_RUN)))
    batches = prompts.chunks(PROMPTS_PER_RUN)
    for index in range(runs):
        steps = calls // runs + (index < calls % runs)
        device = str(prompts.tokens.device)
        noise = emoji_flux.starting_noise(PROMPTS_PER_RUN, seed + index, device)
        call = emoji_flux.velocity(model, batches[index % len(batches)])
        for _ in emoji_flux.trajectory(call, noise, steps):
            pass


def velocity_error(
    call: Callable[[Tensor, float], Tensor], reference: Iterable[tuple[Tensor, float, Tensor]]
) -> float:
    """Mean over states and samples of |v_q - v|^2 / |v|^2, where ``reference`` holds (z, t, v)."""
    errors = [
        (call(z, t) - v).square().sum((1, 2)) / v.square().sum((1, 2)) for z, t, v in reference
    ]
    return float(torch.cat(errors).mean())


def psnr(original: Tensor, other: Tensor) -> float:
    """Mean over pictures [B, 3, H, W] in [-1, 1] of 10 log10(peak^2 / mean squared error), dB."""
    error = (original.clamp(-1, 1) - other.clamp(-1, 1)).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of ``items``, evenly spaced, the first among them."""
    stride = max(1, -(-len(items) // count))
    return list(items[::stride])


def method_name(recipe: str) -> str:
    return recipe if recipe in ("rtn", "permuquant") else f"permuquant ({recipe})"


def table_row(method: str, facts: dict[str, Any], error: float, decibels: float) -> Row:
    """A row from ``Report.to_dict()`` and the two measures."""
    summary = facts["summary"]
    return Row(
        method=method,
        linears_total=summary["linears_total"],
        linears_quantised=summary["linears_quantised"],
        groups_found=len(facts["groups"]),
        groups_free=sum(not group["pinned_by"] for group in facts["groups"]),
        groups_accepted=len({row["group"] for row in facts["linears"] if row["accepted"]}),
        weight_bytes_before=summary["weight_bytes_before"],
        weight_bytes_after=summary["weight_bytes_after"],
        velocity_error=error,
        psnr=decibels,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, columns aligned."""
    head = (
        "method",
        "linears lowered",
        "groups found",
        "free",
        "accepted",
        "weights",
        "velocity error",
        "PSNR",
    )
    body = [
        (
            row.method,
            f"{row.linears_quantised} of {row.linears_total}",
            str(row.groups_found),
            str(row.groups_free),
            str(row.groups_accepted),
            f"{row.weight_bytes_before / 1e6:.1f} -> {row.weight_bytes_after / 1e6:.1f} MB",
            f"{row.velocity_error:.5f}",
            f"{row.psnr:.2f} dB",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *body)
    )


def _watched(states: Iterable[tuple[float, Tensor]], steps: int) -> list[tuple[float, Tensor]]:
    return list(tqdm(states, total=steps + 1, desc="sampling", disable=None, leave=False))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
