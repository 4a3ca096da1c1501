"""Every op that is understood, in one table.

An entry is an axis equation (``equations.py`` has the notation) or, where the equation depends on
the op's arguments, the function that finds it. Keys are ATen names, with the overload where it
matters. An op that is not here pins every axis it touches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import indexing, joining, operators, views

Rule = str | Callable[..., Any]

POINTWISE = "each ... -> ..."
"""Every tensor operand broadcasts into the result; numbers are the same for all positions."""

POINTWISE_OPS = (  # noqa: SIM905
    "abs acos add addcdiv addcmul angle asin atan atan2 bitwise_and bitwise_not bitwise_or "
    "ceil celu clamp clamp_max clamp_min clip complex conj conj_physical copy cos cosh "
    "deg2rad div divide elu eq erf exp exp2 expm1 floor floor_divide fmod gelu greater gt "
    "ge hardsigmoid hardswish hardtanh imag isfinite isinf isnan le leaky_relu lerp less "
    "log log10 log1p log2 log_sigmoid logical_and logical_not logical_or logical_xor logit "
    "lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative polar "
    "positive pow real reciprocal relu relu6 remainder resolve_conj round "
    "rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus sqrt square sub subtract "
    "tan tanh threshold true_divide trunc where "
).split()

RULES: dict[str, Rule] = {
    **{f"aten.{name}": POINTWISE for name in POINTWISE_OPS},
    # contractions
    "aten.linear": "... k, n k, n -> ... n",
    "aten.mm": "m k, k n -> m n",
    "aten.bmm": "b m k, b k n -> b m n",
    "aten.mv": "m k, k -> m",
    "aten.dot": "k, k ->",
    "aten.outer": "m, n -> m n",
    "aten.matmul": operators.matmul,
    "aten.addmm": operators.addmm,
    "aten.baddbmm": operators.addmm,
    "aten.einsum": operators.einsum,
    "aten.scaled_dot_product_attention": operators.attention,
    "aten.conv1d": operators.conv,
    "aten.conv2d": operators.conv,
    "aten.conv3d": operators.conv,
    # tables and pictures: the order along some axes has a meaning
    "aten.embedding": "_ c, ... -> ... c",
    "aten.upsample_nearest2d": "b c _ _ -> b c _ _",
    "aten.upsample_bilinear2d": "b c _ _ -> b c _ _",
    "aten.avg_pool2d": "b c _ _ -> b c _ _",
    "aten.view_as_complex": "... _ -> ...",
    "aten.view_as_real": "... -> ... _",
    # norms, softmax, reductions
    "aten.layer_norm": operators.layer_norm,
    "aten.rms_norm": operators.layer_norm,
    "aten.group_norm": operators.group_norm,
    "aten.softmax": operators.mix,
    "aten.log_softmax": operators.mix,
    "aten._softmax": operators.mix,
    "aten.linalg_vector_norm": operators.norm,
    "aten.norm": operators.norm,
    **dict.fromkeys(
        (
            *("aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.prod", "aten.any"),
            *("aten.all", "aten.var", "aten.std"),
        ),
        operators.reduce,
    ),
    # one shape becomes another
    **dict.fromkeys(
        (
            *("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten"),
            *("aten.squeeze", "aten.unsqueeze", "aten.view_as", "aten.reshape_as"),
        ),
        views.reshape,
    ),
    "aten.expand": views.expand,
    "aten.expand_as": views.expand,
    "aten.broadcast_to": views.expand,
    "aten.repeat": views.repeat,
    "aten.tile": views.repeat,
    "aten.repeat_interleave": views.repeat_interleave,
    "aten.permute": operators.permute,
    "aten.transpose": operators.transpose,
    "aten.swapaxes": operators.transpose,
    "aten.swapdims": operators.transpose,
    "aten.t": operators.swap_last,
    "aten.mT": operators.swap_last,
    "aten.numpy_T": "a b -> b a",
    "aten.movedim": operators.movedim,
    "aten.moveaxis": operators.movedim,
    # positions are picked or joined
    "aten.slice": indexing.slice_,
    "aten.narrow": indexing.narrow,
    "aten.select": indexing.select,
    "aten.chunk": indexing.split,
    "aten.split": indexing.split,
    "aten.split_with_sizes": indexing.split,
    "aten.tensor_split": indexing.split,
    "aten.unbind": indexing.unbind,
    "aten.index": indexing.index,
    "aten.index_select": indexing.index_select,
    "aten.cat": joining.cat,
    "aten.concat": joining.cat,
    "aten.concatenate": joining.cat,
    "aten.stack": joining.stack,
    "aten.pad": joining.pad,
    "aten.pad_sequence": operators.pad_sequence,
    # the same again, or one number everywhere
    **dict.fromkeys(
        (
            *("aten.clone", "aten.contiguous", "aten.detach", "aten.alias", "aten.lift_fresh_copy"),
            *(
                "aten.to",
                "aten._to_copy",
                "aten.type_as",
                "aten.float",
                "aten.half",
                "aten.bfloat16",
            ),
        ),
        operators.keep,
    ),
    "aten.dropout": operators.dropout,
    "aten.feature_dropout": operators.dropout,
    **dict.fromkeys(
        (
            *("aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.scalar_tensor"),
            *("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like"),
            *("aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.new_empty"),
        ),
        operators.constant,
    ),
}

SILENT = {"aten.view.dtype", "aten.where.default"}
"""Overloads that a shorter key would describe wrongly."""

LOOK_AT_NO_VALUE = {
    *("aten.sym_size", "aten.sym_numel", "aten.sym_stride", "aten.sym_storage_offset"),
    *("aten._assert_tensor_metadata", "aten._assert_scalar", "prim.device", "prim.dtype"),
}
"""Ops that read a tensor's shape or dtype only."""


def rule_of(op: Any) -> Rule | None:
    """The entry of an ``OpOverload`` or a name, whole or without the overload."""
    name = str(op)
    return None if name in SILENT else RULES.get(name) or RULES.get(name.rpartition(".")[0])
