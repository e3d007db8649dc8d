"""What a model with TeaCache has to do, step by step, and steps that tell one threshold from another."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from teacache_fx.call_layout import leaves_by_name
from teacache_fx.config import TeaCacheConfig
from teacache_fx.export import rewrite

State = dict[str, Tensor]

_JUMP = None  # in place of a target: latents so far away that they belong to another generation
_FAR = 1e4  # in thresholds; so much is a decision moved, and the accumulated distance can still be read to 0.1%
_SCALES = tuple(0.85 * 4.0**-i for i in range(8))  # moves of the latents; at 0.9 a new trajectory begins
_HALVINGS = 8  # from a factor of 4 between two of them to one of 1.005


@dataclass(frozen=True)
class ReferenceStep:
    """One step as it should be.

    Attributes:
        values: the leaves of the arguments, by name.
        decision: "computed", "skipped", or "mixed" where samples decide for themselves and differ.
        outputs: the leaves of the output for each decision: of the model itself for "computed".
        accumulated: the distance that was compared, in thresholds; `None` where a trajectory began.
        state: afterwards.
    """

    values: dict[str, Any]
    decision: str
    outputs: dict[str, list[Tensor]]
    accumulated: float | None
    state: State


class Reference:
    """The unmodified model, and the same with TeaCache, run eagerly.

    Attributes:
        values: the leaves of the arguments, by name.
        latents, timestep: which of them hold these.

    Args:
        model: the transformer.
        args: positional arguments of one step.
        kwargs: its keyword arguments.
        config: the settings.

    Raises:
        Declined: the model cannot be exported or rewritten.
        ValueError: the latents are no numbers to begin with.
    """

    def __init__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: TeaCacheConfig
    ) -> None:
        self._model, self._config = model, config
        self._rewritten = rewrite(model, args, kwargs, config=config, state="io")
        arguments = _by_name(inspect.signature(model.forward), args, kwargs)
        self.values = leaves_by_name(arguments)
        self._spec = pytree.tree_structure(arguments)
        captured = self._rewritten._captured[0]
        inputs = [node.name for node in captured.gm.graph.nodes if node.op == "placeholder"][len(captured.weights) :]
        names = list(self.values)
        self.latents = names[inputs.index(captured.plan.stack.latents)]
        self.timestep = names[inputs.index(captured.plan.modulation.timestep)]
        if not bool(self.values[self.latents].isfinite().all() & self.values[self.latents].any()):
            raise ValueError(f"{self.latents} must hold finite numbers that are not all 0: noise, for instance")

    def initial_state(self) -> State:
        """The state before the first step."""
        return self._rewritten.initial_state()

    def steps(self, num_steps: int, margin: float) -> Iterator[ReferenceStep]:
        """A sequence of steps that both branches occur in, and that comes close to the threshold from both sides.

        Args:
            num_steps: how many; more where warm-up steps come in between.
            margin: how close, in thresholds.
        """
        below, above = 1 - margin, 1 + margin
        script = (_JUMP, below, above, 0.4, _JUMP, above, 0.5, below)
        state, values = self.initial_state(), self.values
        for index in range(num_steps):
            target = script[index % len(script)]
            for _ in range(1 + self._config.num_warmup_steps + bool(self._config.max_consecutive_skips)):
                if target is not _JUMP:
                    values = self._approach(values, state, target, seed=index)
                elif index:
                    values = {**values, self.latents: -values[self.latents], self.timestep: self._earlier(values)}
                step = self._step(values, state)
                state = step.state
                yield step
                if target is _JUMP or target > 1 or step.decision == "skipped":
                    break

    def _earlier(self, values: Mapping[str, Any]) -> Tensor:
        timestep: Tensor = values[self.timestep]
        return (timestep * 0.9).to(timestep.dtype)

    def _step(self, values: dict[str, Any], state: State) -> ReferenceStep:
        cached, following = self._cached(values, state)
        near = {name: following[name] for name in ("conditioning", "further_times")}
        near["previous_latents"] = values[self.latents]
        reused, forced = self._cached(values, {**self._that_skips(state), **near})
        is_skipped = following["consecutive_skips"] > 0
        decision = "skipped" if bool(is_skipped.all()) else "mixed" if bool(is_skipped.any()) else "computed"
        outputs = {"computed": tensors_of(self._model(**self._arguments(values)))}
        if not all(bool(tensor.isfinite().all()) for tensor in outputs["computed"]):
            raise ValueError("the model gives numbers that are not finite for these arguments: nothing can be compared")
        if bool((forced["consecutive_skips"] != 0).all()):  # before the first step there is nothing to reuse
            outputs["skipped"] = reused
        if decision != "computed":
            outputs[decision] = cached
        is_first = bool((following["step_index"] == 1).all())
        accumulated = None if is_first else float(self._distance(forced).max())
        return ReferenceStep(values, decision, outputs, accumulated, following)

    def _approach(self, values: Mapping[str, Any], state: State, target: float, seed: int) -> dict[str, Any]:
        """Moves the latents so that the accumulated distance comes as near to the target as it can on its side."""
        generator = torch.Generator().manual_seed(seed)
        latents: Tensor = values[self.latents]
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        each = tuple(range(1 if latents.ndim > 1 else 0, latents.ndim))  # sample: the farthest one is what counts
        noise *= latents.float().abs().mean(each, keepdim=True) / noise.abs().mean(each, keepdim=True)

        def moved(scale: float) -> dict[str, Any]:
            return {**values, self.latents: (latents.float() + scale * noise).to(latents.dtype)}

        def distance(scale: float) -> float:
            _, following = self._cached(moved(scale), self._that_skips(state))
            if bool((following["consecutive_skips"] == 0).any()):
                return float("nan")  # the latents have jumped
            found = self._distance(following)
            return float(found.max() if target < 1 else found.min())

        return moved(_nearest_scale(distance, target))

    def _that_skips(self, state: State) -> State:
        """The state, changed so that a step skips unless the latents jump: no limit is near, no warm-up, no end."""
        forged = {name: tensor.clone() for name, tensor in state.items()}
        forged["accumulated_rel_l1_distance"] -= _FAR * self._config.rel_l1_thresh
        forged["step_index"].fill_(2**40)
        forged["consecutive_skips"].fill_(-(2**40))
        forged["num_inference_steps"].zero_()
        forged["timestep_direction"].zero_()
        return forged

    def _distance(self, forged: State) -> Tensor:
        """What would have been compared with the threshold, in thresholds, from the state after a step that skipped."""
        thresh = self._config.rel_l1_thresh
        return forged["accumulated_rel_l1_distance"].double() / thresh + _FAR

    def _cached(self, values: Mapping[str, Any], state: State) -> tuple[list[Tensor], State]:
        given = {name: tensor.clone() for name, tensor in state.items()}
        output, following = self._rewritten(**self._arguments(values), teacache_state=given)
        return tensors_of(output), following

    def _arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        copies = [value.clone() if isinstance(value, Tensor) else value for value in values.values()]
        arguments: dict[str, Any] = pytree.tree_unflatten(copies, self._spec)
        return arguments


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in an output of any structure, copied, since a program may reuse their memory."""
    return [leaf.clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _nearest_scale(distance: Callable[[float], float], target: float) -> float:
    """The move whose distance is nearest to the target, on the same side of the threshold.

    Args:
        distance: as a function of the move, not always a monotone one; NaN where it is too far.
        target: a distance.
    """
    found = {scale: distance(scale) for scale in _SCALES}
    numbers = {scale: number for scale, number in found.items() if not math.isnan(number)}
    sign = 1 if target < 1 else -1
    fitting = {scale: number for scale, number in numbers.items() if sign * number <= sign * target}
    if not fitting:  # as near as it gets
        return min(numbers or found, key=lambda scale: sign * found[scale])
    best = max(fitting, key=lambda scale: sign * fitting[scale])
    beyond = [scale for scale in _SCALES if scale not in fitting and sign * scale > sign * best]
    if not beyond:
        return best
    too_far = min(beyond, key=lambda scale: abs(math.log(scale / best)))
    for _ in range(_HALVINGS):
        middle = math.sqrt(best * too_far)
        if sign * distance(middle) <= sign * target:  # false for NaN
            best = middle
        else:
            too_far = middle
    return best


def _by_name(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        is_open = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        arguments.update(value if is_open else {name: value})
    return arguments
