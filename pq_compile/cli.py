"""The ``permuquant`` command: ``demo`` and ``explain``."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pq_compile

COMMANDS = ("demo", "explain")
DESCRIPTION = 'Serve diffusion transformers in 4 bits: torch.compile(model, backend="permuquant").'


class Parser(argparse.ArgumentParser):
    """argparse, with one line instead of the usage text where something is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"permuquant: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 for a mistake of the user's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.0)[0]
        parser.error(f"no command {arguments[0]!r}, did you mean {near!r}?")
    settings = parser.parse_args(arguments)
    from .errors import Refused  # late: it loads torch, which --help and --version need not

    try:
        print(settings.run(settings))
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(prog="permuquant", description=DESCRIPTION)
    parser.add_argument(
        "--version", action="version", version=f"permuquant {pq_compile.__version__}"
    )
    commands = parser.add_subparsers(title="commands", required=True)

    demo = commands.add_parser(
        "demo", help="paint with emoji-flux in its own precision and in 4 bits, and compare"
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--model", type=Path, metavar="DIR", help="folder of emoji-flux")
    demo.add_argument("--prompts", nargs="+", metavar="NAME", help="names of emoji to paint")
    demo.add_argument("--steps", type=_positive, default=28, help="sampling steps (28)")
    demo.add_argument(
        "--calibration-calls", type=_positive, default=64, metavar="N", help="calls observed (64)"
    )
    demo.add_argument("--recipe", default="best", help="recipe compared with rtn (best)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")
    demo.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="(out/demo)"
    )
    demo.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")

    explain = commands.add_parser(
        "explain", help="a dry run: what would be folded and quantised, from config.json alone"
    )
    explain.set_defaults(run=_explain)
    explain.add_argument("--model", type=Path, metavar="DIR", help="folder of a diffusers FLUX")
    explain.add_argument("--batch", type=_positive, default=1, help="pictures per call (1)")
    explain.add_argument(
        "--image-tokens", type=_positive, default=256, metavar="N", help="patches per picture (256)"
    )
    explain.add_argument(
        "--text-tokens", type=_positive, default=16, metavar="N", help="tokens per prompt (16)"
    )
    return parser


def _demo(given: argparse.Namespace) -> str:
    import torch

    from . import demo, emoji_flux
    from .comparison import table

    settings = demo.Settings(
        model=given.model or emoji_flux.DEFAULT_FOLDER,
        prompts=tuple(given.prompts or demo.PROMPTS),
        steps=given.steps,
        calibration_calls=given.calibration_calls,
        recipe=given.recipe,
        seed=given.seed,
        out=given.out,
        device=given.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    rows = demo.run(settings)
    return f"{table(rows)}\n\nwritten: grid.png, report.html, results.json in {settings.out}"


def _explain(given: argparse.Namespace) -> str:
    from .dry_run import flux_on_meta
    from .emoji_flux import DEFAULT_FOLDER

    folder = given.model or DEFAULT_FOLDER
    model, inputs = flux_on_meta(folder, given.batch, given.image_tokens, given.text_tokens)
    return str(pq_compile.explain(model, **inputs))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
