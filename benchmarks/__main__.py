"""``python -m benchmarks OUT.json``: everything side by side in one process, as JSON.

Each part is written as soon as it is measured. Without a GPU it says what it skips, and why.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from . import models, parts, tables
from .parts import Part, Settings
from .results import Results

NO_GPU = "it times kernels on a CUDA device, and torch sees none here"
NO_DIFFUSERS = "its models are those of diffusers, which is not installed (pip install diffusers)"
OF_MODELS = ("flux", "overhead", "scaling", "models")


def parser() -> argparse.ArgumentParser:
    """The command line, every option explained."""
    it = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure permuquant beside bf16 eager, torch.compile and fp8 in one process.",
        epilog="Parts: " + "; ".join(f"{part.name}: {part.what}" for part in parts.PARTS),
    )
    add = it.add_argument
    add("out", type=Path, help="where the JSON goes, written after every part")
    add("--only", type=_names, default=(), metavar="PARTS", help="these parts (default: all)")
    add("--schemes", type=_names, default=("auto",), help=f"of {', '.join(parts.SCHEMES)}")
    add("--sides", type=_names, default=parts.KINDS, help="of step, memory and freezing")
    add("--modes", type=_names, default=("default",), help=f"of {', '.join(parts.MODES)}")
    add("--models", type=_names, default=tuple(models.MODELS), help="of the part models")
    add("--double", type=int, help="double blocks of FLUX (default: all 19)")
    add("--single", type=int, help="single blocks of FLUX (default: all 38)")
    add("--layers", type=int, help="blocks of the other models (default: all)")
    add("--resolution", type=int, default=1024, help="pixels along a side")
    add("--batch", type=int, default=1, help="pictures at once")
    add("--repetitions", type=int, default=7, help="timed calls of a step")
    add("--recipe", default="rtn", help="rtn needs no data; permuquant, best: observe first")
    add("--calls", type=int, default=2, help="calls that are observed")
    add("--release", default="backup", help="release_weights: backup, drop, keep")
    add("--cold", action="store_true", help="empty the compiler's cache before each side")
    add("--static", action="store_true", help="scaling: compile each size for itself")
    return it


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where a part failed; what cannot run here is skipped, and no failure."""
    settings = Settings(**vars(parser().parse_args(arguments)))
    wrong = [
        *parts.unknown(settings.only, [part.name for part in parts.PARTS], "part"),
        *parts.unknown(settings.schemes, list(parts.SCHEMES), "scheme"),
        *parts.unknown(settings.sides, parts.KINDS, "side"),
        *parts.unknown(settings.modes, parts.MODES, "mode"),
        *parts.unknown(settings.models, list(models.MODELS), "model"),
    ]
    if wrong:
        parser().error("; ".join(wrong))
    results = Results(settings.out, settings.shown())
    wanted = {
        part.key: part
        for part in reversed(parts.PARTS)
        if not settings.only or part.name in settings.only
    }
    for part in reversed(wanted.values()):
        run(part, settings, results)
    print(tables.text(results.record))
    return 1 if results.record["failed"] else 0


def run(part: Part, settings: Settings, results: Results) -> None:
    """Measure one part; an error in it is kept, and the next part goes on."""
    why = missing(part)
    if why:
        results.skip(part.key, why)
        return
    print(f"{part.key}:", flush=True)
    start = time.perf_counter()
    try:
        part.run(settings, results)
    except Exception:
        results.fail(part.key, traceback.format_exc())
    results.took(part.key, time.perf_counter() - start)


def missing(part: Part) -> str:
    """Why a part cannot run on this machine, as the end of a sentence; empty if it can."""
    if not torch.cuda.is_available():
        return NO_GPU
    return NO_DIFFUSERS if part.key in OF_MODELS and find_spec("diffusers") is None else ""


if __name__ == "__main__":
    sys.exit(main())
