"""What calibration keeps, and how it holds rows out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from passes.calibrate import Observer
from passes.split import conditioning, split
from pq_compile.errors import Refused
from pq_compile.plan import Statistics
from tests.watching import Waits


def latents(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (1, 8, 4), generator=torch.Generator().manual_seed(seed))


def pipeline(prompts: int, steps: int, guided: bool) -> Iterator[dict[str, Tensor]]:
    """The inputs of every call of a pipeline, one branch of guidance after the other."""
    for prompt in range(prompts):
        for step in range(steps):
            x = latents(1000 * prompt + step)
            for text in (prompt, -1) if guided else (prompt,):
                yield {
                    "x": x,
                    "text": (text + 2) * torch.tensor([[[1.0, -1.0]]]),
                    "t": torch.tensor([1 - step / steps]),
                    "ids": torch.arange(12.0).reshape(4, 3),
                }


def observed(
    calls: Sequence[dict[str, Tensor]] | Iterator[dict[str, Tensor]], seed: int = 0
) -> Observer:
    """Every row that call ``n`` observes holds ``n``, from 1."""
    observer = Observer(seed)
    for number, inputs in enumerate(calls, 1):
        observer.begin_call(inputs)
        observer.observe(torch.full((20, 2), float(number)), ["w.weight"])
    return observer


def sides(observer: Observer) -> tuple[set[int], set[int], str]:
    found = observer.finish()["w.weight"]
    fit, held_out = ({int(n) for n in rows[:, 0]} for rows in (found.fit, found.held_out))
    return fit, held_out, found.held_out_by


def test_second_moments_are_means_over_every_row_of_every_call() -> None:
    observer = Observer(seed=0, blocks=1, rows_per_block=1)
    for rows in ([[1.0, 2.0], [3.0, 0.0]], [[5.0, 4.0]]):
        observer.begin_call({})
        observer.observe(torch.tensor([rows], dtype=torch.bfloat16), ["w"])
    found = observer.finish()["w"]
    assert found.rows == 3
    assert found.second_moment.dtype == torch.float64
    expected = torch.tensor([35.0, 20.0], dtype=torch.float64) / 3
    assert torch.equal(found.second_moment, expected)
    assert found.fit.dtype == torch.bfloat16


def test_weights_that_read_one_tensor_share_one_sample() -> None:
    observer = Observer(seed=0)
    observer.begin_call({})
    observer.observe(latents(0, 9, 2), ["q", "k"])
    found = observer.finish()
    assert found["q"] is found["k"]


def test_a_weight_used_twice_in_a_call_counts_both_inputs() -> None:
    observer = Observer(seed=0)
    observer.begin_call({})
    observer.observe(torch.ones(2, 2), ["w"])
    observer.observe(torch.full((2, 2), 3.0), ["w", "v"])
    found = observer.finish()
    assert (found["w"].rows, found["v"].rows) == (4, 2)
    assert found["w"].second_moment.tolist() == [5.0, 5.0]


def test_finish_may_be_called_again_after_more_calls() -> None:
    calls = list(pipeline(prompts=4, steps=4, guided=False))
    observer = observed(calls[:8])
    first = sides(observer)
    assert sides(observer) == first
    for number, inputs in enumerate(calls[8:], 9):
        observer.begin_call(inputs)
        observer.observe(torch.full((20, 2), float(number)), ["w.weight"])
    assert sides(observer) == sides(observed(calls))


@pytest.mark.parametrize("calls", [1, 64, 1000])
def test_memory_is_constant_however_many_calls(calls: int) -> None:
    observer = Observer(seed=0, blocks=8, rows_per_block=4)
    for number in range(calls):
        observer.begin_call({})
        observer.observe(torch.full((6, 2), float(number)), ["w"])
    found = observer.finish()["w"]
    rows = len(found.fit) + len(found.held_out)
    assert rows == 4 * min(calls, 8)
    held = [rows for seen in observer._inputs.values() for _, rows in seen.blocks]
    assert sum(rows.untyped_storage().nbytes() for rows in held) == 32 * min(calls, 8)
    assert observer.calls == calls


def test_the_sample_covers_all_calls_and_not_the_first_ones() -> None:
    chosen = []
    for seed in range(40):
        observer = Observer(seed, blocks=8, rows_per_block=1)
        for number in range(100):
            observer.begin_call({})
            observer.observe(torch.full((1, 1), float(number)), ["w"])
        found = observer.finish()["w"]
        chosen += torch.cat([found.fit, found.held_out]).flatten().tolist()
    assert len(chosen) == 320
    assert abs(sum(chosen) / 320 - 49.5) < 5
    assert min(chosen) < 10
    assert max(chosen) > 90


def test_rows_of_a_call_are_different_rows() -> None:
    observer = Observer(seed=3, rows_per_block=16)
    observer.begin_call({})
    observer.observe(torch.arange(100.0).reshape(4, 25, 1), ["w"])
    found = observer.finish()["w"]
    assert len(set(torch.cat([found.fit, found.held_out]).flatten().tolist())) == 16


def test_the_same_seed_keeps_the_same_rows_and_another_one_others() -> None:
    def rows(seed: int) -> list[float]:
        observer = Observer(seed, blocks=4, rows_per_block=4)
        for number in range(20):
            observer.begin_call({})
            observer.observe(latents(number, 30, 1), ["w"])
        found: list[float] = observer.finish()["w"].fit.flatten().tolist()
        return found

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_whole_prompts_are_held_out() -> None:
    fit, held_out, by = sides(observed(pipeline(prompts=8, steps=8, guided=False)))
    prompts_of = [{(call - 1) // 8 for call in side} for side in (fit, held_out)]
    assert by == "run"
    assert prompts_of[0].isdisjoint(prompts_of[1])
    assert [len(prompts) for prompts in prompts_of] == [6, 2]


@pytest.mark.parametrize("seed", range(6))
def test_alternating_guidance_holds_out_prompts_and_fits_to_the_empty_one(seed: int) -> None:
    fit, held_out, by = sides(observed(pipeline(prompts=4, steps=8, guided=True), seed))
    assert by == "run"
    assert len({(call - 1) // 16 for call in held_out}) == 1
    assert len(held_out) == 8
    assert all(call % 2 == 1 for call in held_out)
    assert {call for call in range(1, 65) if call % 2 == 0} <= fit


def test_few_step_models_have_runs_of_few_calls() -> None:
    fit, held_out, by = sides(observed(pipeline(prompts=16, steps=4, guided=False)))
    assert by == "run"
    assert {(call - 1) // 4 for call in fit}.isdisjoint((call - 1) // 4 for call in held_out)


def test_a_batch_of_prompt_and_empty_prompt_is_one_content() -> None:
    calls = [
        {**inputs, "text": torch.cat([inputs["text"], torch.zeros(1, 1, 2)])}
        for inputs in pipeline(prompts=4, steps=6, guided=False)
    ]
    fit, held_out, by = sides(observed(calls))
    assert by == "run"
    assert {(call - 1) // 6 for call in fit}.isdisjoint((call - 1) // 6 for call in held_out)


def test_prompts_in_random_order_still_make_runs() -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
    calls = list(pipeline(prompts=8, steps=6, guided=False))
    fit, held_out, by = sides(observed([calls[i] for i in order]))
    prompts_of = [{order[call - 1] // 6 for call in side} for side in (fit, held_out)]
    assert by == "run"
    assert prompts_of[0].isdisjoint(prompts_of[1])


@pytest.mark.parametrize("guided", [False, True])
def test_one_prompt_is_held_out_by_call_unless_the_empty_one_is_another(guided: bool) -> None:
    observer = observed(pipeline(prompts=1, steps=16, guided=guided))
    fit, held_out, by = sides(observer)
    assert by == ("run" if guided else "call")
    assert fit.isdisjoint(held_out)
    assert len(held_out) == (16 if guided else 4)
    assert len(observer.warnings()) == (0 if guided else 1)


def test_a_block_whose_inputs_never_come_back_is_held_out_by_call() -> None:
    """Also where two branches of guidance share what depends on the timestep alone."""
    calls = [{"x": latents(n), "temb": torch.full((1, 4), float(n // 2))} for n in range(32)]
    observer = observed(calls)
    fit, held_out, by = sides(observer)
    assert by == "call"
    assert fit | held_out == set(range(1, 33))
    assert len(held_out) == 8
    assert {call % 2 for call in held_out} == {0, 1}
    assert "held out by call" in observer.warnings()[0]


def test_timesteps_that_come_back_with_every_prompt_are_no_runs() -> None:
    contents = [{"text": n // 12, "temb": n % 12, "ids": 0} for n in range(48)]
    assert conditioning(contents) == ("text",)


def test_of_three_guidance_branches_the_shared_latents_make_no_run() -> None:
    contents = [
        {"x": n // 3, "text": [n // 60, 8, 9][n % 3], "mask": [0, 1, 1][n % 3]} for n in range(180)
    ]
    assert conditioning(contents) == ("text", "mask")


def test_a_run_seen_through_two_graphs_stays_whole() -> None:
    """Another graph of the model has another input; a lacking input is a content as well."""
    contents = {n: {"text": n // 8} | ({"mask": 0} if n // 8 == 2 else {}) for n in range(32)}
    found = split(contents, list(contents), seed=0)
    assert found.by == "run"
    assert len({n // 8 for n in found.held_out}) == 1
    assert len(found.held_out) == 8


def test_an_input_that_only_some_calls_have_tells_runs_apart() -> None:
    contents = {n: {"mask": 0} if n >= 16 else {} for n in range(32)}
    assert split(contents, list(contents), seed=0).by == "run"


def test_a_run_with_no_sampled_call_is_not_held_out() -> None:
    contents = {n: {"text": n // 8} for n in range(64)}
    for seed in range(20):
        found = split(contents, [0, 1, 2, 60, 61, 62], seed)
        assert found.held_out in ({0, 1, 2}, {60, 61, 62})


def test_the_rows_of_a_single_call_are_split() -> None:
    observer = observed(list(pipeline(1, 1, guided=False)))
    found = observer.finish()["w.weight"]
    assert found.held_out_by == "none"
    assert (len(found.fit), len(found.held_out)) == (12, 4)
    assert any("a single call" in warning for warning in observer.warnings())


def test_a_single_row_is_both_fitted_to_and_judged_by() -> None:
    observer = Observer(seed=0)
    observer.begin_call({})
    observer.observe(torch.ones(1, 4), ["w"])
    found = observer.finish()["w"]
    assert torch.equal(found.fit, found.held_out)
    assert found.fit.shape == (1, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_with_the_culprit(bad: float) -> None:
    observer = Observer(seed=0)
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    x[1, 2] = bad
    with pytest.raises(Refused, match=r"the input text of call 1 holds NaN or Inf"):
        observer.begin_call({"ids": torch.ones(2, 2), "text": x})
    assert observer.calls == 0
    observer.begin_call({})
    with pytest.raises(Refused, match=r"the input of blocks\.0\.to_q in call 1 holds NaN or Inf"):
        observer.observe(x, ["blocks.0.to_q.weight", "blocks.0.to_k.weight"])
    assert observer.finish() == {}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is observed stays where it is until the call ends."""
    monkeypatch.setattr(Tensor, "is_cuda", True)


def observed_twice(observer: Observer, calls: int) -> dict[str, Statistics]:
    """Two inputs a call, one of them read at two places."""
    for number in range(calls):
        observer.begin_call({})
        for shift, weights in enumerate((["q", "k"], ["w"], ["w", "v"], ["q", "k"])):
            observer.observe(latents(10 * number + shift, 9, 2), weights)
    return observer.finish()


def test_what_is_taken_in_at_the_end_of_a_call_is_the_same(
    request: pytest.FixtureRequest,
) -> None:
    """More calls than blocks: the draws know of the observations that are not taken in yet."""
    at_once = observed_twice(Observer(seed=1, blocks=5, rows_per_block=3), 12)
    request.getfixturevalue("as_on_a_gpu")
    later = observed_twice(Observer(seed=1, blocks=5, rows_per_block=3), 12)
    assert later.keys() == at_once.keys()
    for name, one in later.items():
        assert torch.equal(one.second_moment, at_once[name].second_moment)
        assert torch.equal(one.fit, at_once[name].fit)
        assert torch.equal(one.held_out, at_once[name].held_out)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_gpu_is_waited_for_once_a_call() -> None:
    observer = Observer(seed=0)
    observer.begin_call({})
    with Waits() as waits:  # type: ignore[no-untyped-call]
        for n in range(9):
            observer.observe(latents(n, 9, 2), [f"w{n}"])
        assert waits.count == 0
        observer.end_call()
    assert waits.count <= 1
    assert len(observer.finish()) == 9


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("ended_by", ["end_call", "begin_call", "finish", "warnings"])
def test_a_call_that_held_nan_on_a_gpu_is_refused_at_its_end_and_forgotten(ended_by: str) -> None:
    observer = Observer(seed=0)
    observer.begin_call({})
    observer.observe(torch.ones(3, 4), ["good.weight"])
    observer.observe(torch.full((3, 4), float("nan")), ["blocks.0.to_q.weight", "k.weight"])
    observer.observe(torch.ones(3, 4), ["later.weight"])
    with pytest.raises(Refused, match=r"the input of blocks\.0\.to_q in call 1 holds NaN or Inf"):
        getattr(observer, ended_by)(*([{}] if ended_by == "begin_call" else []))
    assert observer.finish() == {}
    observer.begin_call({})
    observer.observe(torch.ones(3, 4), ["good.weight"])
    assert observer.finish()["good.weight"].rows == 3


def test_infinities_that_cancel_are_still_refused() -> None:
    x = torch.tensor([[float("inf"), -float("inf")]])
    with pytest.raises(Refused, match="call 1"):
        Observer(seed=0).begin_call({"x": x})


@pytest.mark.parametrize(
    ("times", "warns"),
    [
        ([1.0, 0.75, 0.5, 0.25], False),
        ([1000, 750, 500, 20], False),
        ([1.0, 0.9, 0.8, 0.7, 0.6], True),
        ([1.0, 0.5, 0.0], True),
        ([1.0, 1.0, 1.0, 1.0], True),
    ],
)
def test_timesteps_that_do_not_span_the_schedule_are_warned_of(
    times: list[float], warns: bool
) -> None:
    observer = Observer(seed=0)
    for time in times:
        observer.begin_call({"t": torch.tensor([time]), "guidance": torch.tensor([3.5])})
    assert any("span" in warning for warning in observer.warnings()) == warns


def test_a_graph_without_timesteps_is_not_warned_of() -> None:
    other = {"labels": torch.tensor([207]), "on": torch.tensor(True), "rope": torch.ones(2) * 1j}
    observer = observed([{"x": latents(n), **other} for n in range(8)])
    assert not any("span" in warning for warning in observer.warnings())


def test_observing_works_in_and_out_of_inference_mode() -> None:
    observer = Observer(seed=0)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            x = torch.ones(2, 4, requires_grad=not mode)
            observer.begin_call({"x": x})
            observer.observe(x, ["w"])
    found = observer.finish()["w"]
    assert found.rows == 6
    assert not found.fit.is_inference()
    assert not found.fit.requires_grad
