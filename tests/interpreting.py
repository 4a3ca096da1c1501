"""Run functions where Triton interprets its kernels on the CPU: in a process of their own.

Triton decides when it is imported whether it compiles or interprets, so one process has one mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import pytest
import torch

Interpreter = Callable[..., Any]


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    """Yields ``run(function, *arguments)``, where new tensors are poisoned before use."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_poison) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result(120)  # starts the process, which keeps its environment
        yield lambda function, *arguments: pool.submit(function, *arguments).result(120)


def _poison() -> None:
    """Uninitialised memory holds NaN, and 255 where it is bytes."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(2).isnan().all()
