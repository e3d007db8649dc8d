"""Prepares a graph that begins behind a graph break. See Note [Graph breaks] in `teacache_fx.whole_call`."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import fx

from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.graph import (
    copy_graph_module,
    fake_mode_of,
    fake_tensors,
    is_user_input,
    mark_as_state,
    set_fake_value,
)

CALL_INPUTS = ("timestep_of_call", "conditioning_of_call", "further_times_of_call")


def with_call_inputs(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with three more inputs at the end, all of shape [].

    They are the mean timestep, float32, and the hashes of conditioning and further timesteps, int64.
    """
    gm = copy_graph_module(gm)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    devices = [tensor.device for node in placeholders if is_user_input(node) for tensor in fake_tensors(node)]
    last = placeholders[-1]
    for name, dtype in zip(CALL_INPUTS, (torch.float32, torch.int64, torch.int64), strict=True):
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(name)
        mark_as_state(last)
        with fake_mode_of(gm.graph):
            set_fake_value(last, torch.zeros((), dtype=dtype, device=devices[0] if devices else None))
    gm.recompile()
    return gm


def refuse_samples() -> NoReturn:
    """Says why samples cannot decide for themselves in such a graph.

    Raises:
        Declined: NO_SAMPLE_DIMENSION. What is known of the call as a whole, its timestep and its conditioning, is of
            all samples together; and nothing says that the embedded latents still have the batch in front.
    """
    detail = "granularity='sample' needs the capture whole: behind a graph break no dimension is known to be the batch"
    raise Declined(DeclineReason.NO_SAMPLE_DIMENSION, detail)
