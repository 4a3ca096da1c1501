"""Kernels compiled ahead of time, for GPUs that are not here; what their machine code uses."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that was compiled before is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(
    function: Any, types: Mapping[str, str], target: int, warps: int, stages: int, fusion: bool
) -> Any:
    """``function`` for compute capability ``target``; multiples of 16 as they are at launch."""
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, parameter in enumerate(function.params)
        if not (parameter.do_not_specialize_on_alignment or parameter.do_not_specialize)
    }
    signature = {name: types[name] for name in function.arg_names}
    text = ASTSource(function, signature=signature, constexprs={}, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    return triton.compile(text, target=GPUTarget("cuda", target, 32), options=options)


@dataclass(frozen=True)
class Usage:
    """Of a thread: registers, and bytes of local memory that it spills to."""

    registers: int
    spilled: int


def usage(kernel: Any) -> Usage:
    """As the assembler reports it."""
    report = _tool(kernel, "cuobjdump", "-res-usage")
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    assert len(found) == 3, report
    return Usage(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]))


def machine_code(kernel: Any) -> list[str]:
    """Its instructions, each with operands; a label is a line of its own, ending in a colon."""
    lines = []
    for line in _tool(kernel, "nvdisasm", "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            lines.append(f"{label[1]}:")
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(re.sub(r"^@!?U?P\d+\s+", "", instruction[1].strip()))
    return lines


def longest_loop(code: list[str]) -> list[str]:
    """The instructions between a label and the furthest jump back to it."""
    labels = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    jumps = [(i, re.search(r"BRA.*`\((\.L_x_\w+)\)", line)) for i, line in enumerate(code)]
    loops = [(labels[to[1]], i) for i, to in jumps if to and labels.get(to[1], i) < i]
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return [line for line in code[start : end + 1] if not line.endswith(":")]


def _tool(kernel: Any, name: str, option: str) -> str:
    with TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        done = subprocess.run([TOOLS / name, option, binary], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} of Triton {triton.__version__}: {done.stderr.strip()}")
    return done.stdout
