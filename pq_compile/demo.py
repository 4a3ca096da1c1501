"""What ``permuquant demo`` does: the same pictures by the original model and by 4-bit ones.

Every method starts from the same noise and the same prompts. Velocity errors are teacher-forced:
each model is asked at the states of the original's trajectory, so errors do not add up over steps.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import pq_compile

from . import emoji_flux
from .comparison import Row, method_name, psnr, spread, table_row, velocity_error
from .emoji_flux import Prompts
from .errors import Refused
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


def run(settings: Settings) -> tuple[Row, ...]:
    """Sample with every method and write ``grid.png``, ``report.html`` and ``results.json``.

    Returns the table's rows. Raises ``Refused``, before any work, for unknown prompts, an unknown
    recipe, missing weights and a folder that cannot be made.
    """
    Options.parse(options_of(settings.recipe, settings))
    _make_folder(settings.out)
    prompts = emoji_flux.load_prompts(settings.model, device=settings.device)
    prompts = prompts.select(settings.prompts)
    model = emoji_flux.load_model(settings.model, settings.device)
    noise = emoji_flux.starting_noise(len(prompts), settings.seed, settings.device)
    call = emoji_flux.velocity(model, prompts)
    _say(f"original: {len(prompts)} prompts, {settings.steps} steps on {settings.device}")
    states = _watched(emoji_flux.trajectory(call, noise, settings.steps), settings.steps)
    original = emoji_flux.unpatchify(states[-1][1])
    reference = [(z, t, call(z, t)) for t, z in spread(states[:-1], STATES_COMPARED)]
    shown = [(f"original ({str(prompts.tokens.dtype).removeprefix('torch.')})", original)]

    rows: list[Row] = []
    for recipe in dict.fromkeys(("rtn", settings.recipe)):
        compiled, report = prepared(model, recipe, settings)
        quantised = emoji_flux.velocity(compiled, prompts)
        _say(f"{recipe}: sampling")
        walk = _watched(emoji_flux.trajectory(quantised, noise, settings.steps), settings.steps)
        pictures = emoji_flux.unpatchify(walk[-1][1])
        error = velocity_error(quantised, reference)
        name = method_name(recipe)
        rows.append(table_row(name, report.to_dict(), error, psnr(original, pictures)))
        shown.insert(1, (name, pictures))

    grid(shown, prompts.names).save(settings.out / "grid.png")
    report.to_html(settings.out / "report.html")
    results = {"ran_on": ran_on(settings.device), "rows": [asdict(row) for row in rows]}
    (settings.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return tuple(rows)


def ran_on(device: str) -> dict[str, str]:
    """The device and the versions that figures belong to."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "permuquant": pq_compile.__version__,
        **{name: metadata.version(name) for name in ("torch", "triton", "diffusers")},
    }


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


def _watched(states: Iterable[tuple[float, Tensor]], steps: int) -> list[tuple[float, Tensor]]:
    return list(tqdm(states, total=steps + 1, desc="sampling", disable=None, leave=False))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise Refused(
            f"permuquant: cannot make the folder {folder}: {failure.strerror}; name another --out"
        ) from failure


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
