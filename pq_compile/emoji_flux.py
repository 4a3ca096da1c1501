"""The small trained FLUX of ``examples/emoji_flux``: its prompts, its pictures and its sampler.

Rectified flow in pixels: ``z_t = (1 - t) z_0 + t noise``; the model predicts ``noise - z_0``, so
``z_s = z_t + (s - t) v(z_t, t)`` walks from noise at ``t = 1`` to the picture at ``t = 0``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Refused

SIDE = 64  # pixels
PATCH = 4
GRID = SIDE // PATCH
TOKENS, CHANNELS = GRID * GRID, 3 * PATCH * PATCH
GUIDANCE = 3.0
SPLITS = ("calibration", "evaluation")
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "examples" / "emoji_flux"


@dataclass(frozen=True)
class Prompts:
    """Named prompts with their text features; ``null_*`` are those of the empty prompt."""

    names: tuple[str, ...]
    tokens: Tensor  # [N, 16, 384] last hidden states of the text encoder
    pooled: Tensor  # [N, 384] their mean
    null_tokens: Tensor  # [1, 16, 384]
    null_pooled: Tensor  # [1, 384]

    def __len__(self) -> int:
        return len(self.names)

    def select(self, names: Sequence[str]) -> Prompts:
        """The prompts of these names, in this order; ``Refused`` for a name that is not there."""
        for name in names:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.0)
                raise Refused(
                    f"permuquant: no prompt {name!r}: emoji-flux has no text encoder, only the "
                    f"prompts stored beside it; the nearest are {', '.join(map(repr, near))}"
                )
        return self._take([self.names.index(name) for name in names])

    def chunks(self, size: int) -> list[Prompts]:
        """Stretches of ``size`` prompts; a shorter rest is left out."""
        whole = len(self) - len(self) % size
        return [self._take(list(range(i, i + size))) for i in range(0, whole, size)]

    def with_empty(self) -> tuple[Tensor, Tensor]:
        """Tokens and pooled features of [prompts; as many empty prompts]."""
        count = len(self)
        return (
            torch.cat([self.tokens, self.null_tokens.expand(count, -1, -1)]),
            torch.cat([self.pooled, self.null_pooled.expand(count, -1)]),
        )

    def _take(self, at: list[int]) -> Prompts:
        return Prompts(
            tuple(self.names[i] for i in at),
            self.tokens[at],
            self.pooled[at],
            self.null_tokens,
            self.null_pooled,
        )


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The diffusers ``FluxTransformer2DModel`` stored in ``folder``, in eval mode.

    Raises ``Refused`` where the folder, the device or the diffusers package is missing.
    """
    _require(folder, device)
    try:
        from diffusers import FluxTransformer2DModel
        from diffusers.utils import logging
    except ImportError as error:
        raise Refused(
            f"permuquant: {error}; the demo needs more packages: pip install 'permuquant[demo]'"
        ) from error
    logging.disable_progress_bar()
    model: nn.Module = FluxTransformer2DModel.from_pretrained(
        folder,
        torch_dtype=dtype,
        low_cpu_mem_usage=False,  # else diffusers asks for one more package
    )
    return model.to(device).eval().requires_grad_(False)


def load_prompts(
    folder: Path,
    splits: Sequence[str] = SPLITS,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Prompts:
    """The prompts of the named splits, "calibration" or "evaluation", one after the other.

    Raises ``Refused`` where the folder or the device is missing.
    """
    _require(folder, device)
    from safetensors import safe_open

    names: list[str] = []
    features: dict[str, list[Tensor]] = {}
    for split in splits:
        with safe_open(folder / f"{split}.safetensors", "pt") as file:
            names += json.loads(file.metadata()["prompts"])
            for key in ("tokens", "pooled", "null_tokens", "null_pooled"):
                features.setdefault(key, []).append(file.get_tensor(key).to(device, dtype))
    return Prompts(
        tuple(names),
        torch.cat(features["tokens"]),
        torch.cat(features["pooled"]),
        features["null_tokens"][0],
        features["null_pooled"][0],
    )


def patchify(pictures: Tensor) -> Tensor:
    """[B, 3, 64, 64] -> [B, 256, 48]: 4x4 patches row by row, each as (channel, row, column)."""
    parts = pictures.reshape(-1, 3, GRID, PATCH, GRID, PATCH)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, TOKENS, CHANNELS)


def unpatchify(patches: Tensor) -> Tensor:
    """[B, 256, 48] -> [B, 3, 64, 64]; the inverse of ``patchify``."""
    parts = patches.reshape(-1, GRID, GRID, 3, PATCH, PATCH)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE, SIDE)


def positions(device: torch.device | str = "cpu") -> Tensor:
    """fp32 [256, 3]: (0, row, column) of every patch."""
    at = torch.arange(TOKENS, device=device)
    return torch.stack([torch.zeros_like(at), at // GRID, at % GRID], dim=1).float()


def velocity(model: Callable[..., Any], prompts: Prompts) -> Callable[[Tensor, float], Tensor]:
    """``(z [B, 256, 48], t) -> [2B, 256, 48]``: velocities given the prompts, then without them.

    The text tensors are made once: a run is recognised by conditioning inputs that stay the same.
    """
    tokens, pooled = prompts.with_empty()
    device, dtype = tokens.device, tokens.dtype
    image_ids, text_ids = positions(device), torch.zeros(tokens.shape[1], 3, device=device)

    @torch.no_grad()
    def call(z: Tensor, t: float) -> Tensor:
        (output,) = model(
            hidden_states=torch.cat([z, z]).to(dtype),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=torch.full((2 * len(z),), t, device=device, dtype=dtype),
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )
        return torch.as_tensor(output).float()

    return call


def guided(both: Tensor, guidance: float = GUIDANCE) -> Tensor:
    """Classifier-free guidance: ``empty + guidance * (prompted - empty)``."""
    prompted, empty = both.chunk(2)
    return empty + guidance * (prompted - empty)


def trajectory(
    call: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int
) -> Iterator[tuple[float, Tensor]]:
    """Every state (t, z) of Euler's method, from ``noise`` at t = 1 to the pictures at t = 0."""
    z = noise
    for t, following in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        yield t, z
        z = z + (following - t) * guided(call(z, t))
    yield 0.0, z


def starting_noise(count: int, seed: int, device: str = "cpu") -> Tensor:
    """fp32 [count, 256, 48], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, TOKENS, CHANNELS, generator=generator).to(device)


def _require(folder: Path, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("permuquant: device 'cuda' was asked for, and torch sees no CUDA device here")
    if not (folder / "config.json").is_file():
        raise Refused(
            f"permuquant: no emoji-flux weights in {folder}; they are in the project's repository "
            "under examples/emoji_flux (an installed package leaves them out): give their folder "
            "with --model"
        )
