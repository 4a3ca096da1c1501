"""Check and time the kernels on a CUDA device, in three minutes, with nothing but torch and triton.

    python -m tests.gpu.check_kernels result.json

Every check is a record ``{"check", "case", "passed", ...measures}``. Codes are compared bit by bit
with the reference on the CPU, products with fp64 products of the same quantised operands. Outputs
are allocated on poisoned memory: an element that no kernel writes is NaN, or 255 in a code.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from pq_compile import kernels, ops
from pq_compile.formats import NVFP4

Record = dict[str, Any]
Packed = tuple[Tensor, Tensor, Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

QUANTISED = [(1, 48), (2, 120), (7, 256), (16, 1024), (272 * 4, 256), (256, 1280), (4608, 3072)]
PRODUCTS = [
    (1, 256, 48),
    (2, 250, 120),
    (7, 768, 256),
    (16, 256, 1024),
    (256, 1024, 256),
    (272 * 4, 256, 1024),
    (272 * 4, 768, 1280),
    (4608, 3072, 3072),
]
TIMED = [(272 * 4, 1024, 256), (272 * 4, 3072, 1024), (4608, 3072, 3072), (4608, 12288, 3072)]
VECTORS = [(1, 1536, 256), (4, 18432, 3072)]
BOUNDS = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}
LOOSER = {"fp8": 4e-3, "w4a16_vector": 2e-3}
"""Routes whose 16-bit products are summed in fewer than 24 bits: of fp8, by float16 pairs."""
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, and 255 where they are bytes."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same_bits(found: Packed, expected: Packed) -> Record:
    packed, scales, tensor_scale = (x.cpu() for x in found)
    wrong = {
        "wrong_bytes": int((packed != expected[0]).sum()),
        "wrong_scales": int((scales.view(torch.uint8) != expected[1].view(torch.uint8)).sum()),
        "wrong_tensor_scale": int(tensor_scale.item() != expected[2].item()),
    }
    return {"passed": not any(wrong.values()), **wrong}


def check_codes(device: str) -> Iterator[Record]:
    """Kernel, torch on the device and torch on the CPU give the same codes."""
    for rows, k in QUANTISED:
        for dtype in DTYPES:
            x = (torch.randn(rows, k) * torch.exp(2 * torch.randn(rows, 1))).to(dtype)
            expected = kernels.quantise_reference(x)
            case = f"{rows}x{k} {dtype}"
            with poisoned():
                found = kernels.quantise(x.to(device))
            yield {"check": "codes", "case": case, **same_bits(found, expected)}
        by_torch = kernels.quantise_reference(x.to(device))
        yield {"check": "codes by torch", "case": case, **same_bits(by_torch, expected)}


def hard_tensors() -> Iterator[tuple[str, Tensor]]:
    x = torch.randn(64, 256)
    yield "zero", x * 0
    yield "tiny, to the tensor scale's floor", x * 1e-31
    yield "subnormal", x * 1e-41
    yield "huge", x * 1e34
    yield "scales down to subnormal e4m3", x * torch.logspace(0, -8, 64)[:, None]
    mixed = x.clone()
    mixed[3, 17], mixed[9, 33], mixed[11, 200] = math.nan, math.inf, -math.inf
    yield "NaN and infinities", mixed
    yield "all NaN", x * math.nan
    ties = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = torch.stack([ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0), -ties])
    near[:, 0] = 6.0
    yield "ties", torch.cat([near.repeat(16, 32), torch.full((1, 256), 448 * 6.0)])


def check_hard_tensors(device: str) -> Iterator[Record]:
    """The policy for zeros, tiny numbers, NaN and infinity, and ties, bit by bit."""
    for name, x in hard_tensors():
        for dtype in (torch.float32, torch.bfloat16):
            x = x.to(dtype)
            with poisoned():
                found = kernels.quantise(x.to(device))
            record = same_bits(found, kernels.quantise_reference(x))
            yield {"check": "hard tensors", "case": f"{name} {dtype}", **record}


def check_decode(device: str) -> Iterator[Record]:
    """Every element code with every scale code, one product each: exact, so nothing is flushed."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1)
    elements = torch.arange(16, dtype=torch.uint8).repeat(256, 1)
    packed = elements[:, 0::2] | elements[:, 1::2] << 4
    w = (packed, codes.view(torch.float8_e4m3fn), torch.ones(()))
    expected = NVFP4.decode(w[0], w[1]).T
    on_device = (w[0].to(device), w[1].to(device), w[2].to(device))
    for kind in ("w4a16_vector", "w4a16_portable"):
        for dtype in DTYPES:
            with poisoned():
                x = torch.eye(16, dtype=dtype, device=device)
                y = kernels.matmul_w4a16(x, on_device, None, kind).cpu().float()
            wrong = int((y.nan_to_num(nan=-1) != expected.nan_to_num(nan=-1)).sum())
            yield {
                "check": "decode",
                "case": f"{kind} {dtype}",
                "passed": wrong == 0,
                "wrong": wrong,
            }


def compare(y: Tensor, exact: Tensor, how: str) -> Record:
    """Relative error, and the greatest error in units of the last place of large outputs."""
    dtype, y, size = y.dtype, y.double(), exact.square().mean().sqrt()
    error = (y - exact).abs()
    unit = torch.exp2(exact.abs().log2().floor() - MANTISSA[dtype])
    large = exact.abs() >= size
    relative = (error.square().mean().sqrt() / size).item()
    ulp = (error[large] / unit[large]).max().item()
    passed = relative <= BOUNDS[dtype] and (ulp <= 0.75 or dtype == torch.float32)
    if how in LOOSER and dtype != torch.float32:
        passed = relative <= LOOSER[how]
    return {"passed": passed, "relative_error": relative, "max_ulp": ulp}


def weight(n: int, k: int, device: str) -> Packed:
    packed, scales, tensor_scale = NVFP4.quantize(NVFP4.pad(torch.randn(n, k)))
    return packed.to(device), scales.to(device), tensor_scale.to(device)


def check_products(device: str) -> Iterator[Record]:
    """``permuquant::linear`` by its route, against the fp64 product of the same operands."""
    for rows, n, k in PRODUCTS:
        w = weight(n, k, device)
        for dtype in {torch.bfloat16, DTYPES[(rows + n + k) // 8 % 3]}:
            bias = torch.randn(n, device=device).to(dtype)
            x = torch.randn(rows, k, device=device).to(dtype)
            for scheme in ops.SCHEMES:
                exact = ops.reference(NVFP4, scheme, x.double(), w, bias.double())
                with poisoned():
                    y = torch.ops.permuquant.linear(x, *w, bias, "nvfp4", scheme)
                how = ops.where(x.device, "nvfp4", scheme, rows, dtype)
                case = f"{scheme} {rows}x{n}x{k} {dtype}"
                yield {"check": "products", "case": case, "route": how, **compare(y, exact, how)}


def check_nan(device: str) -> Iterator[Record]:
    """A NaN reaches the outputs of its own row, and no others."""
    w = weight(256, 256, device)
    for rows in (4, 272):
        x = torch.randn(rows, 256, device=device, dtype=torch.bfloat16)
        x[2, 77] = math.nan
        for scheme in ops.SCHEMES:
            with poisoned():
                y = torch.ops.permuquant.linear(x, *w, None, "nvfp4", scheme)
            rest = torch.cat([y[:2], y[3:]])
            passed = bool(y[2].isnan().all()) and bool(rest.isfinite().all())
            yield {"check": "NaN", "case": f"{scheme} {rows} rows", "passed": passed}


def milliseconds(function: Callable[[], object]) -> float:
    """The median of about 40 ms of calls, each with a cold cache."""
    return float(do_bench(function, warmup=10, rep=40, return_mode="median"))


def timings() -> Iterator[Record]:
    """Milliseconds of ``linear`` and of its parts, beside those of a bf16 linear."""
    return (timing(rows, n, k) for rows, n, k in TIMED + VECTORS)


def timing(rows: int, n: int, k: int) -> Record:
    w = weight(n, k, "cuda")
    dense = NVFP4.dequantize(*w).bfloat16()
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    bf16 = milliseconds(lambda: torch.nn.functional.linear(x, dense))
    record: Record = {"shape": [rows, n, k], "bf16": bf16}
    record["quantise"] = milliseconds(lambda: kernels.quantise(x))
    for scheme in ops.SCHEMES:
        call = partial(torch.ops.permuquant.linear, x, *w, None, "nvfp4", scheme)
        took = milliseconds(call)
        route = ops.where(x.device, "nvfp4", scheme, rows)
        record |= {f"{scheme} route": route, scheme: took, f"{scheme} ratio to bf16": took / bf16}
    return record | product_alone(x, w)


def product_alone(x: Tensor, w: Packed) -> Record:
    """The quantised product without quantising the activation."""
    how = ops.where(x.device, "nvfp4", "w4a4", len(x))
    if not how.startswith("w4a4"):
        return {}
    a = kernels.quantise(x)
    kind: Any = how
    took = milliseconds(lambda: kernels.matmul_w4a4(a, w, None, x.dtype, kind))
    flops = 2 * len(x) * len(w[0]) * x.shape[1]
    return {"w4a4 product": took, "w4a4 product TFLOP/s": flops / took / 1e9}


CHECKS: dict[str, Callable[[str], Iterator[Record]]] = {
    "codes": check_codes,
    "hard tensors": check_hard_tensors,
    "decode": check_decode,
    "products": check_products,
    "NaN": check_nan,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check and time the kernels on a CUDA device.")
    parser.add_argument("out", type=Path, help="where to write the JSON result")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all inputs")
    parser.add_argument("--no-timing", action="store_true", help="check only")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    records = [record for check in CHECKS.values() for record in check("cuda")]
    result = {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "seed": options.seed,
        "passed": all(record["passed"] for record in records),
        "failed": [record for record in records if not record["passed"]],
        "checks": records,
        "timings": [] if options.no_timing else list(timings()),
        "seconds": time.monotonic() - started,
    }
    options.out.write_text(json.dumps(result, indent=1))
    print(f"{len(records)} checks, {len(result['failed'])} failed")
    for record in [*result["failed"], *result["timings"]]:
        print(record)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
