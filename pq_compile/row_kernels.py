"""Row programs on a device: the kernels of ``row_text``, loaded once and launched.

``run`` is ``rows.reference`` by one kernel, or by two where NVFP4 needs the peak of all rows first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .errors import Refused
from .generated import Launch, Spec, empty, function, remember, spec
from .row_text import Phase, RowKernel, source
from .rows import Program, Target, lead_of, parse


@cache
def load(kernel: RowKernel) -> Any:
    """The Triton function of ``kernel``."""
    return function(kernel.name, source(kernel))


def tuned(program: Program, phase: Phase, device: torch.device) -> RowKernel:
    """How many rows an instance takes, and how many warps hold one: measured on a Hopper GPU.

    Short rows two by two, as the second waits while the first is reduced.
    """
    widest = max(program.width, *program.widths)
    short = widest <= 4096
    warps = 4 if short else 8 if widest <= 12288 else 16
    if phase != "once":
        warps = 2 if short else 8
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return RowKernel(program, phase, 2 if short else 1, warps, instruction=fast)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a program runs on inputs of given shapes and strides: everything but the tensors."""

    quantised: tuple[Spec, ...]  # the rows, as [M, ...]
    kept: tuple[Spec, ...]
    lead: tuple[int, ...]
    copied: tuple[int, ...]  # inputs whose last dimension has gaps
    strides: tuple[tuple[int, int], ...]  # of each input over samples and rows; 0 where shared
    rows: int  # of a sample
    launches: tuple[Launch, ...]  # one for each phase; none if there are no rows


_PLANS: dict[Any, Plan] = {}


def run(text: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``rows.reference`` of the program spelled ``text`` on a CUDA device (or by Triton's
    interpreter); same shapes and dtypes.

    Codes equal the reference's but where the fp32 arithmetic of the steps, in another order, falls
    on the other side of a tie.
    """
    quantised, kept, lead = run_flat(text, inputs)
    return [*(x.view(*lead, x.shape[1]) if x.ndim else x for x in quantised), *kept]


def run_flat(
    text: str, inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], tuple[int, ...]]:
    """The quantised rows [M, ...], the values kept [..., K], and the sizes ``...`` of M rows."""
    x = inputs[0]
    key = (text, x.device, *[(one.shape, one.stride(), one.dtype) for one in inputs])
    plan = _PLANS.get(key)
    if plan is None:
        plan = remember(_PLANS, key, _plan(parse(text), inputs))
    device = x.device
    quantised = [empty(one, device) for one in plan.quantised]
    kept = [empty(one, device) for one in plan.kept]
    if not plan.launches:
        return quantised, kept, plan.lead
    given: list[Tensor | int] = []
    addresses = 0
    for i, (sample, row) in enumerate(plan.strides):
        one = inputs[i].contiguous() if i in plan.copied else inputs[i]
        addresses |= one.data_ptr()
        given += (one, sample, row)
    if len(plan.launches) == 1:
        plan.launches[0]([*given, *kept, *quantised, plan.rows], addresses)
        return quantised, kept, plan.lead
    count = plan.launches[0].instances
    peak = empty(spec((count,), torch.int32), device)
    plan.launches[0]([*given, *kept, peak, plan.rows], addresses)
    three = (quantised[0], quantised[1], quantised[-1])
    plan.launches[1]([*given, peak, *three, count, plan.rows], addresses)
    return quantised, kept, plan.lead


def _plan(program: Program, inputs: Sequence[Tensor]) -> Plan:
    lead = lead_of(inputs)
    if len(lead) > 2:
        raise Refused(
            "permuquant: a row program takes rows of 2 or 3 dimensions, not of shape "
            f"{[*lead, inputs[0].shape[-1]]}"
        )
    samples, rows = (1, lead[0]) if len(lead) == 1 else (math.prod(lead[:-1]), lead[-1])
    copied = tuple(i for i, x in enumerate(inputs) if x.stride(-1) != 1 and x.shape[-1] != 1)
    like = [torch.empty(x.shape, device="meta") if i in copied else x for i, x in enumerate(inputs)]
    strides = tuple(_strides(x, len(lead) + 1) for x in like)
    made = outputs(program, lead, like[0].to("meta"))
    flat = [x.reshape(samples * rows, x.shape[-1]) if x.ndim else x for x in made]
    split = len(made) - len(program.kept)
    quantised = tuple(spec(x.shape, x.dtype) for x in flat[:split])
    kept = tuple(spec(x.shape, x.dtype) for x in made[split:])
    phases: tuple[Phase, ...] = ("peak", "codes")
    if program.target in ("fp8", "none"):
        phases = ("once",)
    device = inputs[0].device
    kernels = [tuned(program, phase, device) for phase in phases]
    launches = [
        Launch(
            load(kernel),
            (triton.cdiv(rows, kernel.rows), samples),
            num_warps=kernel.warps,
            # NOTE without the instruction, a fused multiply-add would round a scale of NVFP4 once
            # where its definition rounds twice
            enable_fp_fusion=kernel.instruction,
        )
        for kernel in kernels
        if samples * rows
    ]
    return Plan(quantised, kept, lead, copied, strides, rows, tuple(launches))


def _strides(x: Tensor, rank: int) -> tuple[int, int]:
    """The steps of an input over samples and rows: 0 where it is shared."""
    sizes = (1,) * (rank - x.ndim) + tuple(x.shape)
    steps = (0,) * (rank - x.ndim) + x.stride()
    sample = steps[0] if rank == 3 and sizes[0] != 1 else 0
    return sample, steps[-2] if sizes[-2] != 1 else 0


def outputs(program: Program, lead: Sequence[int], x: Tensor) -> list[Tensor]:
    """Room for what ``run`` returns, for rows of shape ``lead``, on the device of ``x``."""
    k = program.width
    quantised: dict[Target, list[tuple[tuple[int, ...], torch.dtype]]] = {
        "none": [],
        "fp8": [((*lead, k), torch.float8_e4m3fn), ((*lead, 1), torch.float32)],
        "nvfp4_fp8": [((*lead, k), torch.float8_e4m3fn), ((*lead, 1), torch.float32)],
        "nvfp4_half": [((*lead, k), torch.bfloat16), ((), torch.float32)],
        "nvfp4": [
            ((*lead, k // 2), torch.uint8),
            ((*lead, k // 16), torch.float8_e4m3fn),
            ((), torch.float32),
        ],
    }
    kept = [((*lead, program.widths[value]), dtype) for value, dtype in program.kept]
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in [*quantised[program.target], *kept]]
