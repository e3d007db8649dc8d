"""Models of any number of blocks that ask different things of the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu

WIDTH, HEADS, CHANNELS, TOKENS = 32, 2, 4, 8
ROWS = {"modulation": 6, "qkv": 3, "proj": 1, "up": 2, "down": 1}
"""Width of what each weight of a block gives, in multiples of the model's."""

Weights: TypeAlias = nn.ParameterDict | dict[str, Tensor]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The affine change that the timestep makes to normalised tokens."""
    return layer_norm(x, (WIDTH,)) * (1 + scale) + shift


def attend(x: Tensor, weights: Weights) -> Tensor:
    """Self-attention over [batch, tokens, width]."""
    q, k, v = (t.view(*t.shape[:2], HEADS, -1).transpose(1, 2) for t in linear(x, weights["qkv"]).chunk(3, -1))
    return linear(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), weights["proj"])


def run_block(x: Tensor, temb: Tensor, weights: Weights) -> Tensor:
    """adaLN-zero."""
    modulation = linear(silu(temb), weights["modulation"]).unsqueeze(1).chunk(6, -1)
    x = x + modulation[2] * attend(modulate(x, *modulation[:2]), weights)
    hidden = gelu(linear(modulate(x, *modulation[3:5]), weights["up"]))
    return x + modulation[5] * linear(hidden, weights["down"])


def run_block_in_place(x: Tensor, temb: Tensor, weights: Weights) -> Tensor:
    """Rotates by writing the halves of a new tensor, and adds to the one tensor that all blocks share."""
    rotated = torch.empty_like(x)
    rotated[..., 0::2] = -x[..., 1::2]
    rotated[..., 1::2] = x[..., 0::2]
    x += run_block(x + rotated, temb, weights)
    x += x.mean(1, keepdim=True)
    return x


def _weight(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)


class Block(nn.Module):
    """A block that owns its weights."""

    def __init__(self, run: Callable[[Tensor, Tensor, Weights], Tensor]) -> None:
        super().__init__()
        inner = {"down": ROWS["up"]}
        self.weights = nn.ParameterDict(
            {name: _weight(rows * WIDTH, inner.get(name, 1) * WIDTH) for name, rows in ROWS.items()}
        )
        self.run = run

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] and the embedded timestep [batch, width]."""
        return self.run(x, temb, self.weights)


class Listed(nn.Module):
    """Blocks in a `ModuleList`: latents [batch, tokens, channels] in and out."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.x_embedder, self.proj_out = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time_embed = nn.Linear(2, WIDTH)
        self.build(num_blocks)

    def build(self, num_blocks: int, run: Callable[[Tensor, Tensor, Weights], Tensor] = run_block) -> None:
        """Makes the blocks."""
        self.blocks = nn.ModuleList(Block(run) for _ in range(num_blocks))

    def run_blocks(self, x: Tensor, temb: Tensor) -> Tensor:
        """The block stack."""
        for block in self.blocks:
            x = block(x, temb)
        return x

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """One denoising step."""
        temb = self.time_embed(torch.stack([timestep.sin(), timestep.cos()], -1))
        sample: Tensor = self.proj_out(self.run_blocks(self.x_embedder(hidden_states), temb))
        return sample


class Functional(Listed):
    """Blocks without modules, over weights that are stacked: only that the operations repeat tells them."""

    def build(self, num_blocks: int, run: Callable[[Tensor, Tensor, Weights], Tensor] = run_block) -> None:
        """Makes the weights of all blocks."""
        weights = [Block(run).weights for _ in range(num_blocks)]
        self.stacked = nn.ParameterDict({name: torch.stack([w[name].data for w in weights]) for name in ROWS})

    def run_blocks(self, x: Tensor, temb: Tensor) -> Tensor:
        """The block stack."""
        for weights in zip(*(self.stacked[name] for name in ROWS), strict=True):
            x = run_block(x, temb, dict(zip(ROWS, weights, strict=True)))
        return x


class InPlace(Listed):
    """All blocks write to one tensor and to others of their own."""

    def build(self, num_blocks: int, run: Callable[[Tensor, Tensor, Weights], Tensor] = run_block_in_place) -> None:
        """Makes the blocks."""
        super().build(num_blocks, run)


class Collected(Listed):
    """What each block gives is collected and added up behind the last one, as in a U-ViT or under deep supervision."""

    def run_blocks(self, x: Tensor, temb: Tensor) -> Tensor:
        """The block stack."""
        collected = [x]
        for block in self.blocks:
            collected.append(block(collected[-1], temb))
        return sum(collected[2:], collected[1])


class Sliced(Listed):
    """One projection of the timestep for all blocks, of which each takes a slice; and a table that they all fill."""

    def build(self, num_blocks: int, run: Callable[[Tensor, Tensor, Weights], Tensor] = run_block) -> None:
        """Makes the blocks and what they share."""
        super().build(num_blocks, run)
        self.shared = nn.Linear(WIDTH, num_blocks * WIDTH)

    def run_blocks(self, x: Tensor, temb: Tensor) -> Tensor:
        """The block stack."""
        table = torch.zeros(len(x), len(self.blocks), WIDTH)
        for i, (block, part) in enumerate(zip(self.blocks, self.shared(temb).chunk(len(self.blocks), -1), strict=True)):
            x = block(x, part)
            table[:, i] = x.mean(1)
        return x + table.mean(1, keepdim=True)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "modules": Listed,
    "functional": Functional,
    "in place": InPlace,
    "collected": Collected,
    "sliced": Sliced,
}
