"""A made-up result of ``python -m benchmarks``, every part there."""

from __future__ import annotations

from typing import Any

from benchmarks.kinds import KINDS
from benchmarks.results import SCHEMA

Record = dict[str, Any]


def spread(median: float) -> Record:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "count": 3}


def side(name: str, kind: str, wall: float, gigabytes: float) -> Record:
    ours = kind == "permuquant"
    record: Record = {
        "side": name,
        "kind": kind,
        "mode": "default",
        "wall_ms": spread(wall),
        "event_ms": spread(wall),
        "host_ms": 11.0,
        "kernel_ms": 0.9 * wall,
        "split_ms": {one: wall * (7 - i) / 31 for i, one in enumerate(KINDS)},
        "launches": 900,
        "output": {"finite": True, "shape": [1, 4096, 64], "distance": 0.01},
        "memory": {
            "parameter_bytes": gigabytes * 1e9,
            "allocated_bytes": gigabytes * 1.1e9,
            "peak_step_bytes": gigabytes * 1.2e9,
        },
        "compile": {"first_call_s": 120.0},
        "took_s": 200.0,
    }
    if ours:
        freezing = {"peak_bytes": 25e9, "steps_s": {"plan": 1.0, "pack": 20.0}}
        record |= {"outside_us": 40.0, "freezing": freezing, "by_reference": 0}
    return record


def group(model: str, config: Record) -> Record:
    return {
        "model": model,
        "source": "defaults",
        "config": config,
        "resolution": 1024,
        "batch": 1,
        "text_tokens": 512,
        "sides": [
            side("bf16 eager", "eager", 180.0, 23.8),
            side("bf16 torch.compile", "inductor", 130.0, 23.8),
            side("permuquant auto", "permuquant", 90.0, 6.7),
        ],
    }


def work(resolution: int, batch: int, wall: float | None) -> Record:
    found: Record = {"resolution": resolution, "batch": batch}
    return found | ({"missing": "out of memory"} if wall is None else {"wall_ms": spread(wall)})


def sample() -> Record:
    """One record with every part; blocks as in FLUX.1-dev."""
    flux = {"guidance_embeds": True, "num_layers": 19, "num_single_layers": 38}
    kernel = {"kernel": "GELU -> fp8", "shape": [4608, 12288], "us": 50.0, "bytes": 10**8}
    residual = "gate * y + residual + norm + modulate -> nvfp4_fp8"
    rate = {"gb_per_s": 3000.0, "share_of_copy": 0.8, "share_of_equal_copy": 0.9}
    names = ("bf16 cuBLAS", "permuquant")
    return {
        "schema": SCHEMA,
        "device": {"name": "NVIDIA H200", "type": "cuda"},
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "settings": {},
        "parts": {
            "flux": group("FLUX.1-dev", flux),
            "overhead": group("emoji-flux", {"num_layers": 2, "num_single_layers": 4}),
            "models": [group("SANA-1.6B", {"num_layers": 20})],
            "scaling": {
                "model": "FLUX.1-dev",
                "config": flux,
                "sides": [
                    {"side": "bf16", "works": [work(512, 1, 40.0), work(2048, 1, 500.0)]},
                    {"side": "ours", "works": [work(512, 1, 30.0), work(2048, 1, None)]},
                ],
            },
            "gemm": [{"shape": [4608, 9216, 3072], "tflops": {"bf16": 780.0, "scratch": 1270.0}}],
            "modulation": [
                {
                    "shape": [1, 18432, 3072],
                    "us": dict.fromkeys(names, 30.0),
                    "gb_per_s": dict.fromkeys(names, 3000.0),
                    "ratio": 2.5,
                }
            ],
            "bandwidth": {
                "copy_gb_per_s": 3900.0,
                "copy_bytes": 2 << 30,
                "kernels": [kernel | rate, kernel | rate | {"kernel": residual}],
            },
        },
        "skipped": {},
        "failed": {},
    }
