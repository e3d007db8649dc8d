"""Shows what a graph-diff check says when somebody edits a block: python -m examples.catch_a_change

The edit is one line in the feed-forward layer of diffusers' PixArt: its output is clamped, as is done to keep float16
from overflowing. The weights, the shapes and the outputs of the tests stay the same; each step runs one more operation.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import FeedForward
from torch import Tensor

from teacache_fx.graph_diff import compare
from teacache_fx.snapshot import take_snapshot


def make() -> tuple[PixArtTransformer2DModel, dict[str, Any]]:
    """A small model and the arguments of one step."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        cross_attention_dim=16, caption_channels=None, norm_num_groups=1,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([500.0]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model.eval().requires_grad_(False), inputs


class ClampedFeedForward(FeedForward):  # type: ignore[misc]
    """The edit."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, tokens, width], as before."""
        result: Tensor = super().forward(hidden_states)
        return result.clamp(-65504, 65504)


def difference() -> str:
    """What is said of the edited model."""
    model, inputs = make()
    golden = take_snapshot(model, (), inputs).text
    for block in model.transformer_blocks:
        block.ff.__class__ = ClampedFeedForward
    return str(compare(golden, take_snapshot(model, (), inputs).text))


if __name__ == "__main__":
    print(difference())
