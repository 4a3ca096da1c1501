"""The command line: what it says, and one sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pq_compile
from pq_compile.cli import main


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed for a mistake: one line, and exit status 2."""
    try:
        status: int | str | None = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    line = capsys.readouterr().err
    assert line.startswith("permuquant: ")
    assert line.count("\n") == 1
    return line


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"permuquant {pq_compile.__version__}\n"


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "demo" in out
    assert "explain" in out


def test_help_loads_no_torch() -> None:
    code = "import sys, pq_compile.cli as cli; cli.main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("typed", "meant"), [("dmo", "demo"), ("explian", "explain")])
def test_an_unknown_command_names_the_nearest(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"no command {typed!r}, did you mean {meant!r}?" in mistake([typed], capsys)


def test_an_unknown_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--stps" in mistake(["demo", "--stps", "3"], capsys)


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_steps_are_counted_from_one(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(["demo", f"--steps={value}"], capsys)
    assert f"{value!r} is not a whole number of at least 1" in line


def test_an_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'best'?" in mistake(["demo", "--recipe", "bets"], capsys)


def test_an_unknown_prompt_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'lion face'" in mistake(["demo", "--prompts", "lion"], capsys)


def test_missing_weights_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model" in mistake(["demo", "--model", str(tmp_path)], capsys)
    assert "no config.json" in mistake(["explain", "--model", str(tmp_path)], capsys)


def test_a_folder_that_cannot_be_made_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = mistake(["demo", "--out", str(tmp_path / "file" / "inside")], capsys)
    assert "cannot make the folder" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no CUDA device" in mistake(["demo", "--device", "cuda"], capsys)


def test_a_model_the_command_line_cannot_call_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SanaTransformer2DModel"}))
    line = mistake(["explain", "--model", str(tmp_path)], capsys)
    assert "SanaTransformer2DModel" in line
    assert "pq_compile.explain" in line


def test_explain_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "guidance_embeds": True,
        "axes_dims_rope": [8, 12, 12],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["explain", "--model", str(tmp_path), "--image-tokens", "64"]) == 0
    out = capsys.readouterr().out
    assert "single_transformer_blocks.0" in out
    assert "dry run" in out
