"""The checks of ``check_kernels`` on a CUDA device, one test each."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.check_kernels import CHECKS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CHECKS)
def test_the_device_passes_every_check_of(name: str) -> None:
    torch.manual_seed(0)
    records = list(CHECKS[name]("cuda"))
    assert records
    assert not [record for record in records if not record["passed"]]
