"""Check and time the W4A16 products of a few rows on a CUDA device, in a minute and a half.

    python -m tests.gpu.check_vector result.json

Every design is compared with the fp64 product of the same operands, its output on poisoned memory.
Then every variant (design, rows and outputs a program, channels read at once) is timed beside
``torch.nn.functional.linear`` in bfloat16. Weights rotate beyond the L2 cache. "graph" is the time
a product takes in a CUDA graph of many, "kernel" its own as the profiler sees it, "host" the time
that Python needs to launch one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from pq_compile import kernels
from pq_compile.formats import NVFP4
from pq_compile.kernels import KernelSpec, tuned
from tests.gpu.check_kernels import Record, poisoned, weight
from tests.gpu.rotating import Operands, in_graph, kernel_time, on_host

DESIGNS: tuple[Any, ...] = ("w4a16_half", "w4a16_integer")
CHECKED = [
    (1, 18432, 3072),
    (2, 9216, 3072),
    (3, 250, 1040),
    (4, 1536, 256),
    (8, 64, 16),
    (16, 6144, 3072),
]
TIMED = [(1, 18432, 3072), (2, 18432, 3072), (4, 18432, 3072), (8, 18432, 3072), (16, 18432, 3072)]
OTHERS = [(1, 9216, 3072), (1, 6144, 3072), (1, 1536, 1536), (1, 3072, 256)]
STAGES = {"w4a16_half": ((1, 2, 3, 4), (2, 3)), "w4a16_integer": ((1, 2, 3), (2,))}
FEW = {1: (1,), 2: (1, 2), 4: (2, 4), 8: (4, 8), 16: (4, 8)}


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def check_products(device: str) -> Iterator[Record]:
    """Relative error against fp64; at most that of 16-bit sums and of rounding the output."""
    for rows, n, k in CHECKED:
        w = weight(n, k, device)
        for dtype in (torch.bfloat16, torch.float16):
            for size in (1.0, 1e4 if dtype == torch.bfloat16 else 100.0, 1e-3):
                x = (torch.randn(rows, k, device=device) * size).to(dtype)
                bias = torch.randn(n, device=device).to(dtype) if n % 3 else None
                exact = x.double() @ NVFP4.dequantize(*w).double().T
                exact = exact if bias is None else exact + bias.double()
                for design in DESIGNS:
                    with poisoned():
                        y = kernels.matmul_w4a16(x, w, bias, design)
                    error, bound = relative(y, exact), 2e-3 if dtype == torch.bfloat16 else 1e-3
                    yield {
                        "check": "products",
                        "case": f"{design} {rows}x{n}x{k} {dtype} x {size:g}",
                        "passed": error <= bound,
                        "relative_error": error,
                    }


def check_codes(device: str) -> Iterator[Record]:
    """Every element code with every scale code, one product each: exact."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(256, 1)
    elements = torch.arange(16, dtype=torch.uint8, device=device).repeat(256, 1)
    packed = elements[:, 0::2] | elements[:, 1::2] << 4
    w = (packed, codes.view(torch.float8_e4m3fn), torch.ones((), device=device))
    expected = NVFP4.decode(w[0], w[1]).T
    for design in DESIGNS:
        for dtype in (torch.bfloat16, torch.float16):
            with poisoned():
                x = torch.eye(16, dtype=dtype, device=device)
                y = kernels.matmul_w4a16(x, w, None, design).float()
            wrong = int((y.nan_to_num(nan=-1) != expected.nan_to_num(nan=-1)).sum())
            case = f"{design} {dtype}"
            yield {"check": "codes", "case": case, "passed": wrong == 0, "wrong": wrong}


def check_missing(device: str) -> Iterator[Record]:
    """What is not finite in x reaches all outputs of its row, and no others."""
    w = weight(256, 512, device)
    for design in DESIGNS:
        for value in (math.nan, math.inf, -math.inf):
            for dtype in (torch.bfloat16, torch.float16):
                x = torch.randn(6, 512, device=device).to(dtype)
                x[2, 77] = value
                with poisoned():
                    y = kernels.matmul_w4a16(x, w, None, design)
                rest = torch.cat([y[:2], y[3:]])
                passed = bool(not y[2].isfinite().any()) and bool(rest.isfinite().all())
                case = f"{design} {dtype} {value}"
                yield {"check": "not finite", "case": case, "passed": passed}


CHECKS: dict[str, Callable[[str], Iterator[Record]]] = {
    "products": check_products,
    "codes": check_codes,
    "not finite": check_missing,
}


def tiles(rows: int) -> list[tuple[int, int, int]]:
    """(Rows, columns, channels read at once) that leave registers enough."""
    sizes = [(few, columns) for few in FEW[rows] for columns in (4, 8, 16)]
    found = [(few, columns, 512) for few, columns in sizes if few * columns <= 32]
    return [*found, (FEW[rows][0], 8, 1024)]


def variants(rows: int, n: int, k: int) -> list[KernelSpec]:
    """The specs to time: both designs in several tiles, then the kernels for any shape."""
    shape = {"k": k, "n": n, "dtype": torch.bfloat16, "bias": True}
    capability = torch.cuda.get_device_capability()
    found = [
        replace(tuned(design, capability, rows, **shape), tile=tile, stages=stages)
        for design in DESIGNS
        for tile in tiles(rows)
        for stages in STAGES[design][rows > 1]
    ]
    others: tuple[Any, ...] = ("w4a16_vector", "w4a16_portable")
    general = [tuned(kind, (0, 0), rows, **shape) for kind in others]
    return [*found, *general]


def compile_all(specs: Sequence[KernelSpec], operands: Operands) -> None:
    """Compile every kernel, several at a time."""

    def one(spec: KernelSpec) -> None:
        how = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": False}
        tensors = (operands.x, *operands.packed[0], operands.bias, operands.y)
        kernels.load(spec).warmup(*tensors, operands.rows, grid=(1, 1), **how)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, specs))


def timings(shapes: Sequence[tuple[int, int, int]], tiles: bool) -> Iterator[Record]:
    for rows, n, k in shapes:
        operands = Operands(rows, n, k)
        shape = {"k": k, "n": n, "dtype": torch.bfloat16, "bias": True}
        chosen = tuned("w4a16_vector", torch.cuda.get_device_capability(), rows, **shape)
        specs = variants(rows, n, k) if tiles else [chosen]
        compile_all(specs, operands)
        linears = operands.linears()
        bf16 = {"graph": in_graph(linears), "kernel": kernel_time(linears)}
        found = []
        for spec in specs:
            took = in_graph(operands.launches(spec))
            found.append({"spec": str(spec), "graph": took, "ratio": bf16["graph"] / took})
        found.sort(key=lambda one: float(str(one["graph"])))
        best = next(spec for spec in specs if str(spec) == found[0]["spec"])
        calls = operands.launches(best)
        found[0] |= {"kernel": kernel_time(calls), "host": on_host(calls)}
        yield {
            "shape": [rows, n, k],
            "bf16": bf16 | {"host": on_host(linears), "GB/s": 2 * n * k / bf16["graph"] / 1e3},
            "GB/s": 0.5625 * n * k / float(str(found[0]["graph"])) / 1e3,
            "chosen": str(chosen),
            "host of matmul_w4a16": on_host([operands.product]),
            "best": found[0],
            "variants": found,
        }
        del operands, linears, calls


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check and time W4A16 products of a few rows.")
    parser.add_argument("out", type=Path, help="where to write the JSON result")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all inputs")
    parser.add_argument("--no-timing", action="store_true", help="check only")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    checks = [record for check in CHECKS.values() for record in check("cuda")]
    failed = [record for record in checks if not record["passed"]]
    print(f"{len(checks)} checks, {len(failed)} failed", *failed[:10], sep="\n", flush=True)
    result: Record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seed": options.seed,
        "failed": failed,
        "checks": checks,
        "timings": [],
    }
    if not options.no_timing:
        for shapes, tiles in ((TIMED, True), (OTHERS, False)):
            for record in timings(shapes, tiles):
                result["timings"].append(record)
                print({key: record[key] for key in record if key != "variants"})
                for one in record["variants"][:5]:
                    print("   ", one, flush=True)
    result["seconds"] = time.monotonic() - started
    options.out.write_text(json.dumps(result, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
