"""Settings and fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

GOLDENS = Path(__file__).with_name("goldens")


torch.set_num_threads(1)  # the tests run in parallel; two threads each would wait for one another


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Each test compiles anew, and none runs into the recompilation limit of code that models share."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the golden of that name; `golden("toy.plan", text)`."""

    def check(name: str, text: str) -> None:
        path = GOLDENS / f"{name}.txt"
        if request.config.getoption("--update-goldens"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no golden {path.name}: run pytest --update-goldens and look at what it writes"
        assert text == path.read_text(encoding="utf-8"), (
            f"{path.name} differs; pytest --update-goldens accepts the change"
        )

    return check
