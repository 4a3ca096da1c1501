"""On what was measured: device, clocks, versions."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import pq_compile

Record = dict[str, Any]
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
"""What nvidia-smi is asked for: MHz, MHz, W, W, degrees Celsius."""


def versions() -> Record:
    """Of everything that decides how fast a step is."""
    return {
        "permuquant": pq_compile.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        **{name: _version(name) for name in ("triton", "diffusers")},
    }


def _cudnn() -> int | None:
    found: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device() -> Record:
    """Name, capability, memory, multiprocessors and L2 of the device; on a CPU its name alone."""
    if not torch.cuda.is_available():
        return {"name": platform.processor() or platform.machine(), "type": "cpu"}
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "type": "cuda",
        "capability": [properties.major, properties.minor],
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }


def clocks() -> Record:
    """What nvidia-smi says of the first device now; empty where it says nothing."""
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_clocks(answer.stdout)


def read_clocks(answer: str) -> Record:
    """The first line of nvidia-smi's answer as numbers; what is no number is left out."""
    found: Record = {}
    for name, value in zip(CLOCKS, answer.partition("\n")[0].split(","), strict=False):
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found
