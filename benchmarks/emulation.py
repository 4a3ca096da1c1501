"""``python -m benchmarks.emulation OUT.json``: how far W4A4 emulated in fp8 is from exact W4A4.

Every block linear of emoji-flux, a trained model, on the inputs that it reads while painting:
``||emulated - exact|| / ||exact||`` of its output, both by the definition in plain torch. Runs on a
CPU in a minute.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pq_compile import emoji_flux, products
from pq_compile.formats import NVFP4
from pq_compile.rows import parse, reference

TIMES = (1.0, 0.6, 0.2)
KINDS = {"nvfp4_fp8": "fp8", "nvfp4_half": "half"}


def distance(x: Tensor, weight: Tensor) -> float:
    """Of the products of ``x`` [M, K] with ``weight`` [N, K], both in NVFP4."""
    packed = NVFP4.quantize(weight.float())

    def product(target: str) -> Tensor:
        rows = reference(parse(f"row {x.shape[1]} | {target} 0"), [x.float()])
        return products.reference(rows, [packed], [], KINDS[target], torch.float32)

    exact = product("nvfp4_half")
    return float((product("nvfp4_fp8") - exact).norm() / exact.norm())


def measure() -> dict[str, float]:
    """The largest distance of every block linear over ``TIMES``, by name."""
    model = emoji_flux.load_model(emoji_flux.DEFAULT_FOLDER, "cpu")
    prompts = emoji_flux.load_prompts(emoji_flux.DEFAULT_FOLDER, device="cpu").chunks(2)[0]
    noise = emoji_flux.starting_noise(2, 0, "cpu")
    found: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(linear: nn.Module, given: tuple[Tensor, ...], _: Any) -> None:
            if given[0].ndim == 3 and isinstance(linear.weight, Tensor):
                x = given[0].flatten(0, 1)
                found[name] = max(found.get(name, 0.0), distance(x, linear.weight))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split(".")):
            module.register_forward_hook(watch(name))
    with torch.no_grad():
        for time in TIMES:
            emoji_flux.velocity(model, prompts)(noise, time)
    return found


def main(out: str) -> None:
    found = measure()
    worst = max(found, key=found.__getitem__)
    mean = sum(found.values()) / len(found)
    print(f"{len(found)} linears: mean {mean:.2%}, largest {found[worst]:.2%} ({worst})")
    record = {"mean": mean, "largest": found[worst], "linears": found}
    Path(out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
