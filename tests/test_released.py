"""A released parameter behaves as the weight it was, or says clearly that it can't."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pq_compile.errors import Refused
from pq_compile.released import Released, discard_backup, readable, release, staleness_key

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=DTYPES, ids=str)
def linear(request: pytest.FixtureRequest) -> nn.Linear:
    layer = nn.Linear(6, 4, dtype=request.param).requires_grad_(False)
    release(layer.weight, "weight", keep_backup=True)
    return layer


@pytest.fixture
def whole(linear: nn.Linear) -> Tensor:
    return linear.state_dict()["weight"]  # type: ignore[no-any-return]


READS: dict[str, Callable[[nn.Linear], Tensor]] = {
    "clone": lambda layer: layer.weight.clone(),
    "state_dict": lambda layer: layer.state_dict()["weight"],
    "product": lambda layer: layer.weight * 1,
    "to": lambda layer: layer.weight.to(torch.complex128).real.to(layer.weight.dtype),
    "copy_": lambda layer: torch.empty_like(layer.bias).new_empty(4, 6).copy_(layer.weight),
    "deepcopy": lambda layer: copy.deepcopy(layer).weight,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)).weight,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reads_see_the_weight_and_leave_it_released(
    linear: nn.Linear, whole: Tensor, read: Callable[[nn.Linear], Tensor]
) -> None:
    seen = read(linear)
    assert torch.equal(seen, whole)
    assert type(seen) is not Released
    assert isinstance(linear.weight, Released)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "data": lambda weight: weight.data,
    "detach": lambda weight: weight.detach(),
    "transpose": lambda weight: weight.T,
    "adjoint": lambda weight: weight.mH,
    "index": lambda weight: weight[1],
    "rows": lambda weight: list(weight)[2],
    "view": lambda weight: weight.view(-1)[3:],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_what_is_written_to_a_view_reaches_the_weight(
    linear: nn.Linear, whole: Tensor, view: Callable[[Tensor], Tensor]
) -> None:
    view(linear.weight).add_(1)
    view(whole).add_(1)
    assert type(linear.weight) is nn.Parameter
    assert torch.equal(linear.weight, whole)


def test_a_parameter_made_of_it_shares_its_memory(linear: nn.Linear, whole: Tensor) -> None:
    other = nn.Parameter(linear.weight, requires_grad=False)
    assert type(other) is nn.Parameter
    other.add_(1)
    assert torch.equal(linear.weight, whole + 1)


def test_an_average_of_models_goes_on_when_it_was_released(linear: nn.Linear) -> None:
    half = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]
    averaged = torch.optim.swa_utils.AveragedModel(linear, multi_avg_fn=half)
    (weight, _) = averaged.module.parameters()
    other = nn.Linear(6, 4, dtype=weight.dtype)
    release(weight, "weight", keep_backup=True)
    averaged.update_parameters(other)
    assert torch.equal(weight, other.weight)
    release(weight, "weight", keep_backup=True)
    averaged.update_parameters(linear)
    assert torch.equal(weight, torch.lerp(other.weight, linear.weight.detach(), 0.5))


def _in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight += 1


def _assign_rows(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[:] = layer.weight.detach() + 1


def _merge(layer: nn.Linear) -> None:
    layer.weight.data += 1


def _replace(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.detach() + 1


def _load(layer: nn.Linear) -> None:
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight": state["weight"] + 1})


def _foreach(layer: nn.Linear) -> None:
    torch._foreach_add_([layer.weight], 1)


def _out(layer: nn.Linear) -> None:
    torch.add(layer.weight, 1, out=layer.weight)


def _flat(layer: nn.Linear) -> None:
    flat = nn.utils.parameters_to_vector([layer.weight])
    nn.utils.vector_to_parameters(flat + 1, [layer.weight])


def _step(layer: nn.Linear) -> None:
    layer.requires_grad_(True).weight.grad = torch.ones(4, 6, dtype=layer.weight.dtype)
    torch.optim.SGD([layer.weight], lr=1.0, maximize=True, foreach=True).step()


WRITES = (_in_place, _assign_rows, _merge, _replace, _load, _foreach, _out, _flat, _step)


@pytest.mark.parametrize("write", WRITES)
def test_writes_bring_the_weight_back_and_change_its_key(
    linear: nn.Linear, whole: Tensor, write: Callable[[nn.Linear], None]
) -> None:
    identity, key = linear.weight, staleness_key(linear.weight)
    write(linear)
    assert linear.weight is identity
    assert type(linear.weight) is nn.Parameter
    assert torch.equal(linear.weight, whole + 1)
    assert staleness_key(linear.weight) != key


def test_a_weight_can_be_initialised_again(linear: nn.Linear, whole: Tensor) -> None:
    linear.reset_parameters()
    assert type(linear.weight) is nn.Parameter
    assert not torch.equal(linear.weight, whole)
    release(linear.weight, "weight", keep_backup=True)
    nn.init.constant_(linear.weight, 2.0)
    assert bool((linear.weight == 2).all())


def test_gradients_reach_the_weight(linear: nn.Linear, whole: Tensor) -> None:
    linear.requires_grad_(True)
    x = torch.randn(3, 6, dtype=whole.dtype)
    linear(x).square().sum().backward()
    plain = nn.Linear(6, 4, dtype=whole.dtype)
    plain.load_state_dict(linear.state_dict())
    plain(x).square().sum().backward()
    found, expected = linear.weight.grad, plain.weight.grad
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def _its_own_data(weight: Tensor) -> None:
    weight.data = weight


def _its_own_copy(weight: Tensor) -> None:
    weight.copy_(weight)


def _another_shape(weight: Tensor) -> None:
    with contextlib.suppress(RuntimeError):
        weight.copy_(torch.zeros(3, 3))


@pytest.mark.parametrize("write", [_its_own_data, _its_own_copy, _another_shape])
def test_writes_that_change_nothing_lose_nothing(
    linear: nn.Linear, whole: Tensor, write: Callable[[Tensor], None]
) -> None:
    write(linear.weight)
    assert torch.equal(linear.weight, whole)


@pytest.mark.parametrize("keep_backup", [True, False])
def test_moving_a_model_to_where_it_is_leaves_it_released(keep_backup: bool) -> None:
    layer = nn.Linear(6, 4).requires_grad_(False)
    release(layer.weight, "weight", keep_backup)
    assert layer.to("cpu").to(torch.float32).weight is layer.weight
    assert isinstance(layer.weight, Released)


def test_metadata_is_read_without_bringing_the_weight_back(linear: nn.Linear) -> None:
    weight = linear.weight
    assert weight.shape == (4, 6)
    assert weight.numel() == 24
    weight.requires_grad_(False)
    assert not weight.requires_grad
    weight.grad = None
    assert isinstance(weight, Released)


def test_what_a_tensor_is_needs_no_values(linear: nn.Linear) -> None:
    discard_backup(linear.weight)
    weight = linear.weight
    assert not any([weight.is_conj(), weight.is_neg(), weight.is_complex(), weight.is_nested])
    assert weight.is_floating_point()


def test_its_memory_is_gone(linear: nn.Linear) -> None:
    assert linear.weight.untyped_storage().nbytes() == linear.weight.element_size()


def test_what_gets_past_python_meets_nan(linear: nn.Linear) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        assert bool(linear.weight.isnan().all())


def test_moving_a_module_gives_an_ordinary_parameter(linear: nn.Linear, whole: Tensor) -> None:
    other = torch.float32 if whole.dtype == torch.float64 else torch.float64
    linear.to(other)
    assert type(linear.weight) is nn.Parameter
    assert torch.equal(linear.weight, whole.to(other))


def test_a_checkpoint_of_a_released_module_loads_elsewhere(
    linear: nn.Linear, whole: Tensor
) -> None:
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    other = nn.Linear(6, 4, dtype=linear.weight.dtype)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.weight, whole)


def test_without_a_backup_every_read_is_one_clear_error(linear: nn.Linear) -> None:
    discard_backup(linear.weight)
    assert not readable(linear.weight)
    for read in (linear.state_dict, lambda: copy.deepcopy(linear), lambda: linear.weight.sum()):
        with pytest.raises(Refused, match=r"the values of weight were dropped .* load the model's"):
            read()


def test_without_a_backup_new_weights_can_still_be_assigned(linear: nn.Linear) -> None:
    discard_backup(linear.weight)
    linear.weight.data = torch.ones(4, 6, dtype=linear.weight.dtype)
    assert type(linear.weight) is nn.Parameter
    assert bool((linear.weight == 1).all())


def test_without_a_backup_a_checkpoint_can_still_be_loaded(
    linear: nn.Linear, whole: Tensor
) -> None:
    state = linear.state_dict()
    discard_backup(linear.weight)
    linear.load_state_dict(state)
    assert type(linear.weight) is nn.Parameter
    assert torch.equal(linear.weight, whole)


def test_a_backup_dies_with_its_parameter() -> None:
    layer = nn.Linear(6, 4)
    release(layer.weight, "weight", keep_backup=True)
    reference = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert reference() is None
