"""Finds the timestep and `modulated_input`, the tensor on which denoising steps are compared."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import fx

from teacache_fx.dataflow import view_source
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.flops import is_matmul
from teacache_fx.fragments import CALL_INPUTS
from teacache_fx.graph import fake_tensors, fake_value, is_join, same_shape, tensor_of
from teacache_fx.module_paths import module_path
from teacache_fx.passes.base import PassContext, nodes_by_name
from teacache_fx.passes.input_roles import all_latents, embedded_times, find_timestep
from teacache_fx.passes.modulation_patterns import name_pattern
from teacache_fx.plan import BlockList, Modulation


@dataclass(frozen=True)
class MatchModulation:
    """Finds the last pointwise value in the first block that depends on the latents and feeds the first matmul.

        hidden_states ─> norm ─> * (1 + scale) ─> + shift ─┬─> to_q
        timestep ─> sin, cos ─> temb ─> linear ─┴───┘      └── modulated_input

    The timestep is the small input that goes through sines and cosines (dataflow), or is called one (names); a guidance
    scale is embedded in the same way and is told apart by its name.

    Requires: the block stack.
    Declines when: no input is a timestep (NO_TIMESTEP), or no matmul of the stack takes the latents
    (NO_MODULATED_INPUT).
    """

    name: str = "match-modulation"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        if ctx.modulation is not None:
            return False
        assert ctx.stack is not None
        flow = ctx.dataflow(gm)
        by_name = nodes_by_name(gm)
        dependent = flow.carried(all_latents(flow, by_name[ctx.stack.latents], ctx.is_fragment))
        region = [by_name[name] for name in ctx.stack.region]
        timestep = by_name[CALL_INPUTS[0]] if ctx.is_fragment else find_timestep(flow, ctx.stack.latents, set(region))
        bases = [by_name[live.base] for live in ctx.stack.live_outputs]
        matmul, indicator = _find_indicator(region, dependent, bases)
        block = _block_path(matmul, ctx.stack.lists)
        timed = flow.carried(embedded_times(flow, ctx.stack.latents) if ctx.is_fragment else [timestep])
        pattern = name_pattern(indicator, timed, dependent, block)
        ctx.modulation = Modulation(indicator.name, pattern, timestep.name, block)
        return False


def _block_path(node: fx.Node, lists: tuple[BlockList, ...]) -> str:
    """Module path of the block that the node belongs to; empty where no module tells."""
    path = module_path(node)
    for part in lists:
        found = re.match(rf"{re.escape(part.path)}[._]?\d*(?=\.|$)", path) if part.path else None
        if found:
            return found.group(0)
    return ""


def _find_indicator(region: list[fx.Node], dependent: set[fx.Node], bases: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    for matmul in region:
        tokens = [argument for argument in matmul.all_input_nodes if argument in dependent] if is_matmul(matmul) else []
        if tokens:
            indicator = _pointwise_source(tokens[0], dependent, bases)
            if fake_tensors(indicator) and fake_tensors(indicator)[0].is_floating_point():
                return matmul, indicator
    raise Declined(DeclineReason.NO_MODULATED_INPUT, "no matmul of the block stack takes the latents' tokens")


def _pointwise_source(node: fx.Node, dependent: set[fx.Node], bases: list[fx.Node]) -> fx.Node:
    """Looks through views, and through joins of text and image tokens to those that have a residual."""
    while True:
        source = view_source(node)
        if source is None and is_join(node):
            joined = [argument for argument in node.all_input_nodes if argument in dependent]
            alike = [a for a in joined if any(same_shape(tensor_of(a), tensor_of(base)) for base in bases)] or joined
            source = alike[0] if len(alike) == 1 else None  # several: the join itself is compared
        if source is None or source.op == "placeholder" or not isinstance(fake_value(source), torch.Tensor):
            return node
        node = source
