"""The models that are measured: their shapes, random weights of a fixed seed, and their inputs.

Weights are drawn on the device itself, in bf16, by the initialisation that each class has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A class of diffusers, the settings that differ from its defaults, and where they stand.

    ``blocks`` are the settings that count repeated blocks; ``inputs`` makes the arguments of one
    denoiser step.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    blocks: tuple[str, ...]
    source: str
    text: int  # tokens of the prompt
    inputs: Callable[[Model, Work, str], Inputs]

    def with_blocks(self, *counts: int | None) -> Model:
        """The same model with fewer blocks; None leaves a count as it is."""
        given = zip(self.blocks, counts, strict=False)
        return replace(self, config={**self.config, **{k: n for k, n in given if n is not None}})

    @property
    def settings(self) -> dict[str, Any]:
        """What differs from the defaults, and how many blocks there are."""
        return {**{name: _config(self, name) for name in self.blocks}, **self.config}


@dataclass(frozen=True)
class Work:
    """One denoiser step: a picture of ``resolution`` squared pixels, ``batch`` at once."""

    resolution: int = 1024
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.resolution} px, batch {self.batch}"


def build(model: Model, device: str) -> nn.Module:
    """The model with bf16 weights drawn on ``device``, the same every time."""
    import diffusers

    default = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            built: nn.Module = getattr(diffusers, model.class_name)(**model.config)
            for name, parameter in built.named_parameters():
                if name.endswith("pad_token"):  # left as allocated
                    nn.init.normal_(parameter, std=0.02)
    finally:
        torch.set_default_dtype(default)
    nn.Module.to(built, torch.bfloat16)  # of diffusers' own ``to``, without its warnings
    return built.eval().requires_grad_(False)


def inputs(model: Model, work: Work, device: str) -> Inputs:
    """Keyword arguments of one step, the same every time."""
    torch.manual_seed(SEED + 1)
    return {**model.inputs(model, work, device), "return_dict": False}


def call(fast: Callable[..., Any], given: Inputs) -> Callable[[], Tensor]:
    """A step without gradients that returns the first tensor of the model's output."""

    def step() -> Tensor:
        with torch.no_grad():
            out = fast(**given)
        while not isinstance(out, Tensor):
            out = out[0]
        return out

    return step


def _noise(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def _config(model: Model, name: str) -> Any:
    """The setting ``name`` that the model is built with, given or by default."""
    import inspect

    import diffusers

    if name in model.config:
        return model.config[name]
    return inspect.signature(getattr(diffusers, model.class_name)).parameters[name].default


def _flux(model: Model, work: Work, device: str) -> Inputs:
    side, batch = work.resolution // 16, work.batch
    ids = torch.zeros(side, side, 3, device=device, dtype=torch.bfloat16)
    ids[..., 1] += torch.arange(side, device=device)[:, None]
    ids[..., 2] += torch.arange(side, device=device)
    size = {name: _config(model, name) for name in ("in_channels", "joint_attention_dim")}
    pooled = _config(model, "pooled_projection_dim")
    # 4.0 and 0.5, times 1000, are numbers of bf16: eager and fused code embed the same
    guidance = torch.full((batch,), 4.0, device=device, dtype=torch.bfloat16)
    return {
        "hidden_states": _noise(device, batch, side * side, size["in_channels"]),
        "encoder_hidden_states": _noise(device, batch, model.text, size["joint_attention_dim"]),
        "pooled_projections": _noise(device, batch, pooled),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=torch.bfloat16),
        "guidance": guidance if _config(model, "guidance_embeds") else None,
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(model.text, 3, device=device, dtype=torch.bfloat16),
    }


def _latents(model: Model, work: Work, device: str, shrinks: int) -> Tensor:
    side = work.resolution // shrinks
    return _noise(device, work.batch, _config(model, "in_channels"), side, side)


def _sd3(model: Model, work: Work, device: str) -> Inputs:
    joint = _config(model, "joint_attention_dim")
    pooled = _config(model, "pooled_projection_dim")
    return {
        "hidden_states": _latents(model, work, device, 8),
        "encoder_hidden_states": _noise(device, work.batch, model.text, joint),
        "pooled_projections": _noise(device, work.batch, pooled),
        "timestep": torch.full((work.batch,), 500.0, device=device),
    }


def _sana(model: Model, work: Work, device: str) -> Inputs:
    captions = _config(model, "caption_channels")
    return {
        "hidden_states": _latents(model, work, device, 32),
        "encoder_hidden_states": _noise(device, work.batch, model.text, captions),
        "timestep": torch.full((work.batch,), 500.0, device=device),
    }


def _z_image(model: Model, work: Work, device: str) -> Inputs:
    captions = _config(model, "cap_feat_dim")
    latents = _latents(model, work, device, 8)
    return {
        "x": [one.unsqueeze(1) for one in latents],
        "t": torch.full((work.batch,), 0.5, device=device, dtype=torch.bfloat16),
        "cap_feats": [_noise(device, model.text, captions) for _ in range(work.batch)],
    }


FLUX = Model(
    "FLUX.1-dev",
    "FluxTransformer2DModel",
    {"guidance_embeds": True},
    ("num_layers", "num_single_layers"),
    "defaults of diffusers, guidance_embeds=True",
    512,
    _flux,
)

MODELS = {
    "sd3.5-large": Model(
        "SD3.5-large",
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        ("num_layers",),
        "transformer/config.json of stabilityai/stable-diffusion-3.5-large; 77 + 256 text tokens",
        333,
        _sd3,
    ),
    "sana-1.6b": Model(
        "SANA-1.6B",
        "SanaTransformer2DModel",
        {},
        ("num_layers",),
        "defaults of diffusers, which are those of Sana_1600M_1024px",
        300,
        _sana,
    ),
    "z-image": Model(
        "Z-Image",
        "ZImageTransformer2DModel",
        {},
        ("n_layers",),
        "defaults of diffusers",
        128,
        _z_image,
    ),
}


def emoji_flux() -> Model:
    """The small FLUX of this repository's example, as a shape."""
    from pq_compile.emoji_flux import DEFAULT_FOLDER

    config = json.loads((DEFAULT_FOLDER / "config.json").read_text(encoding="utf-8"))
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    return replace(FLUX, name="emoji-flux", config=own, source="examples/emoji_flux", text=16)


def bytes_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
