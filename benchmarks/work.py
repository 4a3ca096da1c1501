"""What a step of FLUX.1-dev has to do, counted from its shape: products, attention, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

NVFP4_BYTES = 0.5 + 1 / 16  # of a number, its share of a scale included


@dataclass(frozen=True)
class Scheme:
    """How products run: bits of the GEMM's operands, bytes of an activation that is fed to it."""

    name: str
    bits: int
    operand: float
    scratch: float | None = None  # bytes of a weight that is decoded first; None: read as stored
    weight: float = NVFP4_BYTES
    passes: int = 1  # over what is quantised: NVFP4 needs the peak of the whole tensor first
    finished: bool = False  # products leave in fp32 and are scaled by a kernel of their own

    @property
    def quantised(self) -> bool:
        return self.weight < 2


BF16 = Scheme("bf16", 16, 2, weight=2)
HOPPER = (
    BF16,
    Scheme("w4a8", 8, 1, scratch=1),
    Scheme("w4a4 emulated", 8, 1, scratch=1, passes=2),
    Scheme("w4a4 exact", 16, 2, scratch=2, passes=2, finished=True),
)
BLACKWELL = (BF16, Scheme("w4a4", 4, NVFP4_BYTES, passes=2))


@dataclass(frozen=True)
class Shape:
    """FLUX.1-dev and one step of it; the defaults are 1024 x 1024 and one picture."""

    double: int = 19
    single: int = 38
    width: int = 3072
    image: int = 4096  # tokens
    text: int = 512
    batch: int = 1

    @property
    def rows(self) -> int:
        return self.batch * (self.image + self.text)

    def blocks(self, double: float, single: float) -> float:
        """A sum over blocks, of so much in each kind."""
        return self.double * double + self.single * single


WEIGHTS = {"double": 3 + 1 + 4 + 4, "single": 3 + 4 + 5}
"""Squared widths that a token meets: QKV, out, and the two of the MLP; QKV, MLP in, out."""

OUTPUTS = {"double": 3 + 1 + 4 + 1, "single": 3 + 4 + 1}
"""Widths that its products write."""


class Fused(NamedTuple):
    """A kernel between products: 16-bit widths it reads and writes for a token, widths it feeds to
    a product; ``extra`` ones run only to quantise.
    """

    block: Literal["double", "single"]
    what: str
    reads: int
    writes: int
    feeds: int
    extra: bool = False


KERNELS = (
    Fused("double", "norm, modulate", 1, 0, 1),
    Fused("double", "norm and rotate Q and K, join V", 3, 3, 0),
    Fused("double", "attention's output", 1, 0, 1, extra=True),
    Fused("double", "gate, residual, norm, modulate", 2, 1, 1),
    Fused("double", "GELU", 4, 0, 4),
    Fused("double", "gate, residual", 2, 1, 0),
    Fused("single", "norm, modulate", 1, 0, 1),
    Fused("single", "norm and rotate Q and K", 2, 2, 0),
    Fused("single", "GELU beside attention's output", 5, 0, 5),
    Fused("single", "gate, residual", 2, 1, 0),
)
"""A step, fused as well as reading once allows; norms of the whole model are left out."""


def linear_flops(shape: Shape) -> float:
    """Of the block linears that see every token."""
    return 2 * shape.rows * shape.width**2 * shape.blocks(**WEIGHTS)


def attention_flops(shape: Shape) -> float:
    """Both products of attention over all tokens, in every block."""
    tokens = shape.image + shape.text
    return 4 * shape.rows * tokens * shape.width * shape.blocks(1, 1)


def block_weights(shape: Shape) -> float:
    """Weights of the block linears; a double block has one set for each stream."""
    return shape.width**2 * shape.blocks(2 * WEIGHTS["double"], WEIGHTS["single"])


def modulation_weights(shape: Shape) -> float:
    """Weights that see one row a picture: 6 widths for each stream, 3 in a single block."""
    return shape.width**2 * shape.blocks(12, 3)


def elementwise_bytes(shape: Shape, scheme: Scheme) -> float:
    """What the kernels between products read and write in a step."""
    each = {"double": 0.0, "single": 0.0}
    for kernel in KERNELS:
        if kernel.extra and not scheme.quantised:
            continue
        passes = scheme.passes if kernel.feeds else 1
        each[kernel.block] += 2 * (passes * kernel.reads + kernel.writes)
        each[kernel.block] += scheme.operand * kernel.feeds
    if scheme.finished:
        each = {block: bytes_ + 6 * OUTPUTS[block] for block, bytes_ in each.items()}
    return shape.rows * shape.width * shape.blocks(**each)
