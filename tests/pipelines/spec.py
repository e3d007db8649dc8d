"""What a pipeline of diffusers does in a denoising step, and how a tiny one is put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from teacache_fx.errors import DeclineReason


@dataclass(frozen=True)
class Spec:
    """One pipeline class with tiny components.

    Attributes:
        assemble: builds it; the weights are drawn afterwards.
        prompt: the keyword arguments that condition a call; another seed, another prompt.
        settings: the other keyword arguments of a call.
        branches: for each call of the transformer in a step, the name that the pipeline gives to
            `transformer.cache_context(...)`, or `None` where it gives none.
        transformers: names of the components that denoise; each serves its own steps.
        recaptures: how often a branch changes over to a newly captured graph in the middle of a generation, where its
            cache begins anew: prompts of two lengths make dynamo capture once more, with symbolic sizes.
        declined: why TeaCache runs it uncached, if it does.
    """

    assemble: Callable[[], Any]
    prompt: Callable[[int], dict[str, Any]]
    settings: dict[str, Any]
    branches: tuple[str | None, ...]
    transformers: tuple[str, ...] = ("transformer",)
    recaptures: int = 0
    declined: DeclineReason | None = None
