"""Check every route on a CUDA device against fp64, in a minute and a half.

    python -m tests.gpu.check_routes result.json

Three checks, each a record ``{"check", "case", "route", "passed", ...measures}``:

* products: ``matmul`` of quantised rows by packed weights, against the fp64 product of the same
  operands, at the shapes of FLUX.1-dev, SD3.5-large, SANA-1.6B and Z-Image, and at ragged ones
* linears: ``linear`` by every route that serves its number of rows
* programs: what is fused into a quantiser, against its definition; codes may differ at ties only

Inputs are drawn anew for every check. Outputs lie on poisoned memory: NaN, or 255 in a code.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from torch import Tensor

from pq_compile import ops, products, routes, scratch
from pq_compile.formats import NVFP4
from pq_compile.routes import TABLE, Route
from pq_compile.rows import parse
from pq_compile.rows import reference as rows_reference
from pq_compile.scratch import Weight
from pq_compile.scratch_text import Precision
from tests.gpu.operands import drawn, packed, poison_pool, poisoned
from tests.gpu.shapes import (
    CASES,
    PROGRAMS,
    SLOW,
    SMALL,
    SMALL_PROGRAMS,
    TARGETS,
    TOKENS,
    Case,
)
from tests.programs import differing, random_program, strays

assert ops.SCHEMES
Record = dict[str, Any]
BOUND = 2e-3
EMULATED = 0.025
"""How far the emulation of W4A4 may be from the exact product."""

MANY = 1 << 16
"""Outputs from which that distance is no matter of chance."""

MOST_DIFFERING = 2e-3
"""Share of the codes of a program that may lie at a tie."""


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def judged(y: Tensor, exact: Tensor) -> Record:
    """Passed if every element is there, and their error within ``BOUND``."""
    error, missing = relative(y, exact), int((~y.isfinite()).sum())
    passed = y.shape == exact.shape and not missing and error <= BOUND
    return {"passed": passed, "relative_error": error, "not_finite": missing}


# ---------------------------------------------------------------- products


def serving(m: int, device: str) -> list[Route]:
    """The rows of the table that multiply ``m`` rows there; all of them on a CPU, by definition."""
    where = routes.here(torch.device(device), "nvfp4", torch.bfloat16, m)
    found = [row for row in TABLE if where.capability is None or row.serves(where)]
    return [row for row in found if row.kind != "reference"]


def wanted(case: Case, route: Route) -> bool:
    return route.kind not in SLOW or case.model in ("FLUX.1-dev", "ragged", "small")


def check_products(cases: Iterable[Case], device: str) -> Iterator[Record]:
    for case in cases:
        weights = [packed(n, case.k, device) for n in case.outputs]
        biases = [torch.randn(n, device=device).bfloat16() for n in case.outputs] * case.bias
        x = torch.randn(case.m, case.k, device=device).bfloat16()
        for route in serving(case.m, device):
            if route.target and wanted(case, route):
                record = {"check": "products", "case": str(case), "route": name_of(route)}
                yield record | product(case, route, x, weights, biases)


def product(
    case: Case, route: Route, x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor]
) -> Record:
    fields = [list(field) for field in zip(*weights, strict=True)]
    poison_pool(case.m * sum(case.outputs), x.device.type)
    with poisoned():
        a = torch.ops.permuquant.rows([x], f"row {case.k} | {route.target} 0")
        y = torch.ops.permuquant.matmul(a, *fields, biases, route.kind, torch.bfloat16)
    found = judged(y, products.reference(a, weights, biases, route.kind, torch.float64))
    defined = rows_reference(parse(f"row {case.k} | {route.target} 0"), [x])
    wrong = differing(a, defined)
    found |= {"wrong_codes": wrong, "passed": found["passed"] and not wrong}
    if route.target == "nvfp4_fp8":
        exact = product_of_nvfp4(x, weights, biases)
        found["distance_from_exact"] = relative(y, exact)
        found["passed"] &= y.numel() < MANY or found["distance_from_exact"] <= EMULATED
    return found


def product_of_nvfp4(x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor]) -> Tensor:
    """The exact W4A4 product in fp64."""
    seen = NVFP4.fake(x.float()).double()
    y = torch.cat([seen @ NVFP4.dequantize(*w).double().T for w in weights], -1)
    return y + torch.cat(list(biases)).double() if biases else y


def check_linears(cases: Iterable[Case], device: str) -> Iterator[Record]:
    """Of the first weight, from an activation in bfloat16, by the name of each route."""
    for case in cases:
        n, k = case.outputs[0], case.k - 8 if case.model == "ragged" else case.k
        w = packed(n, k, device)
        bias = torch.randn(n, device=device).bfloat16() if case.bias else None
        x = torch.randn(case.m, k, device=device).bfloat16()
        where = routes.here(x.device, "nvfp4", x.dtype, case.m)
        for route in serving(case.m, device):
            if routes.choose(route.scheme, where, route.name) != route or not wanted(case, route):
                continue
            poison_pool(case.m * sum(case.outputs), device)
            with poisoned():
                y = torch.ops.permuquant.linear(x, *w, bias, "nvfp4", route.scheme, route.name)
            found = judged(y, linear_in_fp64(route, x, w, bias))
            record = {"check": "linears", "case": str(case), "route": name_of(route)}
            yield record | found


def linear_in_fp64(route: Route, x: Tensor, w: Weight, bias: Tensor | None) -> Tensor:
    """What ``linear`` multiplies by this route, in fp64."""
    biases = [] if bias is None else [bias]
    a: Sequence[Tensor] = [NVFP4.pad(x)]
    if route.target:
        a = rows_reference(parse(f"row {a[0].shape[1]} | {route.target} 0"), a)
    return products.reference(a, [w], biases, route.kind, torch.float64)


def name_of(route: Route) -> str:
    return f"{route.scheme} {route.name}"


# ---------------------------------------------------------------- programs


def check_programs(names: Iterable[str], device: str) -> Iterator[Record]:
    for name in names:
        for target in TARGETS:
            text = PROGRAMS[name].format(target)
            batch, tokens = TOKENS.get(name.split()[0], (2, 4096))
            inputs = drawn(text, batch, tokens, device)
            record = {"check": "programs", "case": name, "route": target}
            yield record | program(text, inputs)


def check_random_programs(count: int, device: str) -> Iterator[Record]:
    """Of ragged widths and parts, in samples of few rows."""
    first = int(torch.randint(0, 2**31, ()))
    for seed in range(first, first + count):
        target: Any = TARGETS[seed % len(TARGETS)]
        widths = [(48, 16), (272,), (1040, 80), (112, 336)][seed // 4 % 4]
        text = str(random_program(seed, target, widths, exact=False)).replace("float16", "bfloat16")
        inputs = drawn(text, 2, 19, device)
        record = {"check": "random programs", "case": f"seed {seed}", "route": target}
        yield record | program(text, inputs) | {"program": text}


def program(text: str, inputs: Sequence[Tensor]) -> Record:
    parsed = parse(text)
    with poisoned():
        found = torch.ops.permuquant.rows(inputs, text)
    defined = rows_reference(parsed, inputs)
    split = len(found) - len(parsed.kept)
    off = strays(parsed, inputs, found[:split])
    differ = differing(found[:1], defined[:1]) / max(1, found[0].numel())
    both = zip(found[split:], defined[split:], strict=True)
    kept = max([0.0, *(relative(a, b.double()) for a, b in both)])
    whole = all(bool(x.float().isfinite().all()) for x in found if x.dtype != torch.uint8)
    passed = not off.scales and not off.codes and differ <= MOST_DIFFERING and kept <= BOUND
    return {
        "passed": passed and whole,
        "codes": off.of,
        "not_nearest": off.codes + off.scales,
        "differing": differ,
        "kept_error": kept,
    }


def check_hard_rows(device: str) -> Iterator[Record]:
    """Zeros, NaN, infinities and numbers at the ends of the range: the codes of the definition."""
    x = torch.randn(12, 272, device=device)
    x[0], x[1], x[2, 3], x[3, 20], x[4, 271] = 0, -0.0, torch.nan, torch.inf, -torch.inf
    x[5], x[6], x[7], x[8] = x[5] * 1e-3, x[6] * 1e-20, torch.nan, torch.inf
    for factor in (1.0, 0.0, 1e-41, 1e-31, 1e34):
        for target in TARGETS:
            text = f"row 272 | {target} 0"
            given = x * factor
            with poisoned():
                found = torch.ops.permuquant.rows([given], text)
            wrong = differing(found, rows_reference(parse(text), [given]))
            record = {"check": "hard rows", "case": f"times {factor:g}", "route": target}
            yield record | {"passed": not wrong, "wrong_codes": wrong}


# ---------------------------------------------------------------- all of it


def warm_up(device: str) -> None:
    """Compile most kernels at once, on all cores: with one they would take minutes."""
    if device == "cpu":
        return
    texts = [text.format(target) for text in PROGRAMS.values() for target in TARGETS]
    texts += [f"row {k} | {target} 0" for k in {case.k for case in CASES} for target in TARGETS]

    def compile_program(text: str) -> None:
        torch.ops.permuquant.rows(drawn(text, 1, 3, device), text)

    def compile_linear(case: Case, route: Route) -> None:
        w = packed(case.outputs[0], case.k, device)
        x = torch.randn(case.m, case.k, device=device).bfloat16()
        torch.ops.permuquant.linear(x, *w, None, "nvfp4", route.scheme, route.name)

    def compile_decoding(outputs: Sequence[int], k: int, bias: bool) -> None:
        weights = [packed(n, k, device) for n in outputs]
        biases = [torch.zeros(n, device=device).bfloat16() for n in outputs] * bias
        for precision in get_args(Precision):
            scratch.decode(weights, biases, precision)

    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(compile_program, text) for text in texts]
        decoded = {(case.outputs, case.k, case.bias) for case in CASES}
        waiting += [pool.submit(compile_decoding, *case) for case in decoded]
        waiting += [
            pool.submit(compile_linear, case, route)
            for case in CASES
            for route in serving(case.m, device)
            if route.kind.startswith("w4a") and wanted(case, route)
        ]
        for one in waiting:
            one.result()
    torch.cuda.synchronize()


def checks(device: str, small: bool) -> dict[str, Callable[[], Iterator[Record]]]:
    cases = SMALL if small else CASES
    names = SMALL_PROGRAMS if small else tuple(PROGRAMS)
    return {
        "products": lambda: check_products(cases, device),
        "linears": lambda: check_linears(cases, device),
        "programs": lambda: check_programs(names, device),
        "random programs": lambda: check_random_programs(8 if small else 32, device),
        "hard rows": lambda: check_hard_rows(device),
    }


def table(records: Sequence[Record]) -> str:
    """A line a case: the relative error by each route, or what was found of the codes."""
    lines = []
    for check in dict.fromkeys(record["check"] for record in records):
        lines.append(f"\n{check}")
        alike = [record for record in records if record["check"] == check]
        for case in dict.fromkeys(record["case"] for record in alike):
            cells = [cell(record) for record in alike if record["case"] == case]
            lines.append(f"  {case:44} {'  '.join(cells)}")
    return "\n".join(lines)


def cell(record: Record) -> str:
    mark = "" if record["passed"] else " FAILED"
    if "relative_error" in record:
        return f"{record['route']} {record['relative_error']:.2e}{mark}"
    if "differing" in record:
        return f"{record['route']} {record['differing']:.1e}/{record['not_nearest']}{mark}"
    return f"{record['route']} {record['wrong_codes']}{mark}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Check every route on a CUDA device.")
    parser.add_argument("out", type=Path, help="where to write the JSON result")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all inputs")
    parser.add_argument("--device", default="cuda", help="cpu: the definitions against themselves")
    parser.add_argument("--small", action="store_true", help="a few small shapes")
    parser.add_argument("--only", nargs="*", default=None, help="some of the checks, by name")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    started, seconds, records = time.monotonic(), {}, list[Record]()
    warm_up(options.device)
    seconds["compiling"] = time.monotonic() - started
    for name, check in checks(options.device, options.small).items():
        if options.only is None or name in options.only:
            begun = time.monotonic()
            records += check()
            seconds[name] = time.monotonic() - begun
    cuda = options.device == "cuda"
    failed = [record for record in records if not record["passed"]]
    result = {
        "device": torch.cuda.get_device_name() if cuda else options.device,
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seed": options.seed,
        "passed": bool(records) and not failed,
        "failed": failed,
        "checks": records,
        "seconds": seconds | {"all": time.monotonic() - started},
    }
    options.out.write_text(json.dumps(result, indent=1))
    print(table(records))
    print(f"{len(records)} checks, {len(failed)} failed, {result['seconds']}")
    for record in failed:
        print(record)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
