"""The linears and fused chains of real models, and ragged ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Case(NamedTuple):
    """Rows [M, K] by weights [N, K], side by side."""

    model: str
    m: int
    outputs: tuple[int, ...]
    k: int
    bias: bool = True

    def __str__(self) -> str:
        n = "+".join(map(str, self.outputs))
        return f"{self.model} {self.m}x{n}x{self.k}" + ("" if self.bias else " no bias")


def block(model: str, rows: Sequence[int], width: int, inner: int, bias: bool) -> Iterator[Case]:
    """The linears of a transformer block: merged Q, K, V, the output, and both of the MLP."""
    for m in rows:
        yield Case(model, m, (width, width, width), width, bias)
        yield Case(model, m, (width,), width, bias)
        yield Case(model, m, (inner,), width, bias)
        yield Case(model, m, (width,), inner, bias)


CASES = (
    *block("FLUX.1-dev", (4096, 512, 1), 3072, 12288, True),
    Case("FLUX.1-dev", 4608, (3072, 3072, 3072), 3072),
    Case("FLUX.1-dev", 4608, (9216,), 3072),
    Case("FLUX.1-dev", 4608, (12288,), 3072),
    Case("FLUX.1-dev", 4608, (3072,), 12288),
    Case("FLUX.1-dev", 4608, (3072,), 15360),
    Case("FLUX.1-dev", 4096, (9216,), 3072),
    Case("FLUX.1-dev", 512, (9216,), 3072),
    Case("FLUX.1-dev", 1, (9216,), 3072),
    Case("FLUX.1-dev", 1, (18432,), 3072),
    *block("SD3.5-large", (4096, 333), 2432, 9728, True),
    Case("SD3.5-large", 2, (14592,), 2432),
    *block("SANA-1.6B", (1024,), 2240, 5600, False),
    Case("SANA-1.6B", 300, (2240,), 2304),
    *block("Z-Image", (4224,), 3840, 10240, False),
    Case("Z-Image", 4224, (10240, 10240), 3840, False),
    Case("Z-Image", 1, (15360,), 256),
    *(Case("ragged", m, (n,), k) for m in (1, 7, 77, 300) for n, k in ((768, 1536), (250, 272))),
    Case("ragged", 77, (16, 250, 48), 112),
)
SMALL = (
    Case("small", 5, (48,), 64),
    Case("small", 3, (16, 40, 8), 48, bias=False),
    Case("small", 1, (250,), 272),
)
SLOW = ("w4a4_portable", "w4a16_portable", "reference")
"""Kinds that are checked at FLUX and ragged shapes alone."""

PROGRAMS = {
    "FLUX.1-dev norm, modulate": "row 3072 | sample 3072 | sample 3072 | layer_norm 0 1e-06"
    " | add 2 1.0 | mul 3 4 | add 5 1 | {} 6",
    "FLUX.1-dev residual, norm, modulate": "row 3072 | row 3072 | sample 3072 | sample 3072"
    " | sample 3072 | mul 1 2 | add 0 5 | layer_norm 6 1e-06 | add 3 1.0 | mul 7 8 | add 9 4"
    " | keep 6 bfloat16 | {} 10",
    "FLUX.1-dev gelu": "row 12288 | gelu_tanh 0 | {} 1",
    "FLUX.1-dev attention, gelu": "row 3072 | row 12288 | gelu_tanh 1 | {} 0 2",
    "SD3.5-large norm, modulate": "row 2432 | sample 2432 | sample 2432 | layer_norm 0 1e-06"
    " | add 2 1.0 | mul 3 4 | add 5 1 | {} 6",
    "SANA-1.6B norm, modulate": "row 2240 | sample 2240 | sample 2240 | layer_norm 0 1e-06"
    " | add 2 1.0 | mul 3 4 | add 5 1 | {} 6",
    "Z-Image norm, scale": "row 3840 | row 3840 | sample 3840 | sample 3840 | sample 3840"
    " | rms_norm 1 1e-05 | mul 5 2 | tanh 3 | mul 6 7 | add 0 8 | rms_norm 9 1e-05 | mul 10 4"
    " | keep 9 bfloat16 | {} 11",
    "Z-Image gate": "row 10240 | row 10240 | silu 0 | mul 2 1 | {} 3",
    "ragged": "row 272 | row 272 | sample 272 | mul 1 2 | add 0 3 | rms_norm 4 1e-06"
    " | keep 4 bfloat16 | {} 5",
}
SMALL_PROGRAMS = ("ragged",)
TOKENS = {"FLUX.1-dev": (1, 4608), "SANA-1.6B": (2, 1024), "Z-Image": (1, 4224), "ragged": (3, 77)}
TARGETS = ("fp8", "nvfp4", "nvfp4_fp8", "nvfp4_half")
