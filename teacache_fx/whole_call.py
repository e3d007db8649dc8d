"""What a model was called with, for graphs that hold only a part of its forward.

Note [Graph breaks]: some models break the graph before their blocks. The graph of the blocks then takes the timestep's
embedding and the embedded prompt, made anew at each call; neither a new generation nor another prompt can be told from
these. The hook sees the whole call: it hands the timestep and hashes of the conditioning and of further timesteps to
such a graph as more inputs, and the identity of the conditioning to the store.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from teacache_fx.argument_names import LATENT_NAMES, says_time
from teacache_fx.capture import GraphBreak
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.trajectory import content_hash, joint_hash


@dataclass(frozen=True)
class WholeCall:
    """One call of a model.

    Attributes:
        timestep: any real dtype and shape.
        steady: all tensors but latents and timesteps, any dtypes and shapes; they stay the same in a generation.
        further_times: timesteps beside the first, likewise.
    """

    timestep: Tensor
    steady: tuple[Tensor, ...]
    further_times: tuple[Tensor, ...] = ()

    @property
    def conditioning(self) -> tuple[Tensor, ...]:
        """Of `steady` the embeddings, whose identity tells one prompt from another; without any, all of it."""
        return tuple(t for t in self.steady if t.is_floating_point() and t.ndim > 1) or self.steady

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """What `CALL_INPUTS` of `teacache_fx.fragments` are, on the device."""
        time = self.timestep.to(device, torch.float32).mean()
        return time, _hash_all(self.steady, device), _hash_all(self.further_times, device)


def _hash_all(tensors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    return joint_hash(map(content_hash, tensors), torch.zeros((), dtype=torch.int64, device=device))


class CallReader:
    """Tells latents, timestep and conditioning among the arguments of a model's calls.

    Args:
        forward: the model's.
        args: of one call.
        kwargs: likewise.
        output: what that call returned.
    """

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._signature = inspect.signature(forward)
        arguments = self._tensors(args, kwargs)
        self._times = {name for name, tensors in arguments.items() if tensors and says_time(name, tensors[0].ndim)}
        self._timestep = max(self._times, key=lambda name: says_time(name, arguments[name][0].ndim), default="")
        results, others = _leaves(output), arguments.keys() - self._times
        self._latents = max(sorted(others), key=lambda name: _likeness(name, arguments[name], results), default="")

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WholeCall | None:
        """The call, or `None` if it has no timestep."""
        arguments = self._tensors(args, kwargs)
        if not arguments.get(self._timestep):
            return None
        timestep, *more = arguments[self._timestep]
        others = [(name, tensors) for name, tensors in arguments.items() if name not in (self._latents, self._timestep)]
        steady = [tensor for name, tensors in others if name not in self._times for tensor in tensors]
        further = [tensor for name, tensors in others if name in self._times for tensor in tensors]
        return WholeCall(timestep, tuple(steady), (*more, *further))

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Tensor]]:
        arguments: dict[str, Any] = dict(self._signature.bind(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        return {name: _leaves(value) for name, value in arguments.items()}


def _leaves(value: Any) -> list[Tensor]:
    value = dict(value) if hasattr(value, "keys") else value  # a ModelOutput of diffusers
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _likeness(name: str, tensors: list[Tensor], results: list[Tensor]) -> tuple[int, ...]:
    """How much an argument looks like what is denoised: by shape, then by name."""
    if name.startswith("encoder_"):
        return (-1,)
    rank = len(LATENT_NAMES) - LATENT_NAMES.index(name) if name in LATENT_NAMES else 0
    pairs = [(tensor, result) for tensor in tensors for result in results if tensor.is_floating_point()]
    same = any(tensor.shape == result.shape for tensor, result in pairs)
    return int(same), rank, int(any(tensor.ndim == result.ndim for tensor, result in pairs))


@dataclass
class Capture:
    """What a call through the hook has led to so far.

    Attributes:
        model: the one called.
        call: what it was called with, `None` if no argument is a timestep.
        is_rewritten: a graph captured in this call was rewritten.
        refusals: of graphs that hold only a part of the forward, each with the graph break that ended it.
    """

    model: nn.Module
    call: WholeCall | None
    is_rewritten: bool = False
    refusals: list[tuple[Declined, GraphBreak | None]] = field(default_factory=list)

    @property
    def verdict(self) -> Declined | None:
        """Why nothing was rewritten, as far as graphs were captured in this call.

        Samples that cannot decide for themselves where the blocks are; else the first graph break, if any.
        """
        if self.is_rewritten or not self.refusals:
            return None
        for refusal, _ in self.refusals:
            if refusal.reason is DeclineReason.NO_SAMPLE_DIMENSION:
                return refusal
        return next((refusal for refusal, cause in self.refusals if cause is not None), self.refusals[0][0])


_current: ContextVar[Capture | None] = ContextVar("teacache_fx_capture", default=None)


def current_capture() -> Capture | None:
    """The call that is being made through a hook, if any."""
    return _current.get()


def current_call() -> WholeCall | None:
    """What that call is made with, or `None` if nobody sees it whole."""
    capture = _current.get()
    return None if capture is None else capture.call


@contextlib.contextmanager
def seen_whole(model: nn.Module, call: WholeCall | None) -> Iterator[Capture]:
    """Makes the call known to the graphs that it runs and to the backend that compiles them."""
    capture = Capture(model, call)
    token = _current.set(capture)
    try:
        yield capture
    finally:
        _current.reset(token)
