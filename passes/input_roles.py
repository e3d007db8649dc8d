"""Which of the caller's inputs are the latents, the timestep and the conditioning."""

from __future__ import annotations

import torch
from torch import fx

from teacache_fx.argument_names import ENOUGH, LATENT_NAMES, says_time, time_rank
from teacache_fx.dataflow import Dataflow, takes_only_form
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.flops import is_matmul
from teacache_fx.graph import argument_name, fake_tensors, fake_value, is_user_input, op_name, same_shape, same_size
from teacache_fx.passes.base import output_arguments

_SINUSOIDS = {"sin", "cos", "sin_", "cos_"}
_FROM_NUMBERS = {"tensor", "scalar_tensor", "as_tensor", "full", "full_like", "new_full", "mul", "truediv", "add"}


def find_latents(gm: fx.GraphModule) -> fx.Node:
    """The floating-point input whose shape agrees best with one of the model's tensor outputs.

    Raises:
        Declined: NO_LATENTS if no input has as many dimensions as an output.
    """
    outputs = _output_tensors(gm)
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
    """Inputs of a graph behind a graph break that may hold the latents, embedded or not, the likeliest first.

    Those that are shaped like an output are the latents as they were given. What they are embedded in need not be
    shaped so; but their name lives on, and they are tokens.
    """
    outputs = _output_tensors(gm)

    def likeliness(node: fx.Node) -> tuple[bool, int]:
        is_given = any(same_shape(value, output) for value in fake_tensors(node) for output in outputs)
        return is_given, "hidden_states" in argument_name(node) or _name_rank(node)

    tokens = [node for node in _possible_latents(gm) if fake_tensors(node)[0].ndim >= 3]
    return sorted(tokens, key=likeliness, reverse=True)


def _output_tensors(gm: fx.GraphModule) -> list[torch.Tensor]:
    return [tensor for node in output_arguments(gm) if isinstance(node, fx.Node) for tensor in fake_tensors(node)]


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


def find_timestep(flow: Dataflow, latents: str, region: set[fx.Node]) -> fx.Node:
    """The tensor that tells how far denoising has come: an input, or the first that is made from a python number.

    Args:
        flow: of the graph.
        latents: name of the latents.
        region: of the blocks, which it must reach; a temperature of the output is no timestep.

    Raises:
        Declined: NO_TIMESTEP.
    """
    carried = flow.carried(node for node in flow.nodes if node.name == latents)
    scores = {
        node: _time_score(node, flow, carried)
        for node in flow.nodes
        if node.name != latents and is_user_input(node) and node in flow.live and _is_small(node)
    }
    likely = [node for node in scores if scores[node] >= ENOUGH and not region.isdisjoint(flow.forward([node]))]
    if not likely:
        seen = ", ".join(argument_name(node) for node in flow.nodes if is_user_input(node))
        raise Declined(DeclineReason.NO_TIMESTEP, f"none of the inputs ({seen}) is embedded as a timestep or named one")
    best = max(likely, key=lambda node: (scores[node], time_rank(argument_name(node))))
    return best if isinstance(fake_value(best), torch.Tensor) else _as_tensor(best, flow)


def _as_tensor(number: fx.Node, flow: Dataflow) -> fx.Node:
    """The first tensor made from a python number, if its mean rises and falls with the number, or its negative does."""
    derived = (node for node in flow.sort(flow.forward([number])) if isinstance(fake_value(node), torch.Tensor))
    first = next(derived, None)
    if first is None or op_name(first) not in _FROM_NUMBERS:
        detail = f"no tensor is made from the python number {argument_name(number)} that would tell steps apart"
        raise Declined(DeclineReason.NO_TIMESTEP, detail, number.name)
    return first


def embedded_times(flow: Dataflow, latents: str) -> list[fx.Node]:
    """Inputs of a graph behind a graph break that the timestep may be embedded in."""
    return [
        node
        for node in flow.nodes
        if is_user_input(node) and node.name != latents and any(t.is_floating_point() for t in fake_tensors(node))
    ]


def _is_small(node: fx.Node) -> bool:
    value = fake_value(node)
    if isinstance(value, torch.SymInt):
        return _says_time(node) >= ENOUGH  # others are sizes
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.ndim <= 2 or _says_time(node) >= ENOUGH  # per frame or token


def _time_score(node: fx.Node, flow: Dataflow, carried: set[fx.Node]) -> int:
    if "guidance" in argument_name(node):
        return 0
    embedded = 2 if _is_embedded(node, flow, carried) else 0
    return _says_time(node) + embedded + (_num_dimensions(node) <= 1)


def _says_time(node: fx.Node) -> int:
    return says_time(argument_name(node), _num_dimensions(node))


def _num_dimensions(node: fx.Node) -> int:
    """Of the first tensor; a python number has none."""
    return next((tensor.ndim for tensor in fake_tensors(node)), 0)


def _is_embedded(node: fx.Node, flow: Dataflow, carried: set[fx.Node]) -> bool:
    """Whether its sines or cosines enter a matrix product by themselves.

    Those of positions do not: they turn queries and keys, or are added to the tokens.
    """
    todo, seen = [(node, False)], set[tuple[fx.Node, bool]]()
    while todo:
        current, is_wave = todo.pop()
        for user in flow.successors[current]:
            if user in carried or takes_only_form(user, current):
                continue
            if is_matmul(user):
                if is_wave:
                    return True
                continue
            step = user, is_wave or op_name(user) in _SINUSOIDS
            if step not in seen:
                seen.add(step)
                todo.append(step)
    return False


def steady_inputs(flow: Dataflow, latents: fx.Node, timestep: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Inputs that stay the same throughout a generation, and further timesteps, which may change at each step.

    The former are text embeddings, masks, positions, a guidance scale.

    Left out is what changes with every step: the latents (of a second modality too: inputs of the shape of a further
    output) and timesteps. The residuals of a ControlNet change too, and yet stay in: nothing else would tell one
    control image from another, so with them every step is computed.
    """
    changing, carried = {timestep, *all_latents(flow, latents, False)}, flow.carried([latents])
    inputs = [node for node in flow.nodes if is_user_input(node) and isinstance(fake_value(node), torch.Tensor)]
    others = [node for node in inputs if node not in changing]
    times = [node for node in others if _is_further_time(node, flow, carried)]
    return [node for node in others if node not in times], times


def _is_further_time(node: fx.Node, flow: Dataflow, carried: set[fx.Node]) -> bool:
    is_number = _num_dimensions(node) <= 1 and "guidance" not in argument_name(node)
    return bool(_says_time(node)) or (is_number and _is_embedded(node, flow, carried))


def conditioning_inputs(steady: list[fx.Node]) -> list[fx.Node]:
    """Inputs of which the identity tells prompts apart: text embeddings and the like; without any, all steady ones."""
    return [node for node in steady if _is_embedding(fake_tensors(node)[0])] or steady


def _is_embedding(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 1


def all_latents(flow: Dataflow, latents: fx.Node, is_fragment: bool) -> list[fx.Node]:
    """The latents and those of a second modality."""
    return [latents, *([] if is_fragment else _further_latents(flow, latents))]


def _further_latents(flow: Dataflow, latents: fx.Node) -> list[fx.Node]:
    """One input for each output beyond the one that the latents are denoised to.

    Latents with an image to begin with have more channels than what they are denoised to. But then so might a prompt,
    so they must be called latents.
    """
    output = next(node for node in reversed(flow.nodes) if node.op == "output")
    results = [tensor for node in output.all_input_nodes for tensor in fake_tensors(node)]
    inputs = [node for node in flow.nodes if is_user_input(node) and isinstance(fake_value(node), torch.Tensor)]
    inputs = [node for node in inputs if node is not latents and _is_embedding(fake_tensors(node)[0])]
    if not _claim(results, latents, 0):
        _claim(results, latents, 1)
    further = [node for node in inputs if _claim(results, node, 0)]
    named = [node for node in inputs if node not in further and _is_named_latents(node)]
    return further + [node for node in named if _claim(results, node, 1)]


def _is_named_latents(node: fx.Node) -> bool:
    name = argument_name(node)
    is_like = name.endswith(("hidden_states", "latents")) and not name.startswith("encoder_")
    return is_like or name in LATENT_NAMES


def _claim(results: list[torch.Tensor], node: fx.Node, most_unequal: int) -> bool:
    """Takes the first result out that is shaped like the node but for so many sizes, if there is one."""
    shape = fake_tensors(node)[0].shape
    for position, result in enumerate(results):
        if result.ndim == len(shape) and sum(map(same_size, result.shape, shape)) + most_unequal >= result.ndim:
            del results[position]
            return True
    return False
