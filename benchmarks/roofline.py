"""A step of FLUX.1-dev on paper: work counted from its shape, rates stated with their sources.

    python -m benchmarks.roofline [FILES.json]

``time = sum over kinds of work / rate``, nothing overlapped. Every figure is a projection: no
kernel of ours has run on an RTX 5090 or a B200. Elementwise kernels are given the share of the
memory's bandwidth that the step of a measured FILE reaches; without one, a share that is assumed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import results, tables
from .work import (
    BF16,
    BLACKWELL,
    HOPPER,
    NVFP4_BYTES,
    Scheme,
    Shape,
    attention_flops,
    block_weights,
    elementwise_bytes,
    linear_flops,
    modulation_weights,
)

LABEL = "projection"

Record = dict[str, Any]

ASSUMED_SHARE = 0.75  # of the memory's bandwidth, where no measured step is given


@dataclass(frozen=True)
class Device:
    """Dense peak TFLOP/s by operand bits, GB/s, attention TFLOP/s; what of a peak GEMMs reach."""

    name: str
    tflops: Mapping[int, float]
    gb_per_s: float
    attention: float  # 16-bit, as flash kernels reach it
    reached: Mapping[int, float]  # share of the peak that GEMMs of this size reach
    source: str


DEVICES = (
    Device(
        "H100 SXM",
        {16: 989, 8: 1979},
        3350,
        550,
        {16: 0.76, 8: 0.69},
        "peaks: NVIDIA's data sheet; shares: cuBLAS measured on FLUX shapes, 750 and 1370 TFLOP/s",
    ),
    Device(
        "H200 SXM",
        {16: 989, 8: 1979},
        4800,
        550,
        {16: 0.76, 8: 0.69},
        "peaks: NVIDIA's data sheet; shares: those of the H100",
    ),
    Device(
        "RTX 5090",
        {16: 210, 8: 419, 4: 1676},
        1792,
        195,
        {16: 1.0, 8: 0.9, 4: 0.75},
        "peaks: NVIDIA's architecture paper, fp8 with fp32 sums assumed twice bf16; bf16 measured "
        "at 224 to 236; FP4 by CUTLASS kernels of QuTLASS, 1280 TFLOP/s",
    ),
    Device(
        "B200",
        {16: 2250, 8: 4500, 4: 9000},
        8000,
        1200,
        {16: 0.65, 8: 0.6, 4: 0.5},
        "peaks: NVIDIA's data sheet; 16 and 4 bits by FlashInfer, 1453 and 4500 TFLOP/s; attention "
        "and fp8 assumed",
    ),
)


def milliseconds(
    shape: Shape, device: Device, scheme: Scheme, share: float, bound: bool = False
) -> dict[str, float]:
    """Of a step, by kind of work; ``bound`` takes every peak as reached."""
    reached = 1.0 if bound else device.reached[scheme.bits]
    attention = device.tflops[16] if bound else device.attention
    rate = device.gb_per_s * (1.0 if bound else share)
    decoded = 0.0 if scheme.scratch is None else NVFP4_BYTES + scheme.scratch
    return {
        "gemm": linear_flops(shape) / (device.tflops[scheme.bits] * reached) / 1e9,
        "attention": attention_flops(shape) / attention / 1e9,
        "elementwise": elementwise_bytes(shape, scheme) / rate / 1e6,
        "decode": block_weights(shape) * decoded / rate / 1e6,
        "matvec": modulation_weights(shape) * scheme.weight / rate / 1e6,
    }


def project(shape: Shape, shares: Mapping[str, float] | None = None) -> list[Record]:
    """A record for every device and scheme; ``shares`` of the memory's bandwidth that kernels
    reach: of "bf16" and of "ours".
    """
    shares = shares or {}
    records: list[Record] = []
    for device in DEVICES:
        bf16 = 0.0
        for scheme in BLACKWELL if 4 in device.tflops else HOPPER:
            share = shares.get("ours" if scheme.quantised else "bf16", ASSUMED_SHARE)
            split = milliseconds(shape, device, scheme, share)
            total = sum(split.values())
            bf16 = bf16 or total
            least = sum(milliseconds(shape, device, scheme, 1.0, bound=True).values())
            records.append(
                {
                    "label": LABEL,
                    "device": device.name,
                    "scheme": scheme.name,
                    "split_ms": split,
                    "step_ms": total,
                    "bound_ms": least,
                    "ratio": bf16 / total,
                    "share": share,
                    "source": device.source,
                }
            )
    return records


def shape_of(group: Record) -> Shape:
    """The step that a measured group ran."""
    config = group["config"]
    return Shape(
        double=config.get("num_layers", 19),
        single=config.get("num_single_layers", 38),
        image=(group["resolution"] // 16) ** 2,
        text=group["text_tokens"],
        batch=group["batch"],
    )


def measured_shares(record: Record) -> dict[str, float]:
    """What share of the memory's bandwidth the elementwise kernels of a measured step reach.

    Bytes are those of ``elementwise_bytes``: a kernel that reads more than it must has a lower
    share. Empty where the device is none of ``DEVICES`` or no kernels were recorded.
    """
    device = next((d for d in DEVICES if d.name.split()[0] in record["device"]["name"]), None)
    group = record["parts"].get("flux")
    if device is None or group is None:
        return {}
    found: dict[str, float] = {}
    for side in group["sides"]:
        name, scheme = {
            "bf16 torch.compile": ("bf16", BF16),
            "permuquant auto": ("ours", HOPPER[1]),
        }.get(side["side"], ("", BF16))
        if name and "split_ms" in side:
            took = side["split_ms"]["elementwise"] + side["split_ms"]["quantise"]
            moved = elementwise_bytes(shape_of(group), scheme)
            found[name] = moved / took / 1e6 / device.gb_per_s
    return found


def text(records: Sequence[Record], shares: Mapping[str, float]) -> str:
    """The table of a projection, labelled as one."""
    rows = [
        (
            f"{r['device']}, {r['scheme']} ({LABEL})",
            *r["split_ms"].values(),
            r["step_ms"],
            r["ratio"],
            r["bound_ms"],
        )
        for r in records
    ]
    head = (LABEL, *records[0]["split_ms"], "step ms", "times faster than bf16", "bound ms")
    how = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    how = f"measured: {how}" if shares else f"assumed: {ASSUMED_SHARE:.0%}"
    return (
        f"FLUX.1-dev, 1024 px, batch 1: a {LABEL}, not a measurement. Elementwise kernels at a "
        f"share of the memory's bandwidth that is {how}; bound: every peak reached.\n\n"
        f"{tables.table(head, rows)}"
    )


def main(arguments: Sequence[str]) -> int:
    """Print the projection, by the measured shares of the last file that has them."""
    shares: dict[str, float] = {}
    for name in arguments:
        record = results.read(Path(name))
        shares = (measured_shares(record) if record else {}) or shares
    print(text(project(Shape(), shares), shares))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
