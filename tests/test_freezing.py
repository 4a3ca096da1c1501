"""What freezing holds beside the model: at no time a second copy of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import pq_compile
from passes.lower import Lowered, Source, example_inputs
from pq_compile import formats, staging
from pq_compile.entries import Maker
from pq_compile.errors import Refused
from pq_compile.formats import FORMATS
from pq_compile.options import Options
from pq_compile.released import Released, release
from tests.models import denoiser, inputs, run, unit_of
from tests.watching import Held

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def maker(fold: Any, **options: Any) -> Maker:
    return Maker(fold, frozenset({"w"}), frozenset(), Options(recipe="random", **options))


@pytest.mark.parametrize("form", FORMATS)
def test_packing_holds_one_reordered_copy_and_a_few_rows(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "CHUNK", 1 << 14)
    weight = nn.Parameter(torch.randn(512, 512, dtype=torch.bfloat16), requires_grad=False)
    order = torch.randperm(512)
    made = maker(
        lambda _, values: values.index_select(0, order), release_weights="keep", format=form
    )
    with Held() as held:
        entry = made.entry("w", weight)
    assert entry.packed is not None
    packed = sum(part.nbytes for part in entry.packed)
    assert held.peak <= weight.nbytes + packed + 32 * formats.CHUNK


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", FORMATS)
def test_a_weight_that_is_not_finite_is_refused_by_name_and_stays(form: str, bad: float) -> None:
    weight = nn.Parameter(torch.randn(8, 128), requires_grad=False)
    weight[7, 127] = bad
    with pytest.raises(Refused, match="the weight w holds NaN or Inf"):
        maker(lambda _, values: values, format=form).entry("w", weight)
    assert type(weight) is nn.Parameter


def test_an_original_is_gone_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = denoiser(dtype=torch.float32)
    storages = {
        name: StorageWeakRef(parameter.untyped_storage())  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters()
    }
    packed: list[str] = []
    pack = Maker._pack

    def noted(self: Maker, name: str, weight: Tensor) -> tuple[Tensor, ...]:
        gone = [one for one in packed if storages[one].expired()]  # type: ignore[no-untyped-call]
        assert gone == packed
        packed.append(name)
        return pack(self, name, weight)

    monkeypatch.setattr(Maker, "_pack", noted)
    compiled: Any = torch.compile(
        model, backend="permuquant", options={"recipe": "random", "progress": False}
    )
    latents, condition = inputs(0, dtype=torch.float32)
    run(compiled, latents, condition)
    assert len(packed) == 14
    assert all(isinstance(model.get_parameter(name), Released) for name in packed)


@pytest.mark.parametrize("release", ["backup", "drop", "keep"])
def test_the_bytes_reported_are_those_of_the_tensors_that_are_there(release: str) -> None:
    model = denoiser(dtype=torch.bfloat16)
    compiled: Any = torch.compile(
        model,
        backend="permuquant",
        options={"recipe": "random", "progress": False, "release_weights": release},
    )
    run(compiled, *inputs(0, dtype=torch.bfloat16))
    there: list[Tensor] = [p for p in model.parameters() if not isinstance(p, Released)]
    there += [part for parts in unit_of(model).served().values() for part in parts]
    summary = pq_compile.report(compiled).to_dict()
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in there}
    assert sum(summary["memory"].values()) == sum(storages.values())
    assert summary["summary"]["weight_bytes_after"] == sum(storages.values())
    assert summary["summary"]["weight_bytes_before"] == sum(
        p.nbytes for p in denoiser(dtype=torch.bfloat16).parameters()
    )


def test_freezing_leaves_nothing_behind_but_what_serves() -> None:
    """Rows, trial orders and fp32 copies are let go of; what was backed up lies in host memory."""
    model = denoiser(dtype=torch.float32)
    options: dict[str, Any] = {"recipe": "permuquant", "progress": False, "tau": 0.0}
    compiled: Any = torch.compile(model, backend="permuquant", options=options)
    for seed in range(2):
        run(compiled, *inputs(seed, dtype=torch.float32))
    with Held() as held:
        pq_compile.freeze(compiled)
        left = held.alive()
    unit = unit_of(model)
    assert unit.plan is not None
    assert any(verdict.accepted for verdict in unit.plan.verdicts)
    served = sum(part.nbytes for parts in unit.served().values() for part in parts)
    released = [p for p in model.parameters() if isinstance(p, Released)]
    backups = sum(p.nbytes for p in released)
    one_nan = sum(p.element_size() for p in released)
    assert left == served + backups + one_nan


def test_originals_of_reordered_copies_are_given_back_as_well() -> None:
    """What is not packed counts once: the parameters are either as they were or reordered."""
    model = denoiser(dtype=torch.float32)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled: Any = torch.compile(
        model, backend="permuquant", options={"recipe": "random", "progress": False}
    )
    run(compiled, *inputs(0, dtype=torch.float32))
    memory = pq_compile.report(compiled).to_dict()["memory"]
    left = [name for name in whole if name not in unit_of(model).needs.packed]
    assert memory["reordered copies"] > 0
    assert memory["originals kept"] == 0
    unpacked = memory["reordered copies"] + memory["as they were"]
    assert unpacked == sum(whole[name].nbytes for name in left)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name])


def test_packed_weights_that_cannot_be_given_back_are_named() -> None:
    model = denoiser(dtype=torch.float32)
    weight = model.blocks[1].up.weight
    memory = torch.cat([weight.flatten(), weight[0]])
    model.blocks[1].up.weight = nn.Parameter(memory[: weight.numel()].view_as(weight), False)
    compiled: Any = torch.compile(
        model, backend="permuquant", options={"recipe": "rtn", "progress": False}
    )
    run(compiled, *inputs(0, dtype=torch.float32))
    report = pq_compile.report(compiled).to_dict()
    assert report["memory"]["originals kept"] == weight.nbytes
    assert any(
        "1 packed weights stay in their own precision too, 65,536 bytes" in warning
        and warning.endswith("blocks.1.up.weight")
        for warning in report["summary"]["warnings"]
    )


def test_what_is_released_is_compiled_as_the_copy_that_serves_for_it() -> None:
    """A released parameter has strides of 0; a graph compiled for those would read one number."""
    weight = nn.Parameter(torch.randn(6, 4), requires_grad=False)
    release(weight, "w", keep_backup=False)
    lowered = Lowered(torch.fx.GraphModule({}, torch.fx.Graph()), (Source(0), Source(1)), ())
    other = torch.randn(3, 5).T
    first, second = example_inputs(lowered, [weight, other], "nvfp4", None)
    assert (first.shape, first.stride(), first.dtype) == ((6, 4), (4, 1), torch.float32)
    assert second is other


@pytest.mark.parametrize("size", [2, 100, 4096, 5000])
def test_a_copy_by_way_of_a_small_buffer_is_the_tensor(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "STAGE", 4096)
    monkeypatch.setattr(staging, "_stage", lambda n: torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(Tensor, "is_cuda", True)
    for given in (torch.randn(size).bfloat16(), torch.randn(3, size).T, torch.randn(2, size, 1)):
        found = staging.to_host(given)
        assert torch.equal(found, given)
        assert found.stride() == given.stride()
        assert found.data_ptr() != given.data_ptr()


def test_where_no_memory_can_be_pinned_the_copy_is_a_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(staging, "_stage", lambda n: None)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    given = torch.randn(5, 3)
    assert torch.equal(staging.to_host(given), given)
