"""Routes, verdicts and errors: what is accepted pays on rows it was not chosen by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passes.accept import accept
from passes.judge import OUTPUTS, output_errors
from passes.policy import BUILTIN_SKIP, SKIP_NARROW, nothing_to_quantise, route_of, skipped_by
from pq_compile.formats import FORMATS
from pq_compile.options import Options
from pq_compile.permutation import Permutation
from pq_compile.plan import Axis, Group, Groups, Linear, Plan, Segment, Statistics, Verdict
from tests.watching import Waits

PERMUQUANT = Options(recipe="permuquant")


def linear(name: str, k: int = 64, n: int = 64, per_sample: bool = False) -> Linear:
    return Linear(name, f"{name}.weight", None, k, n, rows=32, per_sample=per_sample)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def channels(order: Permutation) -> Tensor:
    return torch.tensor(order.order)


class Model:
    """Linears with weights, statistics and the groups on their input axes, in fp64."""

    def __init__(self) -> None:
        self.linears: list[Linear] = []
        self.weights: dict[str, Tensor] = {}
        self.stats: dict[str, Statistics] = {}
        self.segments: dict[Axis, tuple[Segment, ...]] = {}
        self.pinned: dict[int, tuple[str, ...]] = {}

    def add(
        self, one: Linear, segments: Sequence[tuple[int, int]], rows: Tensor, weight: Tensor
    ) -> Model:
        self.linears.append(one)
        self.weights[one.weight] = weight
        moment = rows.double().square().mean(0)
        half = len(rows) // 2
        self.stats[one.weight] = Statistics(moment, len(rows), rows[:half], rows[half:], "run")
        self.segments[one.input_axis] = tuple(Segment(*each) for each in segments)
        return self

    @property
    def groups(self) -> Groups:
        """A group for each leaf."""
        sizes = {leaf: size for row in self.segments.values() for leaf, size in row}
        return Groups(
            self.segments,
            tuple(
                Group(f"g{leaf}", (leaf,), size, (), self.pinned.get(leaf, ()))
                for leaf, size in sizes.items()
            ),
        )

    def plan(self, options: Options = PERMUQUANT, **changed: object) -> Plan:
        given = {"kept": {}, "stats": self.stats, "weights": self.weights} | changed
        return accept(self.groups, self.linears, options=options, **given)  # type: ignore[arg-type]

    def total(self, plan: Plan) -> tuple[float, float]:
        """Held-out errors of all linears, as they stand and in the plan's orders, by hand."""
        sums = [0.0, 0.0]
        for one in plan.linears:
            segments = self.segments[one.linear.input_axis]
            order = Permutation.side_by_side(
                [plan.orders.get(leaf) or Permutation.identity(size) for leaf, size in segments]
            )
            rows = self.stats[one.linear.weight].held_out
            weight = self.weights[one.linear.weight]
            for i, each in enumerate((Permutation.identity(len(order)), order)):
                sums[i] += brute_force(rows, weight, each, plan.format, one.route == "w4a4")
        return sums[0], sums[1]


def brute_force(
    rows: Tensor, weight: Tensor, order: Permutation, format: str, quantise_rows: bool
) -> float:
    """The error by its definition, an output at a time, in Python numbers."""
    fake = FORMATS[format]
    index = list(order.order)
    x, w = rows.double()[:, index], weight.double()[:, index]
    pad = -len(index) % fake.group
    x, w = (torch.cat([each, each.new_zeros(len(each), pad)], 1) for each in (x, w))
    xq = fake.fake(x) if quantise_rows else x
    wq = fake.fake(w)
    lost = sum(
        (sum(a * b for a, b in zip(x[i].tolist(), w[j].tolist(), strict=True))
         - sum(a * b for a, b in zip(xq[i].tolist(), wq[j].tolist(), strict=True))) ** 2
        for i in range(len(x))
        for j in range(len(w))
    )  # fmt: skip
    return float(lost / (rows.double() @ weight.double().T).square().sum())


def opposed(seed: int = 0, k: int = 256, n: int = 64) -> tuple[Tensor, Tensor]:
    """Channel scales of rows that the weight undoes, spread over the groups: a sort gains much."""
    scale = torch.exp(1.5 * normal(seed, k))
    return normal(seed + 1, 64, k) * scale, normal(seed + 2, n, k) / scale


def isolated(seed: int = 0, k: int = 256, n: int = 64) -> tuple[Tensor, Tensor]:
    """One loud channel in every group: each is nearly exact until a sort puts them together."""
    rows = normal(seed, 64, k)
    rows[:, ::16] *= 100
    return rows, normal(seed + 2, n, k)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "int4", "int3"])
@pytest.mark.parametrize("quantise_rows", [True, False])
@pytest.mark.parametrize("k", [64, 40])
def test_the_error_is_that_of_a_brute_force_in_double(
    format: str, quantise_rows: bool, k: int
) -> None:
    rows, weight = normal(0, 5, k), normal(1, 7, k)
    orders = [Permutation.random(k, torch.Generator().manual_seed(seed)) for seed in range(2)]
    found = output_errors(
        rows, weight, [None, *map(channels, orders)], FORMATS[format], quantise_rows=quantise_rows
    )
    expected = [
        brute_force(rows, weight, order, format, quantise_rows)
        for order in (Permutation.identity(k), *orders)
    ]
    assert found == pytest.approx(expected, rel=1e-10, abs=0)


def test_the_error_of_bfloat16_operands_is_taken_in_single_precision() -> None:
    rows, weight = normal(0, 8, 64).bfloat16(), normal(1, 8, 64).bfloat16()
    single, *_ = output_errors(rows, weight, [None], FORMATS["nvfp4"], quantise_rows=True)
    double, *_ = output_errors(
        rows.double(), weight.double(), [None], FORMATS["nvfp4"], quantise_rows=True
    )
    assert single == pytest.approx(double, rel=1e-5)


def test_many_outputs_are_judged_by_evenly_spaced_ones() -> None:
    rows, weight = normal(0, 4, 32), normal(1, 4 * OUTPUTS, 32)
    nvfp4 = FORMATS["nvfp4"]
    assert output_errors(rows, weight, [None], nvfp4, quantise_rows=True) == output_errors(
        rows, weight[::4], [None], nvfp4, quantise_rows=True
    )


def test_judging_changes_neither_weights_nor_rows() -> None:
    rows, weight = normal(0, 4, 40).float(), normal(1, 4, 40).float()
    kept = rows.clone(), weight.clone()
    order = Permutation.random(40, torch.Generator().manual_seed(0))
    output_errors(rows, weight, [None, channels(order)], FORMATS["nvfp4"], quantise_rows=True)
    assert torch.equal(rows, kept[0])
    assert torch.equal(weight, kept[1])


def test_judging_many_orders_asks_no_number_of_any_one() -> None:
    """All errors come in one copy; a wait for each would leave a GPU idle 10,000 times."""
    rows, weight = normal(0, 4, 64), normal(1, 4, 64)
    orders = [channels(Permutation.random(64, torch.Generator().manual_seed(n))) for n in range(5)]
    with Waits() as waits:  # type: ignore[no-untyped-call]
        found = output_errors(rows, weight, orders, FORMATS["nvfp4"], quantise_rows=True)
    assert len(set(found)) == 5
    assert waits.count == 0


def test_an_output_that_is_zero_has_no_error() -> None:
    found = output_errors(
        torch.zeros(2, 32), torch.ones(2, 32), [None], FORMATS["nvfp4"], quantise_rows=True
    )
    assert found == [0.0]


@pytest.mark.parametrize("recipe", ["permuquant", "best"])
def test_a_sort_that_pays_is_accepted(recipe: str) -> None:
    model = Model().add(linear("a", 256), [(0, 256)], *opposed())
    plan = model.plan(Options(recipe=recipe))
    (verdict,) = plan.verdicts
    assert verdict.accepted
    assert verdict.alpha is not None
    assert verdict.alpha != 0.5
    assert verdict.error_before is not None
    assert verdict.error_after is not None
    assert verdict.error_after < 0.3 * verdict.error_before
    gain = 1 - verdict.error_after / verdict.error_before
    assert verdict.reason == f"alpha {verdict.alpha:g} gains {gain:.1%} on held-out rows"
    (one,) = plan.linears
    assert (one.group, one.free, one.accepted, one.route) == ("g0", True, True, "w4a4")
    assert (one.error_before, one.error_after) == (verdict.error_before, verdict.error_after)
    assert plan.orders.keys() == {0}


def test_half_and_half_is_blind_where_weights_undo_activations() -> None:
    """Second moments multiply to a constant, so alpha 0.5 sorts noise and loses to the rest."""
    model = Model().add(linear("a", 256), [(0, 256)], *opposed())
    half = model.plan(replace(PERMUQUANT, alpha=(0.5,))).verdicts[0]
    grid = model.plan().verdicts[0]
    assert half.error_after is not None
    assert grid.error_after is not None
    assert grid.error_after < 0.5 * half.error_after


def test_a_sort_that_harms_is_rejected_and_the_order_stays() -> None:
    model = Model().add(linear("a", 256), [(0, 256)], *isolated())
    plan = model.plan(replace(PERMUQUANT, alpha=(1.0,)))
    (verdict,) = plan.verdicts
    assert not verdict.accepted
    assert verdict.error_before is not None
    assert verdict.error_after is not None
    assert verdict.error_after > 1.1 * verdict.error_before
    assert verdict.reason.startswith("no sort lowers the error on the rows to fit to; ")
    assert "the best, alpha 1, raises it by " in verdict.reason
    assert plan.orders == {}
    assert plan.linears[0].error_before == plan.linears[0].error_after == verdict.error_before


def test_a_gain_on_fitted_rows_alone_is_not_accepted() -> None:
    """Held out: rows whose loud channels share a group as they stand, and none once sorted."""
    options = Options(recipe="permuquant", format="int4", alpha=(1.0,))
    rows = normal(0, 64, 256) * normal(1, 256).exp()
    model = Model().add(linear("a", 256), [(0, 256)], rows, normal(2, 64, 256))
    order = model.plan(options).orders[0].order
    loud = [next(i for i in order[j : j + 64] if i < 64) for j in range(0, 256, 64)]
    held_out = normal(3, 32, 256)
    held_out[:, loud] *= 8
    other = {"a.weight": replace(model.stats["a.weight"], held_out=held_out)}
    plan = model.plan(options, stats=other)
    (verdict,) = plan.verdicts
    assert not verdict.accepted
    assert verdict.reason.startswith("gain -")
    assert verdict.reason.endswith("is not above tau 2.0%")
    assert plan.orders == {}


def test_tau_is_a_threshold_on_the_relative_gain() -> None:
    model = Model().add(linear("a", 256), [(0, 256)], *opposed())
    (verdict,) = model.plan().verdicts
    assert verdict.error_before is not None
    assert verdict.error_after is not None
    gain = (verdict.error_before - verdict.error_after) / verdict.error_before
    assert not model.plan(replace(PERMUQUANT, tau=gain)).verdicts[0].accepted
    assert model.plan(replace(PERMUQUANT, tau=gain * (1 - 1e-9))).verdicts[0].accepted


def test_groups_are_judged_with_those_accepted_before_in_force() -> None:
    """Two groups side by side on one axis, as in the output projection of a single block."""
    rows, weight = opposed()
    model = Model().add(linear("a", 256), [(0, 128), (1, 128)], rows, weight)
    plan = model.plan()
    first, second = plan.verdicts
    assert first.accepted
    assert second.accepted
    assert second.error_before == first.error_after
    assert plan.linears[0].error_after == second.error_after
    before, after = model.total(plan)
    assert plan.linears[0].error_before == pytest.approx(before, rel=1e-10)
    assert plan.linears[0].error_after == pytest.approx(after, rel=1e-10)


def test_a_group_is_judged_by_the_mean_over_its_readers() -> None:
    model = Model()
    model.add(linear("a", 256), [(0, 256)], *opposed())
    model.add(linear("b", 256), [(0, 256)], *opposed(50))
    plan = model.plan()
    befores = [one.error_before for one in plan.linears]
    assert all(before is not None for before in befores)
    mean = sum(before for before in befores if before is not None) / 2
    assert plan.verdicts[0].error_before == pytest.approx(mean, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    spread=st.floats(0, 2),
    format=st.sampled_from(["nvfp4", "int4"]),
    tau=st.sampled_from([0.0, 0.02, 0.1]),
    scheme=st.sampled_from(["w4a4", "w4a8", "w4a16"]),
)
def test_a_plan_is_never_worse_than_the_identity(
    seed: int, spread: float, format: str, tau: float, scheme: str
) -> None:
    """Three groups over three linears, overlapping, measured again by the definition."""
    model = Model()
    for i, segments in enumerate(([(0, 32), (1, 32)], [(1, 32), (2, 32)], [(2, 32)] * 2)):
        scale = torch.exp(spread * normal(seed + 10 * i, 64))
        rows, weight = normal(seed + 10 * i + 1, 8, 64), normal(seed + 10 * i + 2, 64, 64)
        one = linear(f"l{i}", per_sample=i == 1)
        model.add(one, segments, rows * scale, weight / scale**0.7)
    plan = model.plan(Options(recipe="permuquant", format=format, tau=tau, scheme=scheme))
    before, after = (
        sum(error or 0.0 for error in errors)
        for errors in (
            [one.error_before for one in plan.linears],
            [one.error_after for one in plan.linears],
        )
    )
    again = [
        output_errors(
            model.stats[one.linear.weight].held_out,
            model.weights[one.linear.weight],
            [None, channels(axis)],
            FORMATS[format],
            quantise_rows=one.route == "w4a4",
        )
        for one in plan.linears
        for axis in [
            Permutation.side_by_side(
                [
                    plan.orders.get(leaf) or Permutation.identity(size)
                    for leaf, size in model.segments[one.linear.input_axis]
                ]
            )
        ]
    ]
    assert sum(each[0] for each in again) == pytest.approx(before, rel=1e-9)
    assert sum(each[1] for each in again) == pytest.approx(after, rel=1e-9)
    assert after <= before * (1 + 1e-12)
    for verdict in plan.verdicts:
        if verdict.accepted:
            assert verdict.error_before is not None
            assert verdict.error_after is not None
            assert verdict.error_after < (1 - tau) * verdict.error_before


@pytest.mark.parametrize("recipe", ["permuquant", "random"])
def test_the_same_seed_gives_the_same_plan(recipe: str) -> None:
    model = Model().add(linear("a", 256), [(0, 128), (1, 128)], *opposed())
    options = Options(recipe=recipe, seed=7)
    assert repr(model.plan(options)) == repr(model.plan(options))


def test_random_orders_every_free_group_without_data() -> None:
    model = Model().add(linear("a"), [(0, 32), (1, 16), (2, 16)], *opposed(k=64))
    model.pinned[1] = ("graph input x",)
    plan = model.plan(Options(recipe="random", seed=1), stats={})
    assert plan.orders.keys() == {0, 2}
    assert [verdict.accepted for verdict in plan.verdicts] == [True, False, True]
    assert plan.verdicts[0].error_before is None
    assert plan.linears[0].error_after is None
    assert plan.linears[0].accepted
    assert not plan.linears[0].free
    assert model.plan(Options(recipe="random", seed=2), stats={}).orders != plan.orders


def test_random_with_data_reports_what_it_costs() -> None:
    model = Model().add(linear("a", 256), [(0, 256)], *isolated())
    plan = model.plan(Options(recipe="random"))
    assert plan.verdicts[0].error_after == plan.linears[0].error_after
    assert plan.linears[0].error_after != plan.linears[0].error_before


def test_rtn_keeps_the_order() -> None:
    model = Model().add(linear("a", 256), [(0, 256)], *opposed())
    plan = model.plan(Options(recipe="rtn"), stats={})
    assert plan.verdicts == (Verdict("g0", False, None, None, "recipe rtn keeps the order"),)
    assert (plan.orders, plan.linears[0].error_before) == ({}, None)
    assert plan.linears[0].free


def test_verdicts_say_why_a_group_was_not_tried() -> None:
    model = Model()
    model.add(linear("a"), [(0, 32), (1, 32)], *opposed(k=64))
    model.add(linear("proj_out", 64, 128), [(2, 64)], *opposed(k=64, n=128))
    model.add(linear("c"), [(3, 64)], *opposed(k=64))
    model.pinned[0] = ("graph input hidden_states", "cumsum")
    del model.stats["c.weight"]
    reasons = [verdict.reason for verdict in model.plan().verdicts]
    assert reasons[0] == "pinned by graph input hidden_states; cumsum"
    assert reasons[2:] == ["no quantised linear reads it", "no calibration data for c"]


def test_errors_that_are_not_finite_reject() -> None:
    rows, weight = opposed()
    weight[3, 5] = torch.nan
    (verdict,) = Model().add(linear("a", 256), [(0, 256)], rows, weight).plan().verdicts
    assert not verdict.accepted
    assert verdict.reason == "its readers' errors are not finite"


def test_weights_on_the_meta_device_make_a_plan_without_errors() -> None:
    model = Model().add(linear("a"), [(0, 64)], *opposed(k=64))
    plan = model.plan(weights={"a.weight": torch.empty(64, 64, device="meta")})
    assert plan.linears[0].error_before is None
    assert plan.linears[0].route == "w4a4"


def test_linears_with_one_weight_have_one_entry() -> None:
    model = Model().add(linear("a"), [(0, 64)], *opposed(k=64))
    model.linears.append(replace(model.linears[0], name="b", reads="other"))
    assert [one.linear.name for one in model.plan().linears] == ["a"]


def test_bits_are_those_of_the_format_or_of_the_kept_weight() -> None:
    model = Model()
    model.add(linear("a"), [(0, 64)], *opposed(k=64))
    model.add(linear("x_embedder"), [(1, 64)], *opposed(k=64))
    quantised, kept = model.plan().linears
    assert quantised.bits_per_weight == FORMATS["nvfp4"].bits_per_weight(64, 64)
    assert kept.bits_per_weight == 64


def test_format_none_keeps_every_linear_and_still_reorders() -> None:
    model = Model().add(linear("a"), [(0, 64)], *opposed(k=64))
    plan = model.plan(Options(recipe="random", format="none"), stats={})
    (one,) = plan.linears
    assert (one.route, one.reason) == ("keep", "format none quantises nothing")
    assert one.accepted
    assert plan.orders.keys() == {0}


def test_nothing_to_quantise_is_a_sentence_with_reasons() -> None:
    linears = [
        linear(name, 64, 8) if name == "tiny" else linear(name)
        for name in ("x_embedder", "norm_out.linear", "tiny", "other")
    ]
    kept = {"other": "its weight is read by torch.cumsum"}
    assert re.search(
        r"nothing .*x_embedder: an embedder .*norm_out\.linear: .*; tiny: its 512 weights "
        r"are fewer than 4,096; and 1 more\).*loosen the option skip",
        nothing_to_quantise(linears, kept, PERMUQUANT) or "",
    )
    assert "it holds no linear" in (nothing_to_quantise([], {}, PERMUQUANT) or "")
    assert nothing_to_quantise(linears, {}, PERMUQUANT) is None


@pytest.mark.parametrize(
    ("one", "options", "route"),
    [
        (linear("a"), Options(), "w4a4"),
        (linear("a", per_sample=True), Options(), "w4a16"),
        (linear("a"), Options(scheme="w4a16"), "w4a16"),
        (linear("a"), Options(scheme="w4a8"), "w4a8"),
        (linear("a", per_sample=True), Options(scheme="w4a8"), "w4a16"),
        (linear("a", 256, 72), Options(scheme="w4a8"), "w4a16"),
        (linear("a", 64, 63), Options(), "keep"),
        (linear("blocks.3.attn.to_q"), Options(skip=("blocks.3.*",)), "keep"),
        (linear("blocks.3.attn.to_q"), Options(skip=("*.attn",)), "keep"),
        (linear("blocks.3.attn.to_q"), Options(skip=("attn",)), "w4a4"),
        (linear("0"), Options(), "w4a4"),
    ],
)
def test_the_route_follows_the_policy(one: Linear, options: Options, route: str) -> None:
    assert route_of(one, options, {})[0] == route


def test_what_the_graph_forbids_is_kept_by_either_name() -> None:
    for name in ("a", "a.weight"):
        assert route_of(linear("a"), Options(), {name: "it is read elsewhere"}) == (
            "keep",
            "it is read elsewhere",
        )


KEPT = [
    "x_embedder",
    "context_embedder",
    "time_text_embed.timestep_embedder.linear_1",
    "norm_out.linear",
    "time_text_embed.guidance_embedder.linear_2",
    "pos_embed.proj",
    "adaln_single.emb.timestep_embedder.linear_1",
    "adaln_single.linear",
    "caption_projection.linear_1",
    "time_embed.linear",
    "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_2",
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
    "t_embedder.mlp.0",
    "cap_embedder.1",
    "img_in",
    "txt_in",
    "proj_out_1",
    "proj_out_2",
    "context_embedder.proj_in",
    "time_step_proj.linear_1",
    "patch_embed.text_proj",
    "time_embedding.linear_1",
    "final_layer.linear",
    "distilled_guidance_layer.in_proj",
    "norm_out.linear_2",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
    "audio_caption_projection.linear_1",
]

QUANTISED = [
    "single_transformer_blocks.0.proj_out",
    "single_transformer_blocks.7.proj_mlp",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.norm1_context.linear",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
    "transformer_blocks.0.ff_context.net.2",
    "transformer_blocks.0.img_mod.1",
    "transformer_blocks.0.attn.add_q_proj",
    "blocks.0.attn2.add_k_proj",
    "layers.0.feed_forward.w1",
    "layers.0.adaLN_modulation.0",
    "noise_refiner.0.attention.to_q",
    "blocks.0.ffn.net.0.proj",
    "0",
    "2",
    "up",
    "down",
    "gate",
    "joint_transformer_blocks.0.ff.out_projection",
    "vace_blocks.0.proj_out",
    "single_transformer_blocks.0.norm.linear",
    "proj_out",
    "proj_in",
]


@pytest.mark.parametrize("name", KEPT)
def test_embedders_and_final_projections_keep_their_precision(name: str) -> None:
    assert skipped_by(name, BUILTIN_SKIP)
    assert route_of(linear(name, 1024, 1024), Options(), {})[0] == "keep"


@pytest.mark.parametrize("name", QUANTISED)
def test_linears_of_blocks_are_quantised(name: str) -> None:
    """The last two as well: wide ones are a block's own, compiled by itself."""
    assert route_of(linear(name, 1024, 1024), Options(), {})[0] == "w4a4"


@pytest.mark.parametrize("name", ["proj_in", "proj_out", "audio_proj_out"])
def test_narrow_first_and_final_projections_keep_their_precision(name: str) -> None:
    assert skipped_by(name, SKIP_NARROW)
    for sizes in ((3072, 64), (128, 2048)):
        assert route_of(linear(name, *sizes), Options(), {})[0] == "keep"
