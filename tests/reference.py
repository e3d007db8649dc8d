"""TeaCache once more, written from the algorithm with module hooks. It shares no code with the package.

The model always runs in full. On a step that TeaCache would skip, a hook replaces what the last block returns by
(what entered the first block) + (what the blocks added on the last computed step), so that everything behind the
blocks sees exactly what a skipped step must give it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Tap:
    """Where a family's forward is listened to.

    Attributes:
        first: module path of the first block, which takes `hidden_states` first or by that keyword.
        last: module path of the last block.
        query: path, inside the first block, of the linear layer that takes the modulated input.
        output: position of `hidden_states` in the last block's output, `None` where it returns the tensor itself.
        joined: the query takes [text; image] tokens, of which the image tokens are the indicator.
    """

    first: str
    last: str
    query: str = "attn.to_q"
    output: int | None = None
    joined: bool = False


TAPS = {
    "flux": Tap("transformer_blocks.0", "single_transformer_blocks.1", output=1),
    "sd3": Tap("transformer_blocks.0", "transformer_blocks.1", output=1),
    "qwenimage": Tap("transformer_blocks.0", "transformer_blocks.1", output=1),
    "wan": Tap("blocks.0", "blocks.1", query="attn1.to_q"),
    "dit": Tap("transformer_blocks.0", "transformer_blocks.1", query="attn1.to_q"),
    "pixart": Tap("transformer_blocks.0", "transformer_blocks.1", query="attn1.to_q"),
    "ltx": Tap("transformer_blocks.0", "transformer_blocks.1", query="attn1.to_q"),
    "hunyuan_video": Tap("transformer_blocks.0", "single_transformer_blocks.1", output=0),
    "cogvideox": Tap("transformer_blocks.0", "transformer_blocks.1", query="attn1.to_q", output=0, joined=True),
}


@dataclass
class ReferenceTeaCache:
    """Eager TeaCache around one model and one context; call it in place of the model.

    Attributes:
        model: in eval mode.
        tap: where to listen.
        thresh: threshold of the accumulated distance; infinite to compute only the first step.
        coefficients: highest power first.
        computed: per step, whether the blocks' result was used.
        rel_l1: per step, the relative distance; NaN on the first.
        margins: per step, how far the accumulated distance was from the threshold.
    """

    model: nn.Module
    tap: Tap
    thresh: float
    coefficients: Sequence[float] = (1.0, 0.0)
    computed: list[bool] = field(default_factory=list)
    rel_l1: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    _previous: Tensor | None = None
    _residual: Tensor | None = None
    _entered: Tensor | None = None
    _accumulated: float = 0.0

    def __call__(self, **inputs: Any) -> Any:
        """Runs one step and returns the model's output."""
        first, last = self.model.get_submodule(self.tap.first), self.model.get_submodule(self.tap.last)
        handles = [
            first.register_forward_pre_hook(self._on_enter, with_kwargs=True),
            first.get_submodule(self.tap.query).register_forward_pre_hook(self._on_query),
            last.register_forward_hook(self._on_leave),
        ]
        try:
            return self.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _on_enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def _on_query(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        assert self._entered is not None
        modulated = args[0][:, -self._entered.shape[1] :] if self.tap.joined else args[0]
        rel, compute = math.nan, True
        if self._previous is not None:
            difference = (modulated.float() - self._previous.float()).abs().mean()
            rel = float(difference / (self._previous.float().abs().mean() + 1e-8))
            value = 0.0
            for coefficient in self.coefficients:
                value = value * rel + coefficient
            self._accumulated += abs(value)
            compute = self._accumulated >= self.thresh
            self.margins.append(abs(self._accumulated - self.thresh))
        if compute:
            self._accumulated = 0.0
        self._previous = modulated.clone()
        self.computed.append(compute)
        self.rel_l1.append(rel)

    def _on_leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        assert self._entered is not None
        position = self.tap.output
        hidden_states = output if position is None else output[position]
        if self.computed[-1]:
            self._residual = hidden_states - self._entered
            return output
        assert self._residual is not None
        reused = self._entered + self._residual
        return reused if position is None else (*output[:position], reused, *output[position + 1 :])
