"""The checks of ``check_kernels`` and ``check_vector`` on a CUDA device, one test each."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import check_kernels, check_vector

pytestmark = pytest.mark.gpu
CHECKS = check_kernels.CHECKS | {f"vector {name}": one for name, one in check_vector.CHECKS.items()}


@pytest.mark.parametrize("name", CHECKS)
def test_the_device_passes_every_check_of(name: str) -> None:
    torch.manual_seed(0)
    records = list(CHECKS[name]("cuda"))
    assert records
    assert not [record for record in records if not record["passed"]]
