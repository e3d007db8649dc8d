"""Traits of real transformers that once stood in the way of the matcher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests import toys


class IdleModesDiT(toys.ToyDiT):
    """Switches autocast off where it is off, and to float32 where all is float32, around its time embedding."""

    def embed_time(self, timestep: Tensor) -> Tensor:
        with torch.autocast(timestep.device.type, enabled=False), torch.no_grad():
            angles = timestep[:, None].float() * torch.arange(1, 1 + toys.WIDTH // 2, device=timestep.device)
        with torch.autocast(timestep.device.type, dtype=torch.float32):
            angles = angles * 1e-3
        embedding: Tensor = self.time_embed(torch.cat([angles.sin(), angles.cos()], -1))
        return embedding


class FoldedFramesDiT(toys.ToyDiT):
    """Leaves its blocks with frames and tokens permuted, and puts them back by reshapes that copy."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        batch, tokens, width = hidden_states.shape
        for number, block in enumerate(self.blocks):
            if number:
                hidden_states = hidden_states.view(batch, 2, tokens // 2, width).transpose(1, 2).flatten(1, 2)
            hidden_states = block(hidden_states, text, temb)
        return hidden_states.view(batch, tokens // 2, 2, width).transpose(1, 2).reshape(batch, tokens, width)


class RefinedDiT(toys.ToyDiT):
    """Refines the image tokens in a list of their own, and joins the text only before the main one."""

    def __init__(self) -> None:
        super().__init__(num_blocks=4)
        self.refiner = nn.ModuleList(toys.Block() for _ in range(2))

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        for block in self.refiner:
            hidden_states = block(hidden_states, text, temb)
        joint = torch.cat([hidden_states, text], dim=1)
        for block in self.blocks:
            joint = block(joint, text, temb)
        return torch.tanh(joint)[:, : hidden_states.shape[1]]


class FrameTimestepDiT(toys.ToyDiT):
    """Takes a timestep for each frame, [batch, 1, frames]."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states, timestep.mean((1, 2)), encoder_hidden_states)
