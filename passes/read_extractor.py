"""Takes the block stack and the modulation from what an extractor has marked."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.graph import same_shape, tensor_of
from teacache_fx.passes.base import PassContext, nodes_by_name
from teacache_fx.passes.input_roles import find_latents, find_timestep
from teacache_fx.passes.pair_live_outputs import LivePair, describe_pairs
from teacache_fx.plan import BlockStack, Modulation

_PAIRS = (("hidden_states", "hidden_states_out"), ("encoder_hidden_states", "encoder_hidden_states_out"))


@dataclass(frozen=True)
class ReadExtractor:
    """Reads the marks that a registered extractor has left in the graph; without any, the matcher's passes follow.

        hidden_states ──mark──> [run_transformer_blocks] ──mark──> hidden_states_out ─> postprocess

    Declines when: what the blocks return has another shape than what entered (NO_MATCHING_INPUT), or no input looks
    like the latents (NO_LATENTS) or like a timestep (NO_TIMESTEP).
    """

    name: str = "read-extractor"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        if not ctx.marked:
            return False
        flow, by_name = ctx.dataflow(gm), nodes_by_name(gm)
        marked = {role: by_name[name] for role, name in ctx.marked.items()}
        pairs = [
            LivePair(marked[out], marked[entered])
            for entered, out in _PAIRS
            if entered in marked and out in marked and marked[out] in flow.live
        ]
        if not pairs:
            raise Declined(DeclineReason.NO_MATCHING_INPUT, "the extractor's blocks return nothing that is used")
        for pair in pairs:
            _check_pair(pair)
        latents = find_latents(gm)
        inside = flow.forward([pair.base for pair in pairs]) & flow.backward([pair.value for pair in pairs])
        region = inside - {pair.base for pair in pairs}
        live_outputs = describe_pairs(pairs, flow, latents)
        ctx.stack = BlockStack((), latents.name, tuple(node.name for node in flow.sort(region)), live_outputs)
        timestep = find_timestep(flow, latents.name, region)
        ctx.modulation = Modulation(marked["modulated_input"].name, "extractor", timestep.name, "the extractor")
        return False


def _check_pair(pair: LivePair) -> None:
    if not same_shape(tensor_of(pair.value), tensor_of(pair.base)):
        shapes = f"{list(tensor_of(pair.base).shape)} entered, {list(tensor_of(pair.value).shape)} came back"
        raise Declined(DeclineReason.NO_MATCHING_INPUT, f"the extractor's blocks change the shape: {shapes}")
