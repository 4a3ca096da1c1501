"""Quantise a small text-to-image FLUX by compiling it, and print what became of it."""

from pathlib import Path

import torch

import pq_compile
from pq_compile.emoji_flux import load_model, load_prompts, starting_noise, trajectory, velocity

folder = Path(__file__).resolve().parent / "emoji_flux"
model = load_model(folder)
model = torch.compile(model, backend="permuquant", options={"calibration_calls": 32})

# The first calls run in bf16 and are observed: here two runs of 16 steps, each with its prompts.
for seed, prompts in enumerate(load_prompts(folder, ("calibration",)).chunks(8)[:2]):
    for _ in trajectory(velocity(model, prompts), starting_noise(8, seed), steps=16):
        pass

pq_compile.freeze(model)  # choose the permutations, fold them, pack the weights

prompts = load_prompts(folder).select(["lion face", "butterfly"])
*_, (t, pictures) = trajectory(velocity(model, prompts), starting_noise(2, 0), steps=28)
print(pq_compile.report(model))
