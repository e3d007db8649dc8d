"""What the models of this folder share: a small DiT to vary, its pieces, and what is expected of each variant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, DEPTH, CHANNELS, TOKENS = 32, 2, 4, 4, 16


def images(channels: int = CHANNELS, **more: Any) -> dict[str, Any]:
    """Arguments of one step: latents `x` [batch, channels, height, width], timestep `t`, class labels `y`."""
    return {
        "x": torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1)),
        "t": torch.full((2,), 700.0),
        "y": torch.tensor([1, 3]),
        **more,
    }


def by_keywords(model: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    return model(**inputs)


def by_position(model: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    return model(*inputs.values())


@dataclass(frozen=True)
class Expected:
    """What someone who knows the model would say of it.

    Attributes:
        make: builds the model.
        inputs: arguments of one step by name.
        latents: name of the latents among them.
        blocks: how many blocks a skipped step leaves out.
        pattern: how the timestep enters what the steps are compared on.
        live: shapes of what leaves the blocks and is used later.
        share: upper bound of the FLOPs that a skipped step pays.
        timestep_input: name of the graph's input that is the timestep.
        call: passes the inputs of one step to the model.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]] = images
    latents: str = "x"
    blocks: int = DEPTH
    pattern: str = "adaLN-zero (scale + shift)"
    live: tuple[tuple[int, ...], ...] = ((2, TOKENS, WIDTH),)
    share: float = 0.1
    timestep_input: str = "l_t_"
    call: Callable[[Callable[..., Any], dict[str, Any]], Any] = by_keywords


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head attention over [batch, tokens, width], softmax and all by hand."""
    heads = [torch.unflatten(tensor, -1, (HEADS, -1)).transpose(1, 2) for tensor in (query, key, value)]
    weights = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) * (WIDTH // HEADS) ** -0.5, dim=-1)
    return (weights @ heads[2]).transpose(1, 2).flatten(2)


def sinusoids(t: Tensor, width: int = WIDTH) -> Tensor:
    """Sines and cosines of [...], as [..., width]."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[..., None].float() * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The affine change that a timestep makes to normalised tokens."""
    return x * (1 + scale) + shift


def mlp(width: int = WIDTH, ratio: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


class Attention(nn.Module):
    """Self-attention from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        out: Tensor = self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """adaLN-zero, with the projection of the timestep inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.mlp = Attention(), mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        c = c if c.ndim == 3 else c.unsqueeze(1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate * self.attn(modulate(self.norm1(x), shift, scale))
        more: Tensor = gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x + more


class PlainBlock(nn.Module):
    """A ViT block: it takes one tensor and knows no timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        more: Tensor = self.mlp(self.norm2(x))
        return x + more


class TimestepEmbedder(nn.Module):
    """Sines and cosines, then a small MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, t: Tensor) -> Tensor:
        embedding: Tensor = self.mlp(sinusoids(t))
        return embedding


class FinalLayer(nn.Module):
    """A modulated norm and the projection to patches."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.linear = nn.Linear(WIDTH, 4 * out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c if c.ndim == 3 else c.unsqueeze(1)).chunk(2, dim=-1)
        patches: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return patches


class Dit(nn.Module):
    """The DiT that the variants vary: image latents, patches of 2 x 2, class labels."""

    def __init__(self, in_channels: int = CHANNELS, out_channels: int = CHANNELS) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(in_channels, WIDTH, kernel_size=2, stride=2)
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, TOKENS, WIDTH))
        self.t_embedder, self.y_embedder = TimestepEmbedder(), nn.Embedding(10, WIDTH)
        self.final_layer = FinalLayer(out_channels)
        self.build()

    def build(self) -> None:
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x

    def embed(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        return tokens

    def unpatchify(self, x: Tensor) -> Tensor:
        x = torch.unflatten(torch.unflatten(x, 1, (4, 4)), -1, (2, 2, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        return self.unpatchify(self.final_layer(self.trunk(self.embed(x), c), c))
