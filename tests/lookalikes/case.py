"""What is expected of a model that must not be cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from teacache_fx import DeclineReason


@dataclass(frozen=True)
class Lookalike:
    """One model.

    Attributes:
        make: builds the model.
        inputs: arguments of one call by name.
        reason: why it is declined.
        method: name of what is compiled and called, if not the model itself.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    reason: DeclineReason
    method: str = "forward"
