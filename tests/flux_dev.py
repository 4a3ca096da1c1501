"""Capture and propagate FLUX.1-dev at its real size on meta tensors; print the figures as JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from passes.capture import capture
from passes.propagate import propagate

IMAGE, TEXT = 4096, 512  # tokens at 1024 x 1024


def main() -> None:
    """Seconds in capture and propagate, peak memory in GiB, and the free share of block FLOPs."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16).eval()
        inputs = {
            "hidden_states": torch.empty(1, IMAGE, 64, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.empty(1, TEXT, 4096, dtype=torch.bfloat16),
            "pooled_projections": torch.empty(1, 768, dtype=torch.bfloat16),
            "timestep": torch.empty(1, dtype=torch.bfloat16),
            "guidance": torch.empty(1, dtype=torch.bfloat16),
            "img_ids": torch.empty(IMAGE, 3, dtype=torch.bfloat16),
            "txt_ids": torch.empty(TEXT, 3, dtype=torch.bfloat16),
        }
    figures: dict[str, Any] = {}

    def backend(module: torch.fx.GraphModule, examples: list[Any]) -> Any:
        start = time.process_time()
        graph = capture(module, examples)
        captured = time.process_time()
        groups = propagate(graph, examples)
        propagated = time.process_time()
        free = {leaf for group in groups.groups if group.free for leaf in group.leaves}
        blocks = [linear for linear in graph.linears if linear.in_block]
        movable = [
            linear
            for linear in blocks
            if all(segment.leaf in free for segment in groups.segments[linear.input_axis])
        ]
        figures.update(
            seconds_capture=captured - start,
            seconds_propagate=propagated - captured,
            linears=len(graph.linears),
            groups=len(groups.groups),
            free_share=sum(line.flops for line in movable) / sum(line.flops for line in blocks),
        )
        return module.forward

    start = time.process_time()
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
        compiled(**inputs)
    figures["seconds"] = time.process_time() - start
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()
