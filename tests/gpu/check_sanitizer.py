"""Launch every kind of generated kernel on small shapes under compute-sanitizer.

    python -m tests.gpu.check_sanitizer result.json [--sanitizer PATH]
    compute-sanitizer --tool memcheck python -m tests.gpu.check_sanitizer --inside

The first line finds the tool, runs the second with ``memcheck`` and with ``racecheck``, and reads
their summaries. The tool is part of the CUDA toolkit, and of the package
``nvidia-cuda-sanitizer-api``. Exit code 1: a tool found an error; 2: there is no tool.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from pq_compile import kernels, routes, row_kernels, scratch
from pq_compile.formats import NVFP4
from pq_compile.rows import OPS, parse
from pq_compile.scratch_text import Precision
from pq_compile.vector import DESIGNS

TOOLS = ("memcheck", "racecheck")
FP4: tuple[Any, ...] = ("w4a4_native", "w4a4_portable")
TARGETS = ("fp8", "nvfp4", "nvfp4_fp8", "nvfp4_half")
PLACES = (
    "out/sanitizer/compute-sanitizer",
    "/usr/local/cuda/bin/compute-sanitizer",
    "/usr/local/cuda/compute-sanitizer/compute-sanitizer",
    "/opt/nvidia/compute-sanitizer/compute-sanitizer",
)
NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
LAUNCHED = re.compile(r"launched (\d+) kinds of kernels")

# ---------------------------------------------------------------- inside

Launches = Iterator[tuple[str, Callable[[], object]]]


def inputs_of(text: str, device: str, batch: int = 2, tokens: int = 5) -> list[Tensor]:
    """In bfloat16, each of a memory of its own with nothing to spare."""
    return [
        torch.rand(batch, tokens if kind == "row" else 1, width, device=device).bfloat16() + 0.5
        for kind, width in parse(text).inputs
    ]


def every_operation(width: int) -> tuple[str, int]:
    """Steps that use every operation of row programs, and the number of the last value."""
    lines, last = [f"row {width}", f"row {width}", f"sample {width}"], 2
    value = 0
    for name, op in OPS.items():
        args = {"add": " 1", "sub": " 2", "mul": " 2", "div": " 1"}.get(name, "")
        args = " 1e-06" if name in ("layer_norm", "rms_norm") else args
        lines.append(f"{name} {value}{args}")
        last += 1
        if name == "mean":
            lines.append(f"mul {value} {last}")
            last += 1
        elif not op.text and not args:
            raise AssertionError(f"{name}: a reduction that has no line here")
        lines.append(f"sigmoid {last}")  # positive and small, for roots and powers
        last += 1
        value = last
    return " | ".join(lines), last


def rows_launches(device: str) -> Launches:
    """Every target and phase: whole and idle lanes, kept values, parts, every operation."""
    texts = {}
    for target in TARGETS:
        texts[f"{target} whole lanes"] = f"row 64 | {target} 0"
        texts[f"{target} idle lanes"] = f"row 112 | row 48 | keep 0 bfloat16 | {target} 0 1"
        texts[f"{target} wide"] = f"row 3072 | sample 3072 | mul 0 1 | keep 2 float16 | {target} 2"
        for width in (64, 144):
            steps, last = every_operation(width)
            texts[f"{target} every operation, {width}"] = (
                f"{steps} | keep 3 float32 | {target} {last}"
            )
    texts["none"] = "row 250 | sample 250 | mul 0 1 | keep 2 bfloat16 | none"
    for name, text in texts.items():
        given = inputs_of(text, device)
        yield f"rows {name}", partial(row_kernels.run, text, given)


def packed(n: int, k: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    one, two, three = NVFP4.quantize(torch.randn(n, k))
    return one.to(device), two.to(device), three.to(device)


def decode_launches(device: str) -> Launches:
    for precision in get_args(Precision):
        for outputs, k in (((48,), 64), ((250, 1, 33), 112)):
            weights = [packed(n, k, device) for n in outputs]
            for biases in ([], [torch.randn(n, device=device).bfloat16() for n in outputs]):
                name = f"decode {precision} {outputs}x{k}" + (" bias" if biases else "")
                yield name, partial(scratch.decode, weights, biases, precision)


def product_launches(device: str) -> Launches:
    """The products with a kernel of their own, and the quantiser before them."""
    for m, n, k in ((1, 48, 64), (5, 33, 112), (19, 250, 272)):
        w, bias = packed(n, k, device), torch.randn(n, device=device).bfloat16()
        x = torch.randn(m, k, device=device).bfloat16()
        a = NVFP4.quantize(torch.randn(m, k))
        a = (a[0].to(device), a[1].to(device), a[2].to(device))
        yield f"quantise {m}x{k}", partial(kernels.quantise, x)
        for kind in FP4 if on_fp4(device) else FP4[1:]:
            name = f"{kind} {m}x{n}x{k}"
            yield name, partial(kernels.matmul_w4a4, a, w, bias, torch.bfloat16, kind)
        few = m <= routes.FEW_ROWS
        designs: tuple[Any, ...] = tuple(DESIGNS) if few and device != "cpu" else ()  # assembly
        kinds: list[Any] = ["w4a16_portable"] + ["w4a16_vector"] * few
        for kind in kinds:
            yield f"{kind} {m}x{n}x{k}", partial(kernels.matmul_w4a16, x, w, bias, kind)
            name = f"{kind} fp32 {m}x{n}x{k}"
            yield name, partial(kernels.matmul_w4a16, x.float(), w, None, kind)
        for design in designs:
            yield f"{design} {m}x{n}x{k}", partial(kernels.matmul_w4a16, x, w, bias, design)


def on_fp4(device: str) -> bool:
    return device != "cpu" and torch.cuda.get_device_capability() in kernels.FP4_SINCE


def inside(device: str) -> int:
    """Launch each once, waiting for it, and say how many."""
    os.environ.setdefault(NO_CACHING, "1")  # so that the tool sees each tensor's own memory
    torch.manual_seed(0)
    count = 0
    for launches in (rows_launches, decode_launches, product_launches):
        for name, launch in launches(device):
            launch()
            if device != "cpu":
                torch.cuda.synchronize()
            print(name, flush=True)
            count += 1
    print(f"launched {count} kinds of kernels")
    return 0


# ---------------------------------------------------------------- outside


class Found(NamedTuple):
    """What a tool said: its summary, errors in it, and how much was launched under it."""

    summary: str
    errors: int | None  # None: it came to no summary
    launched: int

    @property
    def passed(self) -> bool:
        return self.errors == 0 and self.launched > 0


def read(output: str) -> Found:
    """The summary of memcheck, ``ERROR SUMMARY: 0 errors``, or of racecheck, ``RACECHECK SUMMARY:
    0 hazards displayed (0 errors, 0 warnings)``, whose warnings count too.
    """
    summary, launched = SUMMARY.findall(output), LAUNCHED.findall(output)
    if not summary:
        return Found("", None, int(launched[-1]) if launched else 0)
    counts = re.findall(r"(\d+) (?:error|hazard|warning)", summary[-1])
    return Found(summary[-1].strip(), sum(map(int, counts)), int(launched[-1]) if launched else 0)


def find(given: str | None) -> str | None:
    """The path of compute-sanitizer: as told, on the path, among packages, in CUDA's folders."""
    packages = Path(torch.__file__).parent.parent.glob("nvidia/*/compute-sanitizer")
    named = [given] if given else [shutil.which("compute-sanitizer"), *PLACES]
    among = [path / "compute-sanitizer" for path in packages]
    for candidate in [*named, *([] if given else among)]:
        if candidate and os.access(candidate, os.X_OK) and Path(candidate).is_file():
            return str(candidate)
    return None


def under(tool: str, sanitizer: str, rest: Sequence[str]) -> dict[str, Any]:
    started = time.monotonic()
    command = [sanitizer, "--tool", tool, "--target-processes", "all"]
    command += [sys.executable, "-m", "tests.gpu.check_sanitizer", "--inside", *rest]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, NO_CACHING: "1"}
    )
    output = done.stdout + done.stderr
    found = read(output)
    tail = output[-4000:] if not found.passed else ""
    took = time.monotonic() - started
    return {**found._asdict(), "passed": found.passed, "seconds": took, "output": tail}


def outside(out: Path, given: str | None, tools: Sequence[str], rest: Sequence[str]) -> int:
    sanitizer = find(given)
    if sanitizer is None:
        sentence = (
            "compute-sanitizer is missing: it is part of the CUDA toolkit and of the package "
            "nvidia-cuda-sanitizer-api; say where it is by --sanitizer PATH"
        )
        print(sentence)
        out.write_text(json.dumps({"passed": False, "missing": sentence}, indent=1))
        return 2
    subprocess.run(
        [sys.executable, "-m", "tests.gpu.check_sanitizer", "--inside", *rest], check=True
    )  # compiles them all, and shows that they run
    found = {tool: under(tool, sanitizer, rest) for tool in tools}
    passed = all(record["passed"] for record in found.values())
    result = {"passed": passed, "sanitizer": sanitizer, "torch": torch.__version__, "tools": found}
    out.write_text(json.dumps(result, indent=1))
    for tool, record in found.items():
        summary = record["summary"] or "came to no summary"
        print(
            f"{tool}: {summary}, {record['launched']} kinds of kernels, {record['seconds']:.0f} s"
        )
        if not record["passed"]:
            print(record["output"])
    return 0 if passed else 1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Run all kernels under compute-sanitizer.")
    parser.add_argument("out", type=Path, nargs="?", help="where to write the JSON result")
    parser.add_argument("--inside", action="store_true", help="launch the kernels, no more")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer")
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=(*TOOLS, "initcheck"))
    parser.add_argument("--device", default="cuda", help="cpu: where Triton interprets")
    options = parser.parse_args(arguments)
    if options.inside:
        return inside(options.device)
    if options.out is None:
        parser.error("say where to write the JSON result, or --inside")
    rest = ["--device", options.device]
    return outside(options.out, options.sanitizer, options.tools, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
