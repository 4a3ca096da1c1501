"""The demo: emoji-flux's inputs and sampler, its pictures, and the whole comparison."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pq_compile import comparison, demo, emoji_flux
from pq_compile.comparison import Row
from pq_compile.demo import Settings
from pq_compile.emoji_flux import DEFAULT_FOLDER, Prompts
from pq_compile.errors import Refused
from pq_compile.pictures import grid


def prompts_of(count: int) -> Prompts:
    generator = torch.Generator().manual_seed(count)
    return Prompts(
        tuple(f"prompt {i}" for i in range(count)),
        torch.randn(count, 16, 384, generator=generator),
        torch.randn(count, 384, generator=generator),
        torch.zeros(1, 16, 384),
        torch.zeros(1, 384),
    )


def stand_in(calls: list[dict[str, Any]]) -> Callable[..., tuple[Tensor]]:
    """A model whose velocity mixes every input, and which remembers its calls."""

    def model(**inputs: Any) -> tuple[Tensor]:
        calls.append(inputs)
        text = inputs["pooled_projections"].mean(1) + inputs["encoder_hidden_states"].mean((1, 2))
        z = inputs["hidden_states"]
        return (0.5 * z + (text + inputs["timestep"])[:, None, None],)

    return model


def test_a_patch_holds_a_square_of_the_picture() -> None:
    pictures = torch.arange(2 * 3 * 64 * 64, dtype=torch.float64).reshape(2, 3, 64, 64)
    patches = emoji_flux.patchify(pictures)
    assert patches.shape == (2, 256, 48)
    assert torch.equal(patches[1, 16 * 3 + 5].reshape(3, 4, 4), pictures[1, :, 12:16, 20:24])


def test_patches_make_the_picture_again() -> None:
    pictures = torch.randn(3, 3, 64, 64)
    assert torch.equal(emoji_flux.unpatchify(emoji_flux.patchify(pictures)), pictures)


def test_positions_count_rows_then_columns() -> None:
    assert emoji_flux.positions()[[0, 1, 16, 255]].tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [0, 15, 15],
    ]


def test_the_sampler_is_euler_with_guidance() -> None:
    prompts, noise, steps = prompts_of(2), emoji_flux.starting_noise(2, 0), 7
    call = emoji_flux.velocity(stand_in([]), prompts)
    states = list(emoji_flux.trajectory(call, noise, steps))

    z, text = noise, prompts.pooled.mean(1) + prompts.tokens.mean((1, 2))
    for k in range(steps):
        t = 1 - k / steps
        prompted, empty = 0.5 * z + (text + t)[:, None, None], 0.5 * z + t
        z = z - (empty + 3.0 * (prompted - empty)) / steps
    assert len(states) == steps + 1
    assert states[-1][0] == 0.0
    torch.testing.assert_close(states[-1][1], z)


def test_a_call_sees_each_prompt_and_as_many_empty_ones() -> None:
    calls: list[dict[str, Any]] = []
    prompts = prompts_of(3)
    emoji_flux.velocity(stand_in(calls), prompts)(emoji_flux.starting_noise(3, 0), 0.25)
    (call,) = calls
    assert torch.equal(call["encoder_hidden_states"][:3], prompts.tokens)
    assert not call["pooled_projections"][3:].any()
    assert call["timestep"].tolist() == [0.25] * 6
    assert torch.equal(call["hidden_states"][:3], call["hidden_states"][3:])


def test_the_stored_prompts_are_found_by_name() -> None:
    prompts = emoji_flux.load_prompts(DEFAULT_FOLDER)
    assert len(prompts) == 384
    chosen = prompts.select(["octopus", "tulip"])
    assert chosen.names == ("octopus", "tulip")
    assert torch.equal(chosen.tokens[1], prompts.tokens[prompts.names.index("tulip")])


def test_an_unknown_prompt_names_the_nearest() -> None:
    with pytest.raises(Refused, match=r"no prompt 'buterfly'.*nearest are 'butterfly'"):
        emoji_flux.load_prompts(DEFAULT_FOLDER).select(["octopus", "buterfly"])


def test_the_default_prompts_were_not_calibrated_with() -> None:
    held_out = emoji_flux.load_prompts(DEFAULT_FOLDER, ("evaluation",)).names
    calibrated = emoji_flux.load_prompts(DEFAULT_FOLDER, ("calibration",)).names
    assert set(demo.PROMPTS) <= set(held_out)
    assert not set(held_out) & set(calibrated)


def test_missing_weights_say_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no emoji-flux weights in .*examples/emoji_flux.*--model"):
        emoji_flux.load_model(tmp_path)


@pytest.mark.parametrize(("calls", "runs"), [(1, 1), (2, 2), (7, 2), (64, 4), (70, 5)])
def test_calibration_makes_the_calls_in_runs_of_different_prompts(calls: int, runs: int) -> None:
    seen: list[dict[str, Any]] = []
    demo.calibrate(stand_in(seen), prompts_of(64), calls, seed=0)
    texts = [id(call["encoder_hidden_states"]) for call in seen]
    assert len(seen) == calls
    assert len(set(texts)) == runs
    assert texts == sorted(texts, key=texts.index)  # a run is one stretch
    times = [call["timestep"][0].item() for call in seen]
    assert times.count(1.0) == runs  # and every run starts from noise


def test_the_velocity_error_is_relative_per_sample() -> None:
    z = torch.ones(2, 256, 48)
    reference = [(z, 1.0, torch.stack([2 * z[0], 4 * z[1]]))]
    assert comparison.velocity_error(lambda z, t: 3 * z, reference) == (1 / 4 + 1 / 16) / 2


def test_psnr_is_of_what_can_be_seen() -> None:
    white = torch.ones(2, 3, 64, 64)
    assert comparison.psnr(white, torch.full_like(white, 0.8)) == pytest.approx(20.0, abs=1e-4)
    assert comparison.psnr(white, 5 * white) == float("inf")


def test_compared_states_are_spread_from_the_first() -> None:
    assert comparison.spread(range(28), 7) == [0, 4, 8, 12, 16, 20, 24]
    assert comparison.spread(range(3), 7) == [0, 1, 2]


def test_a_grid_has_a_row_per_method_and_a_column_per_prompt() -> None:
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 64, 64)
    rows = [("original", torch.stack([red, red])), ("permuquant", torch.stack([red, -red]))]
    sheet = grid(rows, ["one", "a name too long for the width of one picture"])
    assert sheet.size[0] == 8 + 2 * (128 + 8)
    assert sheet.getpixel((8 + 64, 8 + 16 + 64)) == (255, 0, 0)
    below = 8 + 16 + 64 + (128 + 16 + 8)
    assert sheet.getpixel((8 + 64, below)) == (255, 0, 0)
    assert sheet.getpixel((8 + 64 + 128 + 8, below)) == (0, 255, 255)


ROW = Row("rtn", 38, 32, 20, 12, 0, 18_458_720, 6_000_000, 0.0123456, 21.987)


def test_the_table_lines_up() -> None:
    lines = comparison.table(
        [ROW, dataclasses.replace(ROW, method="permuquant (best)")]
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split("  ")[0] == "rtn"
    for cell in ("32 of 38", "18.5 -> 6.0 MB", "0.01235", "21.99 dB"):
        assert lines[1].count(cell) == 1


class StandInReport:
    """What the demo reads of a report."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "summary": {
                "linears_total": 3,
                "linears_quantised": 2,
                "weight_bytes_before": 4000,
                "weight_bytes_after": 1000,
            },
            "linears": [
                {"group": "a", "accepted": True},
                {"group": "a", "accepted": True},
                {"group": "b", "accepted": False},
            ],
            "groups": [{"pinned_by": []}, {"pinned_by": []}, {"pinned_by": ["rotary embedding"]}],
        }

    def to_html(self, path: Path) -> None:
        path.write_text("<html></html>")


def test_the_demo_compares_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(model: Any, recipe: str, settings: Settings) -> tuple[Any, StandInReport]:
        def call(**inputs: Any) -> tuple[Tensor]:
            (v,) = model(**inputs)
            return (v * (1.1 if recipe == "rtn" else 1.0),)

        return call, StandInReport()

    monkeypatch.setattr(demo, "prepared", coarse)
    settings = Settings(prompts=("octopus",), steps=1, out=tmp_path / "new" / "folder")
    rtn, ours = demo.run(settings)
    assert (ours.method, ours.groups_found, ours.groups_free) == ("permuquant (best)", 3, 2)
    assert ours.groups_accepted == 1
    assert (ours.velocity_error, ours.psnr) == (0.0, float("inf"))
    assert rtn.velocity_error == pytest.approx(0.01, rel=0.1)  # (1.1 - 1)^2, bf16
    assert {path.name for path in settings.out.iterdir()} == {
        "grid.png",
        "report.html",
        "results.json",
    }
    with Image.open(settings.out / "grid.png") as sheet:
        assert sheet.size[1] > 3 * 128
    results = json.loads((settings.out / "results.json").read_text())
    assert results["rows"][0]["method"] == "rtn"
    assert results["ran_on"]["torch"] == metadata.version("torch")


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end(tmp_path: Path) -> None:
    settings = Settings(
        prompts=("octopus", "gem stone"),
        steps=2,
        calibration_calls=4,
        recipe="permuquant",
        out=tmp_path,
    )
    rtn, ours = demo.run(settings)
    assert rtn.linears_quantised == ours.linears_quantised > 30
    assert ours.weight_bytes_after < ours.weight_bytes_before / 2
    assert 0 < ours.velocity_error < 0.2
    assert 0 < rtn.velocity_error < 0.2
    assert (tmp_path / "report.html").stat().st_size > 1000
