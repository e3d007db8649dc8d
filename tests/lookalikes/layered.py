"""Networks without attention: layers and convolutions one behind the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from teacache_fx import DeclineReason
from tests.lookalikes.case import Lookalike
from tests.shapes.parts import TOKENS, WIDTH, TimestepEmbedder


def tokens(**more: Any) -> dict[str, Any]:
    """Arguments of a model that takes ready-made tokens."""
    generator = torch.Generator().manual_seed(1)
    return {"hidden_states": torch.randn(2, TOKENS, WIDTH, generator=generator), **more}


def timed_tokens() -> dict[str, Any]:
    return tokens(timestep=torch.full((2,), 700.0))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, as in a ResNet-18."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return torch.as_tensor((out + self.downsample(x)).relu())


class ResNet(nn.Module):
    """Four stages of two blocks each, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(BasicBlock(before, width, stride), BasicBlock(width, width, 1))
            for before, width, stride in ((8, 8, 1), (8, 16, 2), (16, 32, 2), (32, 64, 2))
        )
        self.fc = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x).relu())))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(self.features(x).mean((2, 3))))


class ResNetFeatures(ResNet):
    """The backbone of a detector: a map out, of as many dimensions as the picture."""

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class NoiseClassifier(ResNet):
    """Told the noise level, as a guiding classifier is; its output is a map of features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        tokens = self.conv1(x).relu() + self.embed(timestep[:, None] / 1000)[:, :, None, None]
        return torch.as_tensor(self.layer4(self.layer3(self.layer2(self.layer1(tokens)))))


class DeepMlp(nn.Module):
    """Equal layers one behind the other, in a list or a sequence; a denoiser of vectors if it is given a timestep."""

    def __init__(self, container: type[nn.ModuleList | nn.Sequential]) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(8)]
        self.layers = nn.Sequential(*layers) if container is nn.Sequential else nn.ModuleList(layers)
        self.t_embedder = TimestepEmbedder()

    def forward(self, hidden_states: Tensor, timestep: Tensor | None = None) -> Tensor:
        if timestep is not None:
            hidden_states = hidden_states + self.t_embedder(timestep).unsqueeze(1)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class FunctionalMlp(nn.Module):
    """Equal layers without modules: one kind of matrix product, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, WIDTH, WIDTH) * WIDTH**-0.5)
        self.t_embedder = TimestepEmbedder()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden_states = hidden_states + self.t_embedder(timestep).unsqueeze(1)
        for weight in self.weight:
            hidden_states = (hidden_states @ weight).relu()
        return hidden_states


class WideningMlp(FunctionalMlp):
    """Wide and narrow layers in turn, and nothing that goes around them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, WIDTH, 4 * WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(4, 4 * WIDTH, WIDTH) * WIDTH**-0.5)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden_states = hidden_states + self.t_embedder(timestep).unsqueeze(1)
        for up, down in zip(self.up, self.down, strict=True):
            hidden_states = ((hidden_states @ up).relu() @ down).relu()
        return hidden_states


class Recurrent(nn.Module):
    """One cell, called token by token; what it is handed on is not what the next token starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.t_embedder = TimestepEmbedder()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        state, states = self.t_embedder(timestep).repeat(1, 2), []
        for token in hidden_states.unbind(1):
            state = torch.tanh(self.enter(token) + self.again(state))
            states.append(state[:, :WIDTH])
        return torch.stack(states, dim=1)


def _picture(**more: Any) -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), **more}


R = DeclineReason
CASES = {
    "resnet": Lookalike(ResNet, _picture, R.NO_LATENTS),
    "resnet features": Lookalike(ResNetFeatures, _picture, R.CHANGING_SHAPES),
    "resnet with a timestep": Lookalike(
        NoiseClassifier, lambda: _picture(timestep=torch.full((2,), 700.0)), R.CHANGING_SHAPES
    ),
    "mlp in a sequence": Lookalike(lambda: DeepMlp(nn.Sequential), tokens, R.NO_REPEATED_BLOCKS),
    "mlp in a list": Lookalike(lambda: DeepMlp(nn.ModuleList), tokens, R.NO_REPEATED_BLOCKS),
    "mlp with a timestep": Lookalike(lambda: DeepMlp(nn.Sequential), timed_tokens, R.NO_REPEATED_BLOCKS),
    "mlp of functions": Lookalike(FunctionalMlp, timed_tokens, R.NO_REPEATED_BLOCKS),
    "mlp of wide and narrow layers": Lookalike(WideningMlp, timed_tokens, R.NO_REPEATED_BLOCKS),
    "recurrent": Lookalike(Recurrent, timed_tokens, R.NO_MATCHING_INPUT),
}
