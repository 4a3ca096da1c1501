"""The parts of a run, as a table: what each measures, and by which function."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from . import models
from .models import Model, Work
from .results import Results
from .steady import SCHEMES, Protocol, Side

Record = dict[str, Any]
KINDS = ("eager", "inductor", "fp8", "permuquant")
MODES = ("default", "max-autotune-no-cudagraphs", "reduce-overhead")


@dataclass(frozen=True)
class Settings:
    """The command line, parsed."""

    out: Path
    only: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ("auto",)
    sides: tuple[str, ...] = KINDS
    modes: tuple[str, ...] = ("default",)
    models: tuple[str, ...] = tuple(models.MODELS)
    double: int | None = None
    single: int | None = None
    layers: int | None = None
    resolution: int = 1024
    batch: int = 1
    repetitions: int = 7
    recipe: str = "rtn"
    calls: int = 2
    release: str = "backup"
    cold: bool = False
    static: bool = False
    device: str = "cuda"

    @property
    def flux(self) -> Model:
        return models.FLUX.with_blocks(self.double, self.single)

    @property
    def work(self) -> Work:
        return Work(self.resolution, self.batch)

    def every_side(self, kinds: Sequence[str] | None = None) -> list[Side]:
        """What is compared, the plain model first, so that distances are known."""
        found: list[Side] = []
        for kind in kinds or [one for one in KINDS if one in self.sides]:
            if kind == "eager":
                found.append(Side("eager"))
                continue
            schemes = self.schemes if kind == "permuquant" else ("",)
            found += [
                Side(kind, scheme, mode, self.recipe, self.release, self.calls)
                for scheme, mode in product(schemes, self.modes)
            ]
        return found

    def shown(self) -> Record:
        return asdict(self) | {"out": self.out.name}


class Part(NamedTuple):
    """``key`` is where its results stand; parts with one key are measured together."""

    name: str
    key: str
    what: str
    run: Callable[[Settings, Results], None]


def compare(
    sides: Iterable[Side],
    model: Model,
    work: Work,
    protocol: Protocol,
    device: str,
    saved: Callable[[Record], None],
) -> Record:
    """Every side of one model and step; ``saved`` is given what is known after each.

    A side that fails is left out; raises ``RuntimeError`` with what happened, once all have run.
    """
    from . import sides as measuring

    record: Record = {
        "model": model.name,
        "source": model.source,
        "config": model.settings,
        "resolution": work.resolution,
        "batch": work.batch,
        "text_tokens": model.text,
        "sides": [],
    }
    own, failed = None, []
    for side in sides:
        print(f"    {model.name}, {side.name}", flush=True)
        try:
            found, output = measuring.measure(side, model, work, protocol, device, own)
        except Exception:
            failed.append(f"{side.name}:\n{traceback.format_exc()}")
            continue
        own = output if own is None else own
        record["sides"].append(found)
        saved(record)
        print(f"        {said(found)}", flush=True)
    if failed:
        raise RuntimeError("\n".join(failed))
    return record


def said(found: Record) -> str:
    """The main figures of a side, on one line."""
    parts = [f"{found['took_s']:.0f} s in all"]
    if "wall_ms" in found:
        parts.append(f"step {found['wall_ms']['median']:.2f} ms")
    if "kernel_ms" in found:
        parts.append(f"kernels {found['kernel_ms']:.2f} ms")
    if "compile" in found:
        parts.append(f"compiled in {found['compile']['first_call_s']:.0f} s")
    memory = found["memory"]
    parts.append(f"parameters {memory['parameter_bytes'] / 1e9:.2f} GB")
    parts.append(f"peak {memory['peak_step_bytes'] / 1e9:.2f} GB")
    if found.get("by_reference"):
        parts.append(f"{found['by_reference']} linears by the reference, which no GPU should need")
    if not found["output"]["finite"]:
        parts.append("its output is not finite")
    return ", ".join(parts)


def _flux(settings: Settings, results: Results) -> None:
    wanted = set(settings.only) or {"step"}
    protocol = Protocol(settings.repetitions, step="step" in wanted, cold=settings.cold)
    compare(
        settings.every_side(),
        settings.flux,
        settings.work,
        protocol,
        settings.device,
        lambda found: results.part("flux", found),
    )


def _overhead(settings: Settings, results: Results) -> None:
    protocol = Protocol(10 * settings.repetitions, profile=False)
    compare(
        settings.every_side(("inductor", "permuquant")),
        models.emoji_flux(),
        Work(256, 2),
        protocol,
        settings.device,
        lambda found: results.part("overhead", found),
    )


def _models(settings: Settings, results: Results) -> None:
    found: dict[str, Record] = {}
    failed: list[str] = []

    def save(record: Record) -> None:
        found[record["model"]] = record
        results.part("models", list(found.values()))

    for name in settings.models:
        try:
            compare(
                settings.every_side(("inductor", "permuquant")),
                models.MODELS[name].with_blocks(settings.layers),
                settings.work,
                Protocol(settings.repetitions, cold=settings.cold),
                settings.device,
                save,
            )
        except RuntimeError as error:
            failed.append(str(error))
    if failed:
        raise RuntimeError("\n".join(failed))


def _scaling(settings: Settings, results: Results) -> None:
    from . import scaling

    found: list[Record] = []

    def save(record: Record) -> None:
        found.append(record)
        about = {"model": settings.flux.name, "config": settings.flux.settings}
        results.part("scaling", about | {"sides": found})

    sides = settings.every_side(("inductor", "permuquant"))
    dynamic = None if settings.static else True
    protocol = Protocol(settings.repetitions, dynamic=dynamic, cold=settings.cold)
    scaling.measure(sides, settings.flux, protocol, settings.device, saved=save)


def _gemm(settings: Settings, results: Results) -> None:
    from . import products

    results.part("gemm", products.gemm(settings.device))


def _modulation(settings: Settings, results: Results) -> None:
    from . import products

    results.part("modulation", products.modulation(settings.device))


def _bandwidth(settings: Settings, results: Results) -> None:
    from . import bandwidth

    results.part("bandwidth", bandwidth.measure(settings.device))


PARTS = (
    Part("step", "flux", "FLUX.1-dev, one step: wall clock, kernels by kind, host", _flux),
    Part("memory", "flux", "its parameters, and the peak of a step", _flux),
    Part("freezing", "flux", "freezing and compiling: seconds, peak", _flux),
    Part("gemm", "gemm", "TFLOP/s by shape and route", _gemm),
    Part("bandwidth", "bandwidth", "kernels bound by memory beside a copy", _bandwidth),
    Part("modulation", "modulation", "W4A16 of a few rows beside cuBLAS", _modulation),
    Part("overhead", "overhead", "the host's time per call of emoji-flux", _overhead),
    Part("scaling", "scaling", "resolutions 512 to 2048, batches 1 to 4", _scaling),
    Part("models", "models", "SD3.5-large, SANA-1.6B, Z-Image", _models),
)


def unknown(given: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """A sentence for each name that is none of ``known``."""
    sentences = []
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            sentences.append(f"no {what} {name!r}{hint} (there are {', '.join(known)})")
    return sentences


__all__ = ["KINDS", "MODES", "PARTS", "SCHEMES", "Part", "Settings", "compare", "said", "unknown"]
