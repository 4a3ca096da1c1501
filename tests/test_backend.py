"""The door: what the backend accepts, refuses, and how users' objects lead to what it did."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pq_compile
from pq_compile import backend
from pq_compile.errors import Refused
from pq_compile.options import Options
from pq_compile.resolve import parameters_of
from tests.models import Denoiser, denoiser, inputs, relative_error, run

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model: Any, **options: Any) -> Any:
    options = {"calibration_calls": 1, "progress": False, "recipe": "rtn", **options}
    return torch.compile(model, backend="permuquant", options=options)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipee": "rtn"}, r"unknown option 'recipee'; did you mean 'recipe'\?; known options"),
        ({"recipe": "permquant"}, r"recipe='permquant' is not one of .*did you mean 'permuquant'"),
        ({"format": "nvfp8"}, r"format='nvfp8' is not one of .*did you mean 'nvfp4'"),
        ({"scheme": "w8a8"}, r"scheme='w8a8' is not one of auto, w4a4, w4a8, w4a16; did you mean"),
        (
            {"route": "fp4"},
            r"route='fp4' is not one of auto, fp8, half, native.*did you mean 'fp8'",
        ),
        ({"route": "half"}, r"route='half' does not serve w4a4 .* without CUDA; there: reference"),
        ({"release_weights": "forget"}, r"release_weights='forget' is not one of backup, drop"),
        ({"alpha": 2.0}, r"alpha=\(2.0,\) must be one or more numbers between 0 and 1"),
        ({"tau": -1.0}, r"tau=-1.0 must be a number of at least 0"),
        ({"recipe": "best", "calibration_calls": 0}, r"calibration_calls must be at least 1"),
        ({"calibration_calls": -1}, r"calibration_calls=-1 must be at least 0"),
        ({"plan": "plan.json"}, r"loading a plan from disk is not supported yet"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        run(compiled(denoiser(), **options), *inputs(0))


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16"])
def test_every_scheme_is_served_and_reported(scheme: str) -> None:
    model = denoiser()
    fast = compiled(model, scheme=scheme, route="reference")
    error = relative_error(run(fast, *inputs(0)), run(denoiser(), *inputs(0)))
    assert 0 < error < 0.3
    report = pq_compile.report(fast).to_dict()
    assert report["summary"]["scheme"] == scheme
    routes = {one["name"]: one["route"] for one in report["linears"]}
    assert routes["blocks.0.up"] == scheme
    assert routes["blocks.0.modulation"] == "w4a16"


def test_eight_bits_of_activation_lose_less_than_four() -> None:
    exact = run(denoiser(), *inputs(0))
    errors = {}
    for scheme in ("w4a4", "w4a8", "w4a16"):
        torch._dynamo.reset()
        errors[scheme] = relative_error(run(compiled(denoiser(), scheme=scheme), *inputs(0)), exact)
    assert errors["w4a16"] < errors["w4a8"] < errors["w4a4"]


def test_training_is_refused() -> None:
    model = denoiser().requires_grad_(True).train()
    with pytest.raises(Refused, match=r"inference backend.*under torch.no_grad\(\)"):
        compiled(model)(*inputs(0))


def test_frozen_parameters_need_no_no_grad() -> None:
    assert compiled(denoiser())(*inputs(0)).shape == (2, 12, 8)


def test_autocast_is_refused() -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(Refused, match=r"autocast is on for 'cpu'; cast the model instead"),
    ):
        run(compiled(denoiser()), *inputs(0))


def test_meta_tensors_are_refused() -> None:
    model = denoiser().to("meta")
    with pytest.raises(Refused, match=r"on the meta device; load real weights first"):
        run(compiled(model), *(x.to("meta") for x in inputs(0)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_while_calibrating(value: float) -> None:
    fast = compiled(denoiser(), recipe="permuquant", calibration_calls=2)
    x, condition = inputs(0)
    x[0, 0, 0] = value
    with pytest.raises(Refused, match=r"the input x of call 1 holds NaN or Inf"):
        run(fast, x, condition)
    assert run(fast, *inputs(0)).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    model = denoiser()
    model.blocks[1].up.weight[3, 4] = value
    with pytest.raises(Refused, match=r"weight blocks\.1\.up\.weight holds NaN or Inf"):
        run(compiled(model), *inputs(0))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize(
    ("model", "x", "why"),
    [
        (Convolutions(), torch.randn(1, 3, 8, 8), r"it has no linear|conv"),
        (Small(), torch.randn(2, 4, 16), r"fc: its 256 weights are fewer than 4,096"),
    ],
)
def test_a_model_with_nothing_to_quantise_is_refused(model: nn.Module, x: Tensor, why: str) -> None:
    with pytest.raises(Refused, match=rf"nothing in this model can be quantised \(.*({why})"):
        run(compiled(model), x)


class Broken(nn.Module):
    """A graph break parts it: embedder here, denoiser there."""

    def __init__(self) -> None:
        super().__init__()
        self.small = Small().double()
        self.inner = denoiser()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.small(condition[:, None, :16])[..., :8]
        torch._dynamo.graph_break()
        out: Tensor = self.inner(x, condition)
        return out


def test_a_part_of_a_model_may_have_nothing_to_quantise() -> None:
    model = Broken()
    fast = compiled(model)
    for _ in range(3):
        run(fast, *inputs(0))
    summary = pq_compile.report(fast).to_dict()["summary"]
    assert summary["linears_quantised"] > 0
    assert summary["phase"] == "serving"


@pytest.mark.parametrize("call", [pq_compile.freeze, pq_compile.report, pq_compile.refresh])
def test_asking_before_any_call_says_so(call: Callable[[Any], Any]) -> None:
    with pytest.raises(Refused, match=r"nothing was observed yet"):
        call(compiled(denoiser()))


def test_an_explicit_calibration_without_a_call_says_so() -> None:
    fast = compiled(denoiser(), recipe="permuquant")
    with pytest.raises(Refused, match=r"nothing was observed yet"), pq_compile.calibration(fast):
        pass


def test_an_object_without_a_module_is_refused() -> None:
    with pytest.raises(Refused, match=r"found no module behind 'int'"):
        pq_compile.report(3)


# ---------------------------------------------------------------- from the user's object


MODEL = Denoiser()


def uses_a_global(x: Tensor, condition: Tensor) -> Tensor:
    out: Tensor = MODEL(x, condition)
    return out


def test_every_way_to_hold_a_model_finds_its_parameters() -> None:
    model = denoiser()

    def closure(x: Tensor) -> Any:
        return model(x, x)

    class Holder:
        def __init__(self) -> None:
            self.model = model

        def step(self, x: Tensor) -> Any:
            return self.model(x, x)

    models = {"denoiser": [model]}

    def container(x: Tensor) -> Any:
        return models["denoiser"][0](x, x)

    def optimized(held: Any) -> Any:
        return torch.compile(held, backend="eager")

    expected = {id(p) for p in model.parameters()}
    held_by = (model, optimized(model), closure, optimized(closure), model.forward)
    for held in (*held_by, Holder(), Holder().step, container):
        assert {id(p) for p in parameters_of(held).values()} == expected
    assert {id(p) for p in parameters_of(uses_a_global).values()} == {
        id(p) for p in MODEL.parameters()
    }


def test_compiling_in_place_and_by_function_is_found() -> None:
    model = denoiser()
    model.compile(backend="permuquant", options={"recipe": "rtn"})
    run(model, *inputs(0))
    assert pq_compile.report(model).to_dict()["summary"]["phase"] == "serving"

    other = denoiser(1)

    def call(x: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = other(x, condition) * 2
        return out

    fast = compiled(call)
    run(fast, *inputs(0))
    for held in (fast, call, other):
        linears = pq_compile.report(held).to_dict()["linears"]
        assert "blocks.0.to_q" in {linear["name"] for linear in linears}


def test_the_entry_point_is_declared() -> None:
    (entry,) = (
        e
        for e in importlib.metadata.entry_points(group="torch_dynamo_backends")
        if e.name == "permuquant"
    )
    assert entry.value == "pq_compile.backend:permuquant"


def test_options_and_mode_are_accepted() -> None:
    model = denoiser().requires_grad_(False)
    fast = torch.compile(model, backend="permuquant", mode="reduce-overhead")
    assert torch.equal(run(fast, *inputs(0)), run(model, *inputs(0)))


def test_the_environment_stands_in_for_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMUQUANT_DUMP", "somewhere")
    assert Options.parse({}).dump == Path("somewhere")
    assert Options.parse({"dump": "here"}).dump == Path("here")


def test_importing_the_package_imports_no_pass() -> None:
    code = "import sys, pq_compile; sys.exit(any(m.split('.')[0] == 'passes' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64).requires_grad_(False)
        self.down = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x))
        return out


@pytest.mark.parametrize("slices", [(), ("up",), ("up", "down")], ids=str)
def test_a_graph_is_compiled_once_none_of_its_weights_is_yet_to_be_released(
    slices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, compilations = Pair(), []
    for name in slices:  # a slice of a larger memory is never released
        memory = torch.randn(65, 64)
        getattr(model, name).weight = nn.Parameter(memory[1:], requires_grad=False)

    def compile_(lowered: Any, *rest: Any) -> Any:
        compilations.append(len(seen))
        return lowered.lowered

    monkeypatch.setattr(backend, "compile_lowered", compile_)
    fast, seen = compiled(model), list[Tensor]()
    seen += (run(fast, torch.randn(2, 3, 64)) for _ in range(3))
    assert compilations == [0 if len(slices) == 2 else 1]


# ---------------------------------------------------------------- dumps


def test_dumps_are_byte_identical_over_runs_and_processes(tmp_path: Path) -> None:
    script = """
import sys, torch
from tests.models import denoiser, inputs
for folder in sys.argv[1:]:
    torch._dynamo.reset()
    options = {"dump": folder, "recipe": "permuquant", "calibration_calls": 4, "progress": False}
    fast = torch.compile(denoiser(), backend="permuquant", options=options)
    with torch.no_grad():
        for seed in range(6):
            fast(*inputs(seed // 2))
"""
    for folders in (["a", "b"], ["c"]):
        paths = [str(tmp_path / folder) for folder in folders]
        subprocess.run([sys.executable, "-c", script, *paths], check=True)
    first = {p.relative_to(tmp_path / "a"): p for p in sorted((tmp_path / "a").rglob("*.*"))}
    stages = (
        "00_capture",
        "01_groups",
        "01_pins",
        "02_statistics",
        "03_plan",
        "04_folded",
        "05_lowered",
    )
    for stage in stages:
        assert any(stage in str(name) for name in first), stage
    for other in ("b", "c"):
        assert {p.relative_to(tmp_path / other) for p in (tmp_path / other).rglob("*.*")} == set(
            first
        )
        for name, path in first.items():
            if path.suffix != ".html":  # holds timings
                assert path.read_bytes() == (tmp_path / other / name).read_bytes(), name
