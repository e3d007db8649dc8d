"""Which of the caller's inputs are the latents, the timestep and the conditioning."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from teacache_fx.argument_names import ENOUGH, LATENT_NAMES, says_time
from teacache_fx.dataflow import Dataflow
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.flops import is_matmul
from teacache_fx.graph import argument_name, fake_tensors, fake_value, is_user_input, op_name, same_shape, same_size
from teacache_fx.passes.base import output_arguments

_SINUSOIDS = {"sin", "cos", "sin_", "cos_"}


def find_latents(gm: fx.GraphModule) -> fx.Node:
    """The floating-point input whose shape agrees best with one of the model's tensor outputs.

    Raises:
        Declined: NO_LATENTS if no input has as many dimensions as an output.
    """
    outputs = [tensor for node in output_arguments(gm) if isinstance(node, fx.Node) for tensor in fake_tensors(node)]
    best: tuple[tuple[int, ...], fx.Node] | None = None
    for node in _possible_latents(gm):
        for value in fake_tensors(node):
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


def embedded_latents(gm: fx.GraphModule) -> list[fx.Node]:
    """Inputs of a graph behind a graph break that may hold the embedded latents, the likeliest first.

    Nothing there need be shaped like the output; but their name lives on, and they are tokens.
    """
    tokens = [node for node in _possible_latents(gm) if fake_tensors(node)[0].ndim >= 3]
    return sorted(tokens, key=lambda node: "hidden_states" in argument_name(node) or _name_rank(node), reverse=True)


def _possible_latents(gm: fx.GraphModule) -> list[fx.Node]:
    return [
        node
        for node in gm.graph.nodes
        if is_user_input(node) and not argument_name(node).startswith("encoder_")
        if any(value.is_floating_point() and value.ndim >= 2 for value in fake_tensors(node))
    ]


def _name_rank(node: fx.Node) -> int:
    name = argument_name(node)
    return len(LATENT_NAMES) - LATENT_NAMES.index(name) if name in LATENT_NAMES else 0


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
    if not scores or max(scores.values()) < ENOUGH:
        seen = ", ".join(argument_name(node) for node in flow.nodes if is_user_input(node))
        raise Declined(DeclineReason.NO_TIMESTEP, f"none of the inputs ({seen}) is embedded as a timestep or named one")
    best: fx.Node = max(scores, key=scores.__getitem__)
    return best


def embedded_times(flow: Dataflow, latents: str) -> list[fx.Node]:
    """Inputs of a graph behind a graph break that the timestep may be embedded in."""
    return [
        node
        for node in flow.nodes
        if is_user_input(node) and node.name != latents and any(t.is_floating_point() for t in fake_tensors(node))
    ]


def _is_small(node: fx.Node) -> bool:
    value = fake_value(node)
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.ndim <= 2 or _says_time(node) >= ENOUGH  # per frame or token


def _time_score(node: fx.Node, flow: Dataflow) -> int:
    if "guidance" in argument_name(node):
        return 0
    embedded = 2 if any(op_name(user) in _SINUSOIDS for user in _until_matmul(node, flow)) else 0
    return _says_time(node) + embedded + (fake_tensors(node)[0].ndim <= 1)


def _says_time(node: fx.Node) -> int:
    return says_time(argument_name(node), fake_tensors(node)[0].ndim)


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
        and not _says_time(node)
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
