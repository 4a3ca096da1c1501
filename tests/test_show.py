"""The printer: what each line says, and that nothing in it depends on the process."""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pq_compile.plan import Statistics
from pq_compile.show import dtype_name, show
from tests import toy_plans
from tests.conftest import Golden

ROOT = Path(__file__).parent.parent


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, -1)
        hidden = (value * F.silu(gate))[..., None].squeeze(-1)
        result: Tensor = self.down(hidden.to(torch.float32))
        return result


def traced(dynamic: bool | None = None) -> tuple[fx.GraphModule, dict[str, str]]:
    """Dynamo's graph of ``Gated`` and the names of its inputs."""
    found: list[fx.GraphModule] = []

    def record(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(Gated(), backend=record, dynamic=dynamic)(torch.ones(5, 4))
    ends = {
        "up_parameters_weight_": "up.weight",
        "up_parameters_bias_": "up.bias",
        "down_parameters_weight_": "down.weight",
        "l_x_": "x",
    }
    inputs = found[0].graph.find_nodes(op="placeholder")
    names = {n.name: ends[end] for n in inputs for end in ends if n.name.endswith(end)}
    return found[0], names


def test_a_graph_prints_as_lines_one_would_write(golden: Golden) -> None:
    golden(show(*traced()))


def test_a_node_prints_as_its_line() -> None:
    module, names = traced()
    node = next(n for n in module.graph.nodes if n.name == "linear")
    assert show(node, names) == "linear: f32[5, 6] = linear(x, up.weight, up.bias)"


def test_a_symbolic_size_prints_by_name() -> None:
    text = show(*traced(dynamic=True))
    assert re.search(r"^linear: f32\[s\d+, 6\] = linear\(x, up\.weight, up\.bias\)$", text, re.M)


class Opaque:
    """Its repr is an address."""


def test_an_argument_prints_without_addresses_or_repr_noise() -> None:
    odd: Any = ({"k": Opaque()}, (Ellipsis, slice(None, 3), slice(0, 8, 2), 1), F.relu)
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.relu.default, (x, odd[0]), {"f": odd[2]})
    z = graph.call_function(torch.ops.aten.add.Tensor, (y, torch.ones(2, dtype=torch.bfloat16)))
    m = graph.call_method("to", (z, torch.device("cpu")), {"dtype": torch.float16})
    s = graph.call_function(operator.getitem, (m, odd[1]))
    graph.output((s, None, [1.5, 2]))
    assert show(graph).splitlines() == [
        "input x",
        "relu_default = aten.relu(x, {k: <tests.test_show.Opaque object>}, f=relu)",
        "add_tensor = aten.add.Tensor(relu_default, bf16[2])",
        "to = add_tensor.to(cpu, dtype=f16)",
        "getitem = to[..., :3, 0:8:2, 1]",
        "return getitem, None, [1.5, 2]",
    ]


def test_a_submodule_graph_follows_indented() -> None:
    root = nn.Module()
    root.inner = fx.symbolic_trace(nn.ReLU())
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    assert show(fx.GraphModule(root, graph)).splitlines() == [
        "input x",
        "inner = self.inner(x)",
        "return inner",
        "inner:",
        "    input input_1",
        "    relu = relu(input_1, inplace=False)",
        "    return relu",
    ]


def test_groups_print_their_axes_and_a_verdict_word(golden: Golden) -> None:
    golden(show(toy_plans.groups()))


def test_a_plan_prints_every_decision_with_its_reason(golden: Golden) -> None:
    golden(show(toy_plans.plan()))


def test_statistics_print_by_name_and_say_what_is_held_out() -> None:
    moment = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
    seen = Statistics(moment, 32, torch.zeros(8, 3), torch.zeros(4, 3), "run")
    assert show({"b": seen, "a": seen}).splitlines() == [
        f"{name}: 3 channels, 32 rows, second moment min | median | max "
        "1.000e+00 | 4.000e+00 | 1.600e+01; 8 rows to fit, 4 held out by run"
        for name in "ab"
    ]


def test_statistics_of_no_channel_print() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    seen = Statistics(empty, 0, torch.zeros(0, 0), torch.zeros(0, 0), "none")
    assert "median | max none; 0 rows to fit" in show({"a": seen})


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "f32"),
        (torch.bfloat16, "bf16"),
        (torch.uint8, "u8"),
        (torch.float8_e4m3fn, "f8_e4m3fn"),
        (torch.complex64, "c64"),
        (torch.bool, "bool"),
    ],
)
def test_a_dtype_prints_short(dtype: torch.dtype, name: str) -> None:
    assert dtype_name(dtype) == name


def test_another_type_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="no form for int"):
        show(3)


def test_no_line_of_a_value_is_wider_than_the_page() -> None:
    text = show(toy_plans.groups()) + show(toy_plans.plan())
    assert max(map(len, text.splitlines())) <= 100


def test_two_processes_print_the_same_bytes() -> None:
    script = (
        "from tests.test_show import *\n"
        "print(show(fx.symbolic_trace(Gated())), show(toy_plans.groups()), show(toy_plans.plan()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
