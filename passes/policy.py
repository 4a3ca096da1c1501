"""Which linears are quantised at all, and how: the one place where names and sizes decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType

from pq_compile.options import Options
from pq_compile.plan import Linear

BUILTIN_SKIP = (
    "*embed*",  # x_embedder, context_embedder, time_text_embed, patch_embed, condition_embedder
    "time_*",  # time_step_proj, time_mod_proj
    "timestep*",
    "adaln_single*",
    "caption_projection*",
    "*_caption_projection*",
    "img_in*",
    "img_emb*",
    "txt_in*",
    "vid_in*",
    "distilled_guidance_layer*",
    "norm_out*",
    "final_*",
    "*_final_layer*",
    "proj_out_[12]",
    "out_layer*",
    "lm_head",
)
"""Embedders and final projections: a few parts in a thousand of the work, and sensitive.

``*`` also stands for dots; a pattern is matched from the root of the model, so the ``norm_out`` or
``out_layer`` of a block is none of these.
"""

SKIP_NARROW = ("proj_in", "proj_out", "*_proj_in", "*_proj_out")
"""Skipped with under ``NARROW`` inputs or outputs: latent channels. A block compiled on its own has
the same names for wide linears (the ``proj_out`` of FLUX's single blocks)."""

NARROW = 256

SMALLEST = 4096
"""Weights with fewer elements stay: nothing to gain, and often a gate."""


def route_of(
    linear: Linear, options: Options, kept: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, str]:
    """("w4a4", "w4a8", "w4a16" or "keep", the sentence why). ``options`` settled for a device.

    ``kept``: why a linear cannot be quantised, by the name of its weight or its own.
    """
    reason = _keep(linear, options, kept)
    if reason:
        return "keep", reason
    if linear.per_sample:
        return "w4a16", "one row per sample: time goes into reading weights, activations stay"
    if options.scheme == "w4a16":
        return "w4a16", "scheme w4a16 keeps activations"
    if options.scheme == "w4a8" and linear.out_features % 16:
        return "w4a16", f"fp8 products need outputs by 16, and it has {linear.out_features}"
    if options.scheme == "w4a8":
        return "w4a8", "weights in 4 bits, activations in 8: the fastest without FP4 units"
    return "w4a4", "weights and activations in 4 bits"


def skipped_by(name: str, patterns: tuple[str, ...]) -> str | None:
    """The first pattern that matches the module path, or the path without its last component."""
    paths = [name, *([name.rpartition(".")[0]] if "." in name else [])]
    return next((p for p in patterns if any(fnmatchcase(path, p) for path in paths)), None)


def _keep(linear: Linear, options: Options, kept: Mapping[str, str]) -> str | None:
    """Why a linear stays in its own precision; None if it is quantised."""
    for name in (linear.weight, linear.name):
        if name in kept:
            return kept[name]
    if options.format == "none":
        return "format none quantises nothing"
    if pattern := skipped_by(linear.name, options.skip):
        return f"skipped by the pattern {pattern!r} of the option skip"
    if pattern := skipped_by(linear.name, BUILTIN_SKIP):
        return f"an embedder or final projection by its name, {pattern!r}"
    narrow = min(linear.in_features, linear.out_features)
    if narrow < NARROW and (pattern := skipped_by(linear.name, SKIP_NARROW)):
        return f"a first or final projection by its name, {pattern!r}, and its {narrow} channels"
    if (size := linear.in_features * linear.out_features) < SMALLEST:
        return f"its {size:,} weights are fewer than {SMALLEST:,}"
    return None


def nothing_to_quantise(
    linears: Sequence[Linear], kept: Mapping[str, str], options: Options
) -> str | None:
    """Why no linear of a graph can be quantised and what to do, as a sentence; None if one can."""
    routes = {linear.name: route_of(linear, options, kept) for linear in linears}
    if options.format == "none" or any(route != "keep" for route, _ in routes.values()):
        return None
    known = {name for linear in linears for name in (linear.weight, linear.name)}
    reasons = [f"{name}: {reason}" for name, (_, reason) in routes.items()]
    reasons += [f"{name}: {reason}" for name, reason in kept.items() if name not in known]
    why = "; ".join(reasons[:3]) or "it holds no linear"
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return (
        f"permuquant: nothing in this model can be quantised ({why}{more}). Compile a model with "
        "larger linears, or loosen the option skip"
    )
