"""Forces a model with TeaCache through both branches, and measures what must hold of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teacache_fx import TeaCacheBackend

ALWAYS_SKIP = 1e9  # a threshold that nothing reaches: the first step is computed, the next ones reuse its residual


@dataclass(frozen=True)
class BothBranches:
    """Three steps: one computed, the same one again by reuse, and one by reuse with other latents.

    Attributes:
        skipped: which of the three were skipped; must be (False, True, True).
        computed_error: of the computed step against the model, relative to the largest value of the output.
        reuse_error: of the repeated step against the computed one, likewise.
        change: how far the other latents moved the third step from the second, likewise; 0 would be stale.
    """

    skipped: tuple[bool, ...]
    computed_error: float
    reuse_error: float
    change: float


def measure(
    model: Callable[..., Any],
    cached: Callable[..., Any],
    backend: TeaCacheBackend,
    inputs: dict[str, Any],
    moved: dict[str, Any],
) -> BothBranches:
    """Runs the three steps.

    Args:
        model: the unmodified model.
        cached: the same with TeaCache, at the threshold `ALWAYS_SKIP`.
        backend: keeps the statistics of `cached`, which has not been called before.
        inputs: keyword arguments of one step.
        moved: the same with slightly different latents.
    """
    branches = compare(model, cached, inputs, moved)
    skipped = [step.skipped for context in backend.stats().contexts for step in context.steps]
    return dataclasses.replace(branches, skipped=tuple(skipped))


def compare(
    model: Callable[..., Any], cached: Callable[..., Any], inputs: dict[str, Any], moved: dict[str, Any]
) -> BothBranches:
    """The same of whatever holds the cache; what was skipped is for the caller to know."""
    with torch.no_grad():
        expected = tensors(model(**inputs))
        computed, repeated, other = (tensors(cached(**step)) for step in (inputs, inputs, moved))
    errors = _distance(computed, expected), _distance(repeated, computed)
    return BothBranches((), *errors, _distance(other, repeated))


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output of any structure, copied, since a compiled model may reuse memory."""
    leaves = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "items") else output)
    leaves = [getattr(leaf, "sample", leaf) for leaf in leaves]
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _distance(left: list[Tensor], right: list[Tensor]) -> float:
    assert [tensor.shape for tensor in left] == [tensor.shape for tensor in right]
    assert all(bool(tensor.isfinite().all()) for tensor in (*left, *right)), "a comparison with NaN says nothing"
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(left, right, strict=True))
