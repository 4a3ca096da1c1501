"""Observe, freeze, serve: the answer is the model's own, then the plan's, and never a stale one."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pq_compile
from pq_compile import entries, released
from pq_compile.errors import Refused
from pq_compile.released import Released
from tests.models import (
    CLOSE,
    Denoiser,
    denoiser,
    inputs,
    relative_error,
    run,
    served_by_hand,
    unit_of,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Compile = Callable[..., Any]


def compiled(model: nn.Module, **options: Any) -> Any:
    options = {"calibration_calls": 3, "progress": False, "recipe": "random", **options}
    return torch.compile(model, backend="permuquant", options=options)


def by_hand(model: Denoiser, *args: Tensor) -> Tensor:
    """What ``model``'s plan says, computed on its present weights in plain torch."""
    with served_by_hand(copy.deepcopy(model), model) as copied:
        return run(copied, *args)


def served(model: Denoiser, **options: Any) -> Any:
    """Compiled and frozen."""
    fast = compiled(model, **options)
    for seed in range(3):
        run(fast, *inputs(seed))
    assert unit_of(model).frozen
    return fast


@pytest.mark.parametrize("recipe", ["permuquant", "best"])
def test_it_answers_in_its_own_precision_until_it_has_seen_enough(recipe: str) -> None:
    model = denoiser()
    fast = compiled(model, recipe=recipe)
    for seed in range(3):
        assert torch.equal(run(fast, *inputs(seed)), run(model, *inputs(seed)))
    assert relative_error(run(fast, *inputs(9)), run(model, *inputs(9))) > 1e-3
    assert relative_error(run(fast, *inputs(9)), by_hand(model, *inputs(9))) < CLOSE


@pytest.mark.parametrize("release", ["backup", "keep", "drop"])
@pytest.mark.parametrize("recipe", ["rtn", "random"])
def test_it_serves_what_the_plan_says(recipe: str, release: str) -> None:
    model = denoiser()
    original = copy.deepcopy(model)
    fast = served(model, recipe=recipe, release_weights=release)
    with served_by_hand(original, model):
        for seed in range(2):
            expected = run(original, *inputs(seed))
            assert relative_error(run(fast, *inputs(seed)), expected) < CLOSE


def test_reordering_alone_changes_nothing() -> None:
    model = denoiser()
    fast = compiled(model, format="none")
    given = inputs(0)
    expected = run(model, *given)
    assert relative_error(run(fast, *given), expected) < 1e-12
    assert unit_of(model).orders


def test_two_instances_of_one_class_are_served_each_by_its_own_weights() -> None:
    models = [denoiser(seed) for seed in (0, 1)]
    fasts = [served(model) for model in models]
    for model, fast in zip(models, fasts, strict=True):
        assert relative_error(run(fast, *inputs(5)), by_hand(model, *inputs(5))) < CLOSE
    assert unit_of(models[0]) is not unit_of(models[1])


@pytest.mark.parametrize("release", ["backup", "keep"])
def test_blocks_compiled_in_place_share_graphs_and_not_weights(release: str) -> None:
    model = denoiser(blocks=3)
    for block in model.blocks:
        block.compile(
            backend="permuquant",
            options={
                "calibration_calls": 2,
                "progress": False,
                "recipe": "random",
                "release_weights": release,
            },
        )
    for seed in range(4):
        run(model, *inputs(seed))
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._compiled_call_impl = None
    with served_by_hand(plain, model):
        assert relative_error(run(model, *inputs(7)), run(plain, *inputs(7))) < CLOSE
    report = pq_compile.report(model).to_dict()
    assert report["summary"]["phase"] == "serving"
    assert "blocks.2.to_out" in {linear["name"] for linear in report["linears"]}


def _data_add(model: Denoiser) -> None:
    for block in model.blocks:
        block.up.weight.data += 0.1


def _add(model: Denoiser) -> None:
    with torch.no_grad():
        for block in model.blocks:
            block.norm.weight.mul_(1.5)
            block.to_v.weight.add_(0.1)


def _load(model: Denoiser) -> None:
    model.load_state_dict(denoiser(5).state_dict())


def _assign(model: Denoiser) -> None:
    model.load_state_dict(denoiser(5).state_dict(), assign=True)


def _replace(model: Denoiser) -> None:
    model.blocks[0].down = nn.Linear(256, 64).double().requires_grad_(False)


def _round_trip(model: Denoiser) -> None:
    model.to(torch.bfloat16).to(torch.float64)


@pytest.mark.parametrize("release", ["backup", "keep"])
@pytest.mark.parametrize("change", [_data_add, _add, _load, _assign, _replace, _round_trip])
def test_changed_weights_are_served_fresh(change: Callable[[Denoiser], None], release: str) -> None:
    model = denoiser()
    fast = served(model, release_weights=release)
    before = run(fast, *inputs(4))
    change(model)
    if change is _data_add and release == "keep":
        pq_compile.refresh(fast)
    for _ in range(2):  # the first call packs, the second finds the new graph
        after = run(fast, *inputs(4))
        assert relative_error(after, by_hand(model, *inputs(4))) < CLOSE
    assert not torch.equal(after, before)


def test_another_size_is_served_by_the_same_weights() -> None:
    model = denoiser()
    fast = served(model)
    for batch, tokens in ((1, 12), (2, 12), (7, 12), (2, 20), (7, 33)):
        given = inputs(3, batch, tokens)
        assert relative_error(run(fast, *given), by_hand(model, *given)) < CLOSE


def test_what_served_before_a_change_is_freed_though_other_graphs_served_it_too() -> None:
    model = denoiser()
    fast = served(model)
    run(fast, *inputs(3, 2, 20))
    unit = unit_of(model)
    before = [weakref.ref(tensor) for tensors in unit.served().values() for tensor in tensors]
    model.load_state_dict(denoiser(5).state_dict())
    after = run(fast, *inputs(4))
    assert relative_error(after, by_hand(model, *inputs(4))) < CLOSE
    quantised = sum(len(tensors) for tensors in unit.served().values() if len(tensors) == 3)
    assert quantised
    assert sum(reference() is not None for reference in before) <= len(before) - quantised
    pq_compile.refresh(fast)
    assert not any(reference() is not None for reference in before)


def test_parameters_that_change_places_are_served_in_their_new_ones() -> None:
    model = denoiser()
    fast = served(model, release_weights="keep")
    for name in ("up", "to_q"):
        one, other = (getattr(block, name) for block in model.blocks)
        one.weight, other.weight = other.weight, one.weight
    for _ in range(2):
        assert relative_error(run(fast, *inputs(4)), by_hand(model, *inputs(4))) < CLOSE


def test_a_write_that_other_threads_make_between_calls_is_seen_by_every_thread() -> None:
    model = denoiser()
    fast = served(model)
    failures: list[BaseException] = []
    turns = threading.Barrier(3)

    def work(turn: int) -> None:
        try:
            for _ in range(3):
                turns.wait()
                if turn == 0:
                    _data_add(model)
                turns.wait()
                found = run(fast, *inputs(4))
                turns.wait()
                assert relative_error(found, by_hand(model, *inputs(4))) < CLOSE
        except BaseException as error:
            turns.abort()
            failures.append(error)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_originals_are_released_and_read_as_before() -> None:
    model = denoiser()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    served(model)
    plan = unit_of(model).plan
    assert plan is not None
    quantised = {one.linear.weight for one in plan.linears if one.route != "keep"}
    released = {name for name, p in model.named_parameters() if isinstance(p, Released)}
    reordered = {name for name, served in unit_of(model).served().items() if len(served) == 1}
    assert released == quantised | reordered
    assert "x_embedder.weight" in reordered
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(other, *inputs(1)), run(denoiser(), *inputs(1)))


def test_packed_weights_take_few_bits() -> None:
    model = denoiser()
    fast = served(model)
    for linear in pq_compile.report(fast).to_dict()["linears"]:
        if linear["route"] != "keep":
            assert linear["bits_per_weight"] <= 4.6


def test_dropped_originals_are_an_error_to_read_and_can_be_loaded_again() -> None:
    model = denoiser()
    fast = served(model, release_weights="drop")
    with pytest.raises(Refused, match=r"x_embedder\.weight were dropped"):
        model.state_dict()
    run(fast, *inputs(0))
    model.load_state_dict(denoiser(3).state_dict())
    unit = unit_of(model)
    after = run(fast, *inputs(0))
    with served_by_hand(denoiser(3), model) as expected:
        assert relative_error(after, run(expected, *inputs(0))) < CLOSE
    assert unit_of(model) is unit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_every_dtype_serves_under_no_grad_and_inference_mode(
    dtype: torch.dtype, context: Callable[[], Any]
) -> None:
    model = denoiser(dtype=dtype)
    fast = compiled(model, calibration_calls=2, recipe="permuquant")
    given = inputs(0, dtype=dtype)
    with context():
        out = [fast(*given) for _ in range(4)]
        own = model(*given)
    assert torch.equal(out[0], own)
    assert out[3].dtype == dtype
    assert 1e-3 < relative_error(out[3], own) < 0.3


def test_threads_calling_at_once_are_all_answered_right() -> None:
    model = denoiser()
    fast = compiled(model, calibration_calls=6)
    own = {seed: run(model, *inputs(seed)) for seed in range(8)}
    found: dict[int, list[Tensor]] = {seed: [] for seed in range(8)}
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(4):
                found[seed].append(run(fast, *inputs(seed)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert unit_of(model).frozen
    for seed, answers in found.items():
        quantised = by_hand(model, *inputs(seed))
        for answer in answers:
            assert torch.equal(answer, own[seed]) or relative_error(answer, quantised) < CLOSE


def test_calibration_can_be_made_explicit() -> None:
    model = denoiser()
    fast = compiled(model, recipe="permuquant", calibration_calls=2)
    with pq_compile.calibration(fast):
        for seed in range(5):
            assert torch.equal(run(fast, *inputs(seed)), run(model, *inputs(seed)))
    assert unit_of(model).frozen
    assert pq_compile.report(fast).to_dict()["summary"]["calibration_calls"] == 5


def test_an_interrupted_calibration_leaves_the_model_observing() -> None:
    model = denoiser()
    fast = compiled(model, recipe="permuquant")

    def interrupted() -> None:
        with pq_compile.calibration(fast):
            run(fast, *inputs(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not unit_of(model).frozen
    assert torch.equal(run(fast, *inputs(1)), run(model, *inputs(1)))
    pq_compile.freeze(fast)
    assert unit_of(model).frozen


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=repr)
def test_a_freeze_that_fails_leaves_the_model_in_its_own_precision(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = denoiser()
    fast = compiled(model)
    run_release, left = released.release, 3

    def fail(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise error
        run_release(*args, **kwargs)

    monkeypatch.setattr(entries, "release", fail)
    if isinstance(error, Exception):
        with pytest.warns(RuntimeWarning, match="freezing failed .MemoryError: no room"):
            run(fast, *inputs(0))
        assert torch.equal(run(fast, *inputs(1)), run(model, *inputs(1)))
        assert "no room" in str(pq_compile.report(fast))
    else:
        with pytest.raises(KeyboardInterrupt):
            run(fast, *inputs(0))
    assert not any(isinstance(p, Released) for p in model.parameters())
    monkeypatch.setattr(entries, "release", run_release)
    run(fast, *inputs(0)) if not isinstance(error, Exception) else pq_compile.freeze(fast)
    assert relative_error(run(fast, *inputs(1)), by_hand(model, *inputs(1))) < CLOSE


@pytest.mark.parametrize("recipe", ["random", "permuquant"])
def test_a_model_that_dies_takes_its_packed_weights_along(recipe: str) -> None:
    model = denoiser()
    fast = compiled(model, recipe=recipe)
    run(fast, *inputs(0))
    unit, weight = weakref.ref(unit_of(model)), weakref.ref(model.blocks[0].up.weight)
    packed = [
        weakref.ref(tensor) for tensors in unit_of(model).served().values() for tensor in tensors
    ]
    assert bool(packed) == (recipe == "random")
    del model, fast  # and nobody resets Dynamo, whose cache lives on
    gc.collect()
    assert not any(reference() is not None for reference in (unit, weight, *packed))


@pytest.mark.parametrize("release", ["backup", "keep"])
def test_memory_that_is_used_again_at_the_same_address_is_packed_again(release: str) -> None:
    model = denoiser()
    weight = model.blocks[0].up.weight
    memory = torch.randn(256, 64, dtype=torch.float64).numpy()
    weight.data = torch.from_numpy(memory)
    fast = served(model, release_weights=release)
    memory *= 2
    weight.data = torch.from_numpy(memory)
    assert relative_error(run(fast, *inputs(4)), by_hand(model, *inputs(4))) < CLOSE


def test_a_parameter_takes_over_the_name_of_one_that_died_and_not_its_packed_weight() -> None:
    model = denoiser()
    memory = torch.randn(256, 64, dtype=torch.float64).numpy()
    model.blocks[0].up.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
    fast = served(model, release_weights="keep")
    for _ in range(2):
        del model.blocks[0].up.weight
        memory *= 2
        model.blocks[0].up.weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
        assert relative_error(run(fast, *inputs(4)), by_hand(model, *inputs(4))) < CLOSE


def test_slices_of_one_memory_are_not_released() -> None:
    model = denoiser()
    weight = model.blocks[0].up.weight
    memory = torch.cat([weight.flatten(), weight[0]])
    model.blocks[0].up.weight = nn.Parameter(memory[: weight.numel()].view_as(weight), False)
    fast = served(model)
    assert {type(block.up.weight) for block in model.blocks} == {nn.Parameter, Released}
    memory.mul_(2)
    assert torch.equal(model.blocks[0].up.weight.flatten(), memory[: weight.numel()])
    pq_compile.refresh(fast)
    assert relative_error(run(fast, *inputs(4)), by_hand(model, *inputs(4))) < CLOSE


def test_a_model_made_under_inference_mode_is_served() -> None:
    with torch.inference_mode():
        model = denoiser()
    fast = compiled(model)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            for _ in range(2):
                found = fast(*inputs(0))
        assert relative_error(found, by_hand(model, *inputs(0))) < CLOSE


def test_a_frozen_model_can_be_trained_and_is_served_afresh() -> None:
    model, plain, given = denoiser(), denoiser(), inputs(0)
    fast = served(model)
    for one in (model, plain):
        one.requires_grad_(True)
        one(*given).square().mean().backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
        one.requires_grad_(False)
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert relative_error(run(fast, *given), by_hand(model, *given)) < CLOSE


def test_a_model_compiled_again_with_other_options_follows_them() -> None:
    model = denoiser()
    served(model)
    for options in ({"format": "int4"}, {"format": "none"}, {"skip": ("*up",)}):
        fast = compiled(model, **options)
        with pytest.warns(RuntimeWarning, match=r"compiled before with other options"):
            run(fast, *inputs(0))
        assert relative_error(run(fast, *inputs(0)), by_hand(model, *inputs(0))) < CLOSE
    assert len(unit_of(model).served()["blocks.0.up.weight"]) == 1  # a reordered copy, not packed


class Wrapped(nn.Module):
    def __init__(self, core: nn.Module, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.core = core
        self.after = nn.Linear(64, 64).double().requires_grad_(False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = self.core(x, condition + self.after(condition))
        return out


@pytest.mark.parametrize("recipe", ["random", "permuquant"])
def test_two_models_may_share_a_part(recipe: str) -> None:
    core = denoiser()
    models = [Wrapped(core, seed) for seed in (1, 2)]
    fasts = [compiled(model, recipe=recipe) for model in models]
    for fast in (*fasts, *fasts):
        for seed in range(4):
            run(fast, *inputs(seed))
    for model, fast in zip(models, fasts, strict=True):
        plain = Wrapped(denoiser(), 0)
        plain.load_state_dict(model.state_dict())
        with served_by_hand(plain, model):
            assert relative_error(run(fast, *inputs(5)), run(plain, *inputs(5))) < CLOSE
        names = [linear["name"] for linear in pq_compile.report(fast).to_dict()["linears"]]
        assert {"after", "core.blocks.0.to_q"} < set(names)
        assert len(set(names)) == len(names)


def test_an_inner_calibration_leaves_the_end_to_the_outer_one() -> None:
    model = denoiser()
    fast = compiled(model, recipe="permuquant")
    with pq_compile.calibration(fast):
        with pq_compile.calibration(fast):
            run(fast, *inputs(0))
        assert not unit_of(model).frozen
        run(fast, *inputs(1))
    assert unit_of(model).frozen
    assert unit_of(model).calls == 2


def test_calibrating_a_frozen_model_is_refused() -> None:
    fast = served(denoiser())
    with (
        pytest.raises(Refused, match=r"frozen already, and nothing would be observed"),
        pq_compile.calibration(fast),
    ):
        run(fast, *inputs(0))
