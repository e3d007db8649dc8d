"""Replaces the block stack by a guarded `torch.cond` and adds the state to the graph's inputs and outputs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from teacache_fx.dataflow import view_source
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.fragments import refuse_samples
from teacache_fx.graph import emit, fake_mode_of, fake_value, mark_as_state, same_size, set_fake_value, tensor_of
from teacache_fx.passes.base import PassContext, nodes_by_name, output_arguments
from teacache_fx.passes.branches import Crossing, reuse_residual, run_blocks
from teacache_fx.policy import Policy, PolicyState, relative_l1
from teacache_fx.signature import RECORDED, CacheSignature
from teacache_fx.trajectory import gather_evidence

_NUM_SCALARS = len(PolicyState._fields)
_CLONE = torch.ops.aten.clone.default
_IDLE = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)  # what tracing leaves of `view(dtype)`


@dataclass(frozen=True)
class InsertCond:
    """Inserts the state, the traced policy and the cond; the blocks' nodes stay behind, dead, for `Cleanup`.

        prologue ─> hidden_states ─────────────────────────────┐
                 ─> modulated_input ─> policy ─> should_compute┤
        state    ─> previous_modulated_input ──┘               ├─> cond ─> hidden_states_out ─> epilogue
                 ─> previous_residual ─────────────────────────┘      └──> residual ─> new state

    The form is functional: state tensors are inputs, the new state is output, nothing is mutated. Both branches return
    fresh contiguous tensors, so that none aliases an operand or another output.

    Requires: the whole plan.
    Declines when: samples are to decide for themselves, and a tensor of the state does not begin with the batch, or
    the graph begins behind a graph break (NO_SAMPLE_DIMENSION).
    """

    name: str = "insert-cond"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        assert ctx.policy is not None
        if ctx.is_fragment and ctx.policy.per_sample:
            refuse_samples()
        plan, policy, nodes, graph = ctx.plan, ctx.policy, nodes_by_name(gm), gm.graph
        output = graph.output_node()
        for name in plan.partition.epilogue:
            output.prepend(nodes[name])
        values = [nodes[live.value] for live in plan.stack.live_outputs]
        bases = [nodes[live.base] for live in plan.stack.live_outputs]
        indicator, latents = nodes[plan.modulation.modulated_input], nodes[plan.stack.latents]
        steady, times = ([nodes[n] for n in names] for names in (plan.partition.steady, plan.partition.further_times))
        inputs = _PolicyInputs(indicator, nodes[plan.modulation.timestep], latents, steady, times)
        behind = dict.fromkeys((*(nodes[name] for name in plan.partition.epilogue), output))
        with fake_mode_of(graph), torch.autocast(tensor_of(indicator).device.type, enabled=False):
            ctx.signature = _signature(gm, policy, [indicator, *values, latents])
            state = _add_state_inputs(graph, ctx.signature)
            with graph.inserting_before(next(iter(behind))):
                decision = _insert_policy(graph, policy, inputs, state, ctx.is_portable)
                operands = [nodes[name] for name in plan.partition.operands]
                sources = [_as_operand(graph, node) for node in operands]
                residuals = state[1 : 1 + len(values)]
                crossing = Crossing(operands, sources, residuals, values, bases, decision.needy_samples)
                blocks = [nodes[name] for name in plan.partition.blocks]
                branches = (run_blocks(gm, crossing, blocks), reuse_residual(gm, crossing))
                results = _insert_cond(gm, decision.should_compute, branches, crossing.cond_operands)
                kept = [_as_state(graph, node) for node in (indicator, latents)]
        for value, result in zip(values, results[: len(values)], strict=True):
            value.replace_all_uses_with(result, delete_user_cb=behind.__contains__)
        new_state = [kept[0], *results[len(values) :], kept[1], *decision.scalars]
        output.args = ((*output_arguments(gm), *new_state, *decision.recorded),)
        return True


def _signature(gm: fx.GraphModule, policy: Policy, nodes: Sequence[fx.Node]) -> CacheSignature:
    num_inputs = sum(node.op == "placeholder" for node in gm.graph.nodes)
    tensors = [torch.empty_like(tensor_of(node), memory_format=torch.contiguous_format) for node in nodes]
    shape = (_batch_size(nodes),) if policy.per_sample else ()
    scalars = PolicyState.initial(device=tensors[0].device, shape=shape)
    return CacheSignature(num_inputs, len(output_arguments(gm)), tuple(tensors), scalars)


def _batch_size(nodes: Sequence[fx.Node]) -> int:
    latents = nodes[-1]
    batch = tensor_of(latents).shape[0]
    for node in nodes:
        shape = tensor_of(node).shape
        if not shape or not same_size(shape[0], batch):
            detail = f"granularity='sample' needs the {batch} samples first, but `{node.name}` is {list(shape)}"
            raise Declined(DeclineReason.NO_SAMPLE_DIMENSION, detail, node.name)
    return batch


def _add_state_inputs(graph: fx.Graph, signature: CacheSignature) -> list[fx.Node]:
    names = (*signature.tensor_names, *signature.scalar_names)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    taken, last, state = {str(node.target) for node in inputs}, inputs[-1], []
    for name, value in zip(names, (*signature.tensors, *signature.scalars), strict=True):
        with graph.inserting_after(last):
            last = graph.placeholder(f"teacache_{name}" if name in taken else name)
        mark_as_state(last)
        set_fake_value(last, value)
        state.append(last)
    return state


@dataclass(frozen=True)
class _PolicyInputs:
    """Nodes of the model that the decision looks at."""

    indicator: fx.Node
    timestep: fx.Node
    latents: fx.Node
    steady: list[fx.Node]
    further_times: list[fx.Node]


@dataclass(frozen=True)
class _Decision:
    """Nodes of a traced decision: the predicate, the scalars for the next step, and what is recorded of it.

    `needy_samples` of shape [batch] tells which samples need the blocks, `None` where the whole batch decides.
    """

    should_compute: fx.Node
    needy_samples: fx.Node | None
    scalars: list[fx.Node]
    recorded: list[fx.Node]


def _insert_policy(
    graph: fx.Graph, policy: Policy, inputs: _PolicyInputs, state: list[fx.Node], is_portable: bool
) -> _Decision:
    """Traces the policy on the arguments' fake values and inlines what it did."""

    def decide(
        indicator: Tensor,
        timestep: Tensor,
        latents: Tensor,
        steady: list[Tensor],
        times: list[Tensor],
        state: list[Tensor],
    ) -> list[Tensor]:
        rel_l1 = relative_l1(indicator, state[0], policy.per_sample)
        previous_latents = state[-_NUM_SCALARS - 1]
        evidence = gather_evidence(timestep, latents, previous_latents, steady, times, policy.per_sample, is_portable)
        decision = policy.decide(rel_l1, evidence, PolicyState(*state[-_NUM_SCALARS:]))
        recorded = [getattr(decision, name) for name in RECORDED]
        needy = decision.should_compute
        return [needy.any() if policy.per_sample else needy, needy, *decision.state[:-1], *recorded]

    arguments = (inputs.indicator, inputs.timestep, inputs.latents, inputs.steady, inputs.further_times, state)
    traced = make_fx(decide)(*fx.node.map_arg(arguments, fake_value))
    copies: dict[fx.Node, fx.Node] = {}
    leaves = iter(torch.utils._pytree.tree_leaves(arguments))
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(leaves)
        elif node.target in _IDLE:
            copies[node] = copies[node.args[0]]
        elif node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
            set_fake_value(copies[node], fake_value(node))
    should_compute, needy, *rest = (copies[node] for node in output_arguments(traced))
    return _Decision(
        should_compute, needy if policy.per_sample else None, rest[: -len(RECORDED)], rest[-len(RECORDED) :]
    )


def _as_operand(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Inductor compiles the branches for contiguous intermediate operands, whatever their strides.

    A transposed patch embedding is not contiguous, and neither is what decompositions make of its norm; so the call is
    there even where it looks idle now, for AOTAutograd to drop or keep by the strides that it sees.
    """
    if node.op == "placeholder" or not isinstance(fake_value(node), Tensor):
        return node
    return emit(graph, torch.ops.aten.contiguous.default, node)


def _as_state(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What is kept until the next step must own its memory and be laid out as the state input is."""
    if view_source(node) is None and node.op != "placeholder" and tensor_of(node).is_contiguous():
        return node
    return emit(graph, _CLONE, node, memory_format=torch.contiguous_format)


def _insert_cond(
    gm: fx.GraphModule, should_compute: fx.Node, branches: Sequence[fx.GraphModule], operands: list[fx.Node]
) -> list[fx.Node]:
    graph = gm.graph
    attributes = []
    for name, branch in zip(("run_blocks", "reuse_residual"), branches, strict=True):
        gm.add_submodule(name, branch)
        attributes.append(graph.get_attr(name))
    cond = graph.call_function(torch.ops.higher_order.cond, (should_compute, *attributes, tuple(operands)))
    values = tuple(fake_value(node) for node in output_arguments(branches[0]))
    set_fake_value(cond, values)
    return [emit(graph, operator.getitem, cond, index) for index in range(len(values))]
