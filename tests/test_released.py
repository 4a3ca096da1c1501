"""A released parameter behaves as the weight it was, or says clearly that it can't."""

from __future__ import annotations

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
    layer = nn.Linear(6, 4, dtype=request.param)
    release(layer.weight, "weight", keep_backup=True)
    return layer


@pytest.fixture
def whole(linear: nn.Linear) -> Tensor:
    return linear.weight.detach().clone()


READS: dict[str, Callable[[nn.Linear], Tensor]] = {
    "detach": lambda layer: layer.weight.detach(),
    "clone": lambda layer: layer.weight.clone(),
    "state_dict": lambda layer: layer.state_dict()["weight"],
    "transpose": lambda layer: layer.weight.T.T,
    "index": lambda layer: layer.weight[:],
    "rows": lambda layer: torch.stack(list(layer.weight)),
    "to": lambda layer: layer.weight.to(torch.float64).to(layer.weight.dtype),
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


@pytest.mark.parametrize("write", [_in_place, _assign_rows, _merge, _replace, _load])
def test_writes_bring_the_weight_back_and_change_its_key(
    linear: nn.Linear, whole: Tensor, write: Callable[[nn.Linear], None]
) -> None:
    identity, key = linear.weight, staleness_key(linear.weight)
    write(linear)
    assert linear.weight is identity
    assert type(linear.weight) is nn.Parameter
    assert torch.equal(linear.weight, whole + 1)
    assert staleness_key(linear.weight) != key


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
    linear.to(torch.float64)
    assert type(linear.weight) is nn.Parameter
    assert torch.equal(linear.weight, whole.double())


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
