"""A FLUX transformer without weights, and inputs to call it with, from its ``config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import Refused

KNOWN = "FluxTransformer2DModel"


def flux_on_meta(
    folder: Path, batch: int, image_tokens: int, text_tokens: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The bf16 model on the meta device and the keyword arguments of one call.

    Raises ``Refused`` where ``folder`` holds no config of a ``FluxTransformer2DModel``.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise Refused(f"permuquant: no config.json in {folder}: give a model's folder with --model")
    name = json.loads(config.read_text()).get("_class_name")
    if name != KNOWN:
        raise Refused(
            f"permuquant: {config} describes {name}, and the command line makes inputs for {KNOWN} "
            "only; from Python: pq_compile.explain(model, *args, **kwargs)"
        )
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError as error:
        raise Refused(f"permuquant: {error}: pip install 'permuquant[demo]'") from error
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
        nn.Module.to(model, torch.bfloat16)  # diffusers' own ``to`` warns even where all is well
        model.eval().requires_grad_(False)
        shape = model.config
        inputs = {
            "hidden_states": torch.zeros(batch, image_tokens, shape.in_channels),
            "encoder_hidden_states": torch.zeros(batch, text_tokens, shape.joint_attention_dim),
            "pooled_projections": torch.zeros(batch, shape.pooled_projection_dim),
            "timestep": torch.zeros(batch),
        }
        if shape.guidance_embeds:
            inputs["guidance"] = torch.zeros(batch)
        inputs = {key: value.to(torch.bfloat16) for key, value in inputs.items()}
        inputs["img_ids"] = torch.zeros(image_tokens, 3)
        inputs["txt_ids"] = torch.zeros(text_tokens, 3)
    return model, {**inputs, "return_dict": False}
