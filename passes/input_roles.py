"""Which of the caller's inputs are the latents, the timestep and the conditioning."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from teacache_fx.dataflow import Dataflow
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.flops import is_matmul
from teacache_fx.graph import argument_name, fake_tensors, fake_value, is_user_input, op_name, same_shape, same_size
from teacache_fx.passes.base import output_arguments

_LATENT_NAMES = ("hidden_states", "latents", "sample", "x")
_SINUSOIDS = {"sin", "cos", "sin_", "cos_"}
_ENOUGH = 3
_TIME_WORDS = {"timestep": 4, "timesteps": 4, "t": 3, "time": 3, "sigma": 3, "sigmas": 3, "noise_level": 3}


def time_word_score(node: fx.Node) -> int:
    """How much the name of an input says that it is a timestep, from 0 to 4."""
    name = argument_name(node)
    return _TIME_WORDS.get(name, _TIME_WORDS["timestep"] - 1 if "timestep" in name else 0)


def find_latents(gm: fx.GraphModule) -> fx.Node:
    """The floating-point input whose shape agrees best with the model's first tensor output.

    Raises:
        Declined: NO_LATENTS if no input has as many dimensions as an output.
    """
    outputs = [tensor for node in output_arguments(gm) if isinstance(node, fx.Node) for tensor in fake_tensors(node)]
    best: tuple[tuple[int, ...], fx.Node] | None = None
    for node in gm.graph.nodes:
        if not is_user_input(node) or argument_name(node).startswith("encoder_"):
            continue
        for value in fake_tensors(node):
            if not value.is_floating_point() or value.ndim < 2:
                continue
            for output in outputs:
                if value.ndim != output.ndim:
                    continue
                equal = sum(map(same_size, value.shape, output.shape))
                score = (int(equal == value.ndim), equal, _name_rank(node))
                if best is None or score > best[0]:
                    best = (score, node)
    if best is None:
        shapes = ", ".join(str(list(output.shape)) for output in outputs) or "none"
        raise Declined(
            DeclineReason.NO_LATENTS, f"no floating-point input has as many dimensions as an output (outputs: {shapes})"
        )
    return best[1]


def _name_rank(node: fx.Node) -> int:
    name = argument_name(node)
    return len(_LATENT_NAMES) - _LATENT_NAMES.index(name) if name in _LATENT_NAMES else 0


def find_timestep(flow: Dataflow, latents: str) -> fx.Node:
    """The input that tells how far denoising has come.

    Raises:
        Declined: NO_TIMESTEP.
    """
    scores = {
        node: _time_score(node, flow)
        for node in flow.nodes
        if node.name != latents and is_user_input(node) and node in flow.live and _is_small(node)
    }
    if not scores or max(scores.values()) < _ENOUGH:
        seen = ", ".join(argument_name(node) for node in flow.nodes if is_user_input(node))
        raise Declined(DeclineReason.NO_TIMESTEP, f"none of the inputs ({seen}) is embedded as a timestep or named one")
    best: fx.Node = max(scores, key=scores.__getitem__)
    return best


def _is_small(node: fx.Node) -> bool:
    value = fake_value(node)
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.ndim <= 2 or (value.ndim == 3 and time_word_score(node) >= _ENOUGH)  # per frame or token


def _time_score(node: fx.Node, flow: Dataflow) -> int:
    if "guidance" in argument_name(node):
        return 0
    embedded = 2 if any(op_name(user) in _SINUSOIDS for user in _until_matmul(node, flow)) else 0
    return time_word_score(node) + embedded + (fake_tensors(node)[0].ndim <= 1)


def _until_matmul(node: fx.Node, flow: Dataflow) -> Iterator[fx.Node]:
    """What depends on the node, as far as the first matrix products."""
    todo, seen = [node], set[fx.Node]()
    while todo:
        current = todo.pop()
        if current in seen or is_matmul(current):
            continue
        seen.add(current)
        yield current
        todo += flow.successors[current]


def steady_inputs(flow: Dataflow, latents: fx.Node, timestep: fx.Node) -> list[fx.Node]:
    """Inputs that stay the same throughout a generation: text embeddings, masks, positions, a guidance scale.

    Left out is what changes with every step: the latents (of a second modality too: inputs of the shape of a further
    output) and timesteps. The residuals of a ControlNet change too, and yet stay in: nothing else would tell one
    control image from another, so with them every step is computed.
    """
    changing = {latents, timestep, *_further_latents(flow, latents)}
    return [
        node
        for node in flow.nodes
        if is_user_input(node)
        and node not in changing
        and isinstance(fake_value(node), torch.Tensor)
        and not time_word_score(node)
    ]


def conditioning_inputs(steady: list[fx.Node]) -> list[fx.Node]:
    """Inputs of which the identity tells prompts apart: text embeddings and the like; without any, all steady ones."""
    return [node for node in steady if _is_embedding(fake_tensors(node)[0])] or steady


def _is_embedding(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 1


def _further_latents(flow: Dataflow, latents: fx.Node) -> list[fx.Node]:
    """One input for each output beyond the one that the latents are denoised to."""
    output = next(node for node in reversed(flow.nodes) if node.op == "output")
    results = [tensor for node in output.all_input_nodes for tensor in fake_tensors(node)]
    _claim(results, fake_tensors(latents)[0])
    return [
        node
        for node in flow.nodes
        if is_user_input(node) and node is not latents and isinstance(fake_value(node), torch.Tensor)
        if _is_embedding(fake_tensors(node)[0]) and _claim(results, fake_tensors(node)[0])
    ]


def _claim(results: list[torch.Tensor], value: torch.Tensor) -> bool:
    for position, result in enumerate(results):
        if same_shape(result, value):
            del results[position]
            return True
    return False
