"""Settings and fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


torch.set_num_threads(1)  # the tests run in parallel; two threads each would wait for one another


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Each test compiles anew, and none runs into the recompilation limit of code that models share."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
