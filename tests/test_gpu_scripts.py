"""The scripts for a GPU, as far as a CPU can run them: that they see what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pq_compile import products, row_kernels, rows
from tests.gpu import check_routes, check_sanitizer
from tests.gpu.check_sanitizer import Found, find, main, read
from tests.gpu.operands import poisoned
from tests.gpu.shapes import CASES, PROGRAMS, TARGETS
from tests.interpreting import interpreter

# ---------------------------------------------------------------- check_routes


def checked(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "result.json"
    code = check_routes.main([str(out), "--device", "cpu", "--small", "--seed", "0", *options])
    return code, json.loads(out.read_text())


def test_definitions_pass_against_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = checked(tmp_path)
    assert code == 0
    assert result["passed"]
    assert {one["check"] for one in result["checks"]} == {
        "products",
        "programs",
        "random programs",
        "hard rows",
    }
    assert f"{len(result['checks'])} checks, 0 failed" in capsys.readouterr().out


def spoil_products(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """The operator's product, and not the fp64 product beside it, is spoilt."""
    right = products.reference

    def wrong(*args: Any) -> Tensor:
        y = right(*args)
        return y if args[-1] == torch.float64 else spoil(y)

    monkeypatch.setattr(products, "reference", wrong)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y * 1.01,
        lambda y: y.index_fill(1, torch.tensor([3]), torch.nan),
        lambda y: y.index_fill(0, torch.tensor([0]), 0.0),
    ],
    ids=["inexact", "unwritten", "zero"],
)
def test_a_wrong_product_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    spoil_products(monkeypatch, spoil)
    code, result = checked(tmp_path, "--only", "products")
    assert code == 1
    assert not any(one["passed"] for one in result["checks"])


def test_a_wrong_code_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rows.reference

    def wrong(*args: Any) -> list[Tensor]:
        found = right(*args)
        found[0].view(torch.uint8)[..., :2] ^= 0xB8  # what is zero too
        return found

    monkeypatch.setattr("pq_compile.ops.rows_reference", wrong)
    code, result = checked(tmp_path, "--only", "programs", "random programs", "hard rows")
    assert code == 1
    failed = {one["check"] for one in result["failed"]}
    assert failed == {"programs", "random programs", "hard rows"}
    assert len(result["failed"]) > len(result["checks"]) / 2


def test_no_check_at_all_is_no_pass(tmp_path: Path) -> None:
    code, result = checked(tmp_path, "--only", "nothing")
    assert (code, result["passed"]) == (1, False)


def test_poison_shows_in_every_dtype() -> None:
    with poisoned():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            assert torch.empty(3, 2, dtype=dtype).float().isnan().all()
            assert torch.ones(2).new_empty((4,), dtype=dtype).float().isnan().all()
        assert torch.empty((), dtype=torch.float32).isnan()
        assert (torch.empty(3, dtype=torch.uint8) == 255).all()
        written = row_kernels.outputs(rows.parse("row 32 | nvfp4 0"), (2,), torch.ones(2, 32))
        assert (written[0] == 255).all()
        assert torch.empty(0).shape == (0,)
    assert torch.empty is not None
    assert torch.zeros(2).new_empty(2).shape == (2,)


def test_the_shapes_are_those_of_the_models() -> None:
    flux = {(case.m, sum(case.outputs), case.k) for case in CASES if case.model == "FLUX.1-dev"}
    assert {(4608, 3072, 15360), (4096, 12288, 3072), (512, 3072, 12288), (1, 18432, 3072)} <= flux
    assert {case.m for case in CASES if case.model == "ragged"} == {1, 7, 77, 300}
    assert all(case.k % 16 == 0 for case in CASES)
    for text in PROGRAMS.values():
        for target in TARGETS:
            rows.parse(text.format(target))


# ---------------------------------------------------------------- check_sanitizer

MEMCHECK = """========= COMPUTE-SANITIZER
rows fp8
launched 40 kinds of kernels
========= ERROR SUMMARY: {} errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
launched 40 kinds of kernels
========= RACECHECK SUMMARY: {0} hazards displayed ({0} errors, {1} warnings)
"""


@pytest.mark.parametrize(
    ("output", "errors", "passed"),
    [
        (MEMCHECK.format(0), 0, True),
        (MEMCHECK.format(3), 3, False),
        (MEMCHECK.format(1).replace("1 errors", "1 error"), 1, False),
        (RACECHECK.format(0, 0), 0, True),
        (RACECHECK.format(2, 0), 4, False),
        (RACECHECK.format(0, 1), 1, False),
        ("launched 40 kinds of kernels\n", None, False),
        ("========= ERROR SUMMARY: 0 errors\n", 0, False),  # nothing ran
    ],
)
def test_a_summary_is_read(output: str, errors: int | None, passed: bool) -> None:
    found = read(output)
    assert (found.errors, found.passed) == (errors, passed)


def test_what_was_launched_is_counted() -> None:
    assert read(MEMCHECK.format(0)) == Found("0 errors", 0, 40)


def tool(path: Path, summary: str) -> str:
    """A tool that runs what follows its options, and then says ``summary``."""
    path.write_text(f'#!/bin/sh\nshift 4\n"$@"\necho "========= {summary}"\n')
    path.chmod(0o755)
    return str(path)


def test_the_tool_is_found_where_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tool(tmp_path / "compute-sanitizer", "ERROR SUMMARY: 0 errors")
    assert find(there) == there
    assert find(str(tmp_path / "elsewhere")) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find(None) == there


def test_a_missing_tool_is_said_clearly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert main([str(out), "--sanitizer", str(tmp_path / "nowhere")]) == 2
    assert "compute-sanitizer is missing" in capsys.readouterr().out
    assert json.loads(out.read_text())["passed"] is False


@pytest.mark.parametrize(("errors", "code"), [(0, 0), (2, 1)])
def test_both_tools_are_run_and_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: int, code: int
) -> None:
    there, out = tool(tmp_path / "any", f"ERROR SUMMARY: {errors} errors"), tmp_path / "out.json"
    launched = [sys.executable, "-c", "print('launched 2 kinds of kernels')"]
    real, seen = subprocess.run, []

    def run(command: list[str], **how: Any) -> Any:
        seen.append(command)
        before = command[: command.index(sys.executable)]
        return real([*before, *launched], **how)

    monkeypatch.setattr(subprocess, "run", run)
    assert main([str(out), "--sanitizer", there]) == code
    assert [command[2] for command in seen if command[0] == there] == ["memcheck", "racecheck"]
    assert all(command[-3:] == ["--inside", "--device", "cuda"] for command in seen)
    result = json.loads(out.read_text())
    assert result["passed"] == (code == 0)
    assert {tool: one["launched"] for tool, one in result["tools"].items()} == {
        "memcheck": 2,
        "racecheck": 2,
    }


@pytest.mark.filterwarnings("ignore")  # idle lanes divide by zero
def test_every_kind_of_kernel_is_launched() -> None:
    with interpreter() as run:
        names = run(names_of_launches)
    for target in TARGETS:
        assert len([name for name in names if name.startswith(f"rows {target} ")]) == 5
    for kind in ("decode fp8", "decode half", "quantise", "w4a4_portable", "w4a16_portable"):
        assert any(name.startswith(kind) for name in names)
    assert any(name.startswith("w4a16_vector fp32") for name in names)


def names_of_launches() -> list[str]:
    """Those with the fewest numbers are launched too."""
    names = []
    for launches in (
        check_sanitizer.rows_launches,
        check_sanitizer.decode_launches,
        check_sanitizer.product_launches,
    ):
        for name, launch in launches("cpu"):
            names.append(name)
            if "every" not in name and "wide" not in name and "19x" not in name:
                launch()
    return names
