"""Small diffusion transformers of our own, one trait each, for the passes and the declines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, CHANNELS, TEXT_WIDTH = 32, 2, 4, 12


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head attention over [batch, tokens, width]."""
    heads = [tensor.view(*tensor.shape[:2], HEADS, -1).transpose(1, 2) for tensor in (query, key, value)]
    scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(WIDTH / HEADS)
    return (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """adaLN-zero block with self-attention, cross-attention over the text, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.text_key = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        """hidden_states [batch, tokens, width], text [batch, words, width], temb [batch, width]."""
        modulation = self.modulation(nn.functional.silu(temb)).unsqueeze(1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        modulated = self.norm1(hidden_states) * (1 + scale) + shift
        query, key, value = self.to_qkv(modulated).chunk(3, dim=-1)
        keys = self.text_key(text)
        mixed = attention(query, torch.cat([key, keys], 1), torch.cat([value, keys], 1))
        hidden_states = hidden_states + gate * self.to_out(mixed)
        more = self.mlp(self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp)
        result: Tensor = hidden_states + gate_mlp * more
        return result


class ToyDiT(nn.Module):
    """Latents [batch, tokens, channels] in and out."""

    def __init__(self, num_blocks: int = 2) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(CHANNELS, WIDTH)
        self.context_embedder = nn.Linear(TEXT_WIDTH, WIDTH)
        self.time_embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(self.make_block() for _ in range(num_blocks))
        self.norm_out = nn.LayerNorm(WIDTH)
        self.proj_out = nn.Linear(WIDTH, CHANNELS)

    def make_block(self) -> nn.Module:
        """One element of the list of blocks."""
        return Block()

    def embed_time(self, timestep: Tensor) -> Tensor:
        """Sinusoidal embedding of [batch], projected to [batch, width]."""
        half = WIDTH // 2
        frequencies = torch.exp(-math.log(1e4) / half * torch.arange(half, device=timestep.device))
        angles = timestep[:, None].float() * frequencies
        embedding: Tensor = self.time_embed(
            torch.cat([angles.sin(), angles.cos()], -1).to(self.time_embed.weight.dtype)
        )
        return embedding

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        """The block stack."""
        for block in self.blocks:
            hidden_states = block(hidden_states, text, temb)
        return hidden_states

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The noise prediction, shaped like `hidden_states`."""
        temb = self.embed_time(timestep)
        text = self.context_embedder(encoder_hidden_states)
        tokens = self.run_blocks(self.x_embedder(hidden_states), text, temb)
        sample: Tensor = self.proj_out(self.norm_out(tokens))
        return sample


class SlicedJointDiT(ToyDiT):
    """Carries [text; image] tokens through the blocks and slices the image tokens behind them."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        tokens = super().run_blocks(torch.cat([text, hidden_states], 1), text, temb)
        return tokens[:, text.shape[1] :]


class RotaryInPlaceBlock(Block):
    """Writes the halves of a rotated tensor in place, as the Wan family does."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        rotated = torch.empty_like(hidden_states)
        rotated[..., 0::2] = -hidden_states[..., 1::2]
        rotated[..., 1::2] = hidden_states[..., 0::2]
        return super().forward(hidden_states + 0.1 * rotated, text, temb)


class RotaryInPlaceDiT(ToyDiT):
    """In-place writes inside the blocks to memory that is born there."""

    def make_block(self) -> nn.Module:
        return RotaryInPlaceBlock()


class NoTimestepDiT(ToyDiT):
    """Not a diffusion model: nothing tells how far denoising has come."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, hidden_states.new_ones(len(hidden_states)), encoder_hidden_states)


class PooledDiT(ToyDiT):
    """Returns one score per sample: a critic, not a denoiser."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep, encoder_hidden_states).mean((1, 2))


class NarrowingDiT(ToyDiT):
    """The last block leaves with half the width that the first was entered with."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[-1].register_module("narrow", nn.Linear(WIDTH, WIDTH // 2))
        self.norm_out = nn.LayerNorm(WIDTH // 2)
        self.proj_out = nn.Linear(WIDTH // 2, CHANNELS)

    def make_block(self) -> nn.Module:
        return NarrowingBlock()


class NarrowingBlock(Block):
    """Narrows its output where it has been given a layer for it."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        tokens = super().forward(hidden_states, text, temb)
        narrow = getattr(self, "narrow", None)
        return narrow(tokens) if narrow is not None else tokens


class OverwritingBlock(Block):
    """Leaves its output in its input's memory, which the prologue owns."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        return hidden_states.copy_(super().forward(hidden_states, text, temb))


class OverwritingDiT(ToyDiT):
    """In-place writes inside the blocks to memory from outside, which also holds their output."""

    def make_block(self) -> nn.Module:
        return OverwritingBlock()


class AutocastInsideDiT(ToyDiT):
    """Enters a context manager inside its forward."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().run_blocks(hidden_states, text, temb)


class ValueDependentDiT(ToyDiT):
    """Drops tokens by their values, so that their number is known only after running."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        kept = (hidden_states.mean((0, 2)) > -1e9).nonzero().squeeze(-1)
        return super().run_blocks(hidden_states[:, kept], text, temb)


class ParallelHeads(ToyDiT):
    """Equal heads side by side look like a list of blocks and are none."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        return torch.stack([block(hidden_states, text, temb) for block in self.blocks]).mean(0)


class Parameterless(nn.Module):
    """Has nothing to learn."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return hidden_states * timestep[:, None, None] + encoder_hidden_states.mean()


def make(kind: Callable[..., nn.Module] = ToyDiT, **options: Any) -> nn.Module:
    """A model with seeded weights, in eval mode, without gradients."""
    torch.manual_seed(0)
    return kind(**options).eval().requires_grad_(False)


def inputs(batch: int = 2, tokens: int = 8, words: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of one call."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, tokens, CHANNELS, generator=generator),
        "timestep": torch.full((batch,), 900.0),
        "encoder_hidden_states": torch.randn(batch, words, TEXT_WIDTH, generator=generator),
    }


class EpilogueInPlaceDiT(ToyDiT):
    """Writes to the stack's output behind the stack."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        tokens = super().run_blocks(hidden_states, text, temb)
        tokens += temb.unsqueeze(1)
        return tokens


class WipesEmbeddingDiT(ToyDiT):
    """Overwrites, behind the stack, the memory that the stack was entered with."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        tokens = super().run_blocks(hidden_states, text, temb)
        return tokens + hidden_states.mul_(0.1)


class MutatesLatentsDiT(ToyDiT):
    """Scales the caller's latents in place."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.mul_(0.5), timestep, encoder_hidden_states)


class TwoStreamBlock(Block):
    """Carries image and text tokens."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        tokens = super().forward(hidden_states, text, temb)
        return tokens, text + tokens.mean(1, keepdim=True)


class TwoStreamDiT(ToyDiT):
    """Two live outputs: the text tokens are used behind the stack too. Words may be as many as tokens."""

    def make_block(self) -> nn.Module:
        return TwoStreamBlock()

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states, text = block(hidden_states, text, temb)
        return hidden_states + text.mean(1, keepdim=True)


class TransposedDiT(ToyDiT):
    """Enters its blocks with a transposed view, as patch embeddings by convolution do."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        channels_first = hidden_states.transpose(1, 2).contiguous()
        return super().run_blocks(channels_first.transpose(1, 2), text, temb)


class LearnedQueryDiT(ToyDiT):
    """Reads its output from a learned token that travels beside those of the latents."""

    def __init__(self, num_blocks: int = 2, position: int = -1) -> None:
        super().__init__(num_blocks)
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = position

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        joined = torch.cat([hidden_states, self.query.expand(len(hidden_states), -1, -1)], 1) + 1
        tokens = super().run_blocks(joined, text, temb)
        return tokens[:, self.position].unsqueeze(1).expand_as(hidden_states)


class AddingBlock(Block):
    """Adds to its input in place and gives back that input."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        hidden_states.add_(super().forward(hidden_states, text, temb))
        return hidden_states


class AddingDiT(ToyDiT):
    """No value leaves its blocks, only memory that they have written to."""

    def make_block(self) -> nn.Module:
        return AddingBlock()


class AccumulatingBlock(Block):
    """Written as many people write theirs: `x += attn(x); x += mlp(x)`."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        hidden_states += super().forward(hidden_states, text, temb)
        hidden_states += hidden_states.mean(1, keepdim=True)
        return hidden_states


class AccumulatingDiT(ToyDiT):
    """All blocks write to the one tensor that the prologue has made."""

    def make_block(self) -> nn.Module:
        return AccumulatingBlock()


class EarlyOverwritingBlock(Block):
    """Writes to its input before the first norm, so that the indicator needs a write inside the stack."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        hidden_states += temb.unsqueeze(1)
        return super().forward(hidden_states, text, temb)


class EarlyOverwritingDiT(ToyDiT):
    """In-place writes that the prologue keeps."""

    def make_block(self) -> nn.Module:
        return EarlyOverwritingBlock()


class LateWriteBlock(Block):
    """Writes to its input once more when nobody reads it any longer."""

    def forward(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        result = super().forward(hidden_states, text, temb)
        hidden_states.zero_()
        return result


class LateWriteDiT(ToyDiT):
    """A dead write to the memory that the stack was entered with."""

    def make_block(self) -> nn.Module:
        return LateWriteBlock()


class GuidedDiT(ToyDiT):
    """Takes a python float into its blocks, which dynamo makes dynamic at its second value."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, strength: float
    ) -> Tensor:
        self.strength = strength
        return super().forward(hidden_states, timestep, encoder_hidden_states)

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = hidden_states + self.strength * block(hidden_states, text, temb)
        return hidden_states


class HeavyHeadDiT(ToyDiT):
    """Most of its work lies behind its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 64 * WIDTH)

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        tokens = super().run_blocks(hidden_states, text, temb)
        wide: Tensor = self.head(tokens)
        return wide.view(*tokens.shape, 64).mean(-1)
