"""The inputs that a rewritten module has beside the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STATE, RESET, CONTEXT = "teacache_state", "teacache_reset", "teacache_context"
OWN = (STATE, RESET, CONTEXT)


def check_own(own: Mapping[str, Any], num_contexts: int) -> None:
    """Checks what a call of the form "buffers" says of contexts and resets.

    Args:
        own: those of `OWN` that were given.
        num_contexts: how many the buffers have room for.

    Raises:
        TypeError: one of them is no tensor as it must be, is missing, or means nothing here.
        ValueError: there is no such context.
    """
    if (CONTEXT in own) is not (num_contexts > 1):
        wanted = f"says which of the {num_contexts} contexts" if num_contexts > 1 else "needs num_contexts > 1"
        raise TypeError(f"{CONTEXT}, an int64 tensor of shape [], {wanted}")
    for name, dtype in ((CONTEXT, torch.int64), (RESET, torch.bool)):
        given = own.get(name)
        if name in own and not (isinstance(given, Tensor) and given.dtype == dtype and given.ndim == 0):
            kind = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name} must be a tensor of shape [] and {dtype}, got {kind}")
    if CONTEXT in own and not torch.compiler.is_compiling() and not 0 <= int(own[CONTEXT]) < num_contexts:
        raise ValueError(f"{CONTEXT} must be from 0 to {num_contexts - 1}, got {int(own[CONTEXT])}")
