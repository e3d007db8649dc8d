"""Arguments and outputs of every form: names, ways of passing them, structures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from tests.shapes.parts import WIDTH, Attention, Block, Dit, Expected, by_position, images


class ScalarTimeDit(Dit):
    """One timestep without a dimension for the whole batch."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t.expand(len(x)), y)


class FlowTimeDit(Dit):
    """A time between 0 and 1, as flow matching has it."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, 1000 * t, y)


class SigmaDit(Dit):
    """k-diffusion: the noise level, and the preconditioning around the network."""

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        scale = (sigma**2 + 1).rsqrt()[:, None, None, None]
        return x * scale**2 + scale * super().forward(x * scale, 250 * sigma.log(), class_labels)


class NoiseLevelDit(Dit):
    """Names that diffusers does not use."""

    def forward(self, z: Tensor, noise_level: Tensor, c: Tensor) -> Tensor:
        return super().forward(z, noise_level, c)


class SampleDit(Dit):
    """Names of the U-Nets."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return super().forward(sample, timestep, class_labels)


class UnknownNamesDit(Dit):
    """Names that say nothing: the sines and cosines tell the timestep, the shape the latents."""

    def forward(self, label: Tensor, inp: Tensor, level: Tensor) -> Tensor:
        return super().forward(inp, level, label)


class TextBlock(Block):
    """With the text behind the image tokens in the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.text_attn = Attention()

    def forward(self, x: Tensor, c: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.text_attn(torch.cat([x, text], 1))[:, : x.shape[1]]
        return super().forward(x, c)


class TextDit(Dit):
    """`y` is the text, as wide as the tokens; `guidance` is embedded just as the timestep is."""

    def build(self) -> None:
        self.text_blocks = torch.nn.ModuleList(TextBlock() for _ in range(4))

    def forward(self, x: Tensor, guidance: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        c, tokens = self.t_embedder(t) + self.t_embedder(guidance), self.embed(x)
        for block in self.text_blocks:
            tokens = block(tokens, c, y)
        return self.unpatchify(self.final_layer(tokens, c))


class KeywordsOnlyDit(Dit):
    def forward(self, *, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, y)


class AnyKeywordsDit(Dit):
    def forward(self, **arguments: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(arguments["x"], arguments["t"], arguments["y"])


class BatchDit(Dit):
    """Everything in one dict."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"], batch["t"], batch["y"])


class ConditionDictDit(Dit):
    """Conditions in a dict, one level down."""

    def forward(self, x: Tensor, conditions: dict[str, dict[str, Tensor]]) -> Tensor:  # type: ignore[override]
        return super().forward(x, conditions["noise"]["timestep"], conditions["prompt"]["label"])


class ListDit(Dit):
    """A list of pictures in, a list out."""

    def forward(self, x: list[Tensor], t: Tensor, y: Tensor) -> list[Tensor]:  # type: ignore[override]
        return list(super().forward(torch.stack(x), t, y).unbind())


@dataclass
class Prediction:
    sample: Tensor
    note: str = "epsilon"


@dataclass
class DiffusersPrediction(BaseOutput):  # type: ignore[misc]
    sample: Tensor


class NamedPrediction(NamedTuple):
    noise: Tensor
    step: int


class WrappedDit(Dit):
    """Returns its prediction in a structure."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return self.wrap(super().forward(x, t, y))


class FeaturesDit(Dit):
    """Returns the tokens and a score beside the prediction."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.trunk(self.embed(x), c)
        return {"score": tokens.amax((1, 2)), "tokens": tokens, "eps": self.unpatchify(self.final_layer(tokens, c))}


def _renamed(**names: str) -> dict[str, Any]:
    return {new: images()[old] for new, old in names.items()}


def _texts() -> dict[str, Any]:
    text = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    return {"x": images()["x"], "guidance": torch.full((2,), 4.5), "t": torch.full((2,), 700.0), "y": text}


def _returning(wrap: Callable[[Tensor], Any]) -> Expected:
    return Expected(lambda: WrappedDit(wrap))


CASES = {
    "positional": Expected(Dit, call=by_position),
    "0-d timestep": Expected(ScalarTimeDit, lambda: images(t=torch.tensor(700.0))),
    "integer timestep": Expected(Dit, lambda: images(t=torch.tensor([700, 700]))),
    "0-d integer timestep": Expected(ScalarTimeDit, lambda: images(t=torch.tensor(700))),
    "float64 timestep": Expected(Dit, lambda: images(t=torch.full((2,), 700.0, dtype=torch.float64))),
    "flow time": Expected(FlowTimeDit, lambda: images(t=torch.full((2,), 0.7))),
    "sigma": Expected(
        SigmaDit,
        lambda: {**_renamed(x="x", class_labels="y"), "sigma": torch.full((2,), 3.0)},
        timestep_input="l_sigma_",
    ),
    "z, noise_level, c": Expected(
        NoiseLevelDit, lambda: _renamed(z="x", noise_level="t", c="y"), "z", timestep_input="l_noise_level_"
    ),
    "sample, timestep": Expected(
        SampleDit,
        lambda: _renamed(sample="x", timestep="t", class_labels="y"),
        "sample",
        timestep_input="l_timestep_",
    ),
    "unknown names": Expected(
        UnknownNamesDit, lambda: _renamed(label="y", inp="x", level="t"), "inp", timestep_input="l_level_"
    ),
    "text called y": Expected(TextDit, _texts, pattern="no timestep before the first matmul"),
    "keywords only": Expected(KeywordsOnlyDit),
    "any keywords": Expected(AnyKeywordsDit, timestep_input="l_arguments_t_"),
    "one dict": Expected(BatchDit, call=lambda model, inputs: model(inputs), timestep_input="l_batch_t_"),
    "dict of conditions": Expected(
        ConditionDictDit,
        call=lambda model, inputs: model(
            inputs["x"], {"noise": {"timestep": inputs["t"]}, "prompt": {"label": inputs["y"]}}
        ),
        timestep_input="l_conditions_noise_timestep_",
    ),
    "list": Expected(ListDit, call=lambda model, inputs: model(**{**inputs, "x": list(inputs["x"].unbind())})),
    "tuple out": _returning(lambda sample: (sample,)),
    "tuple with None out": _returning(lambda sample: (sample, None)),
    "list out": _returning(lambda sample: [sample]),
    "dict out": _returning(lambda sample: {"prediction": {"eps": sample}}),
    "dataclass out": _returning(Prediction),
    "BaseOutput out": _returning(lambda sample: DiffusersPrediction(sample=sample)),
    "NamedTuple out": _returning(lambda sample: NamedPrediction(sample, 3)),
    "features out": Expected(FeaturesDit),
}
