"""The settings of TeaCache: frozen, validated, and resolved for one transformer class."""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from teacache_fx.advice import advice_on_threshold
from teacache_fx.checks import check_count
from teacache_fx.coefficients import IDENTITY, polynomial_facts, published, published_names
from teacache_fx.errors import TeaCacheWarning

Accumulation = Literal["abs", "signed"]
Granularity = Literal["batch", "sample"]


@dataclass(frozen=True)
class TeaCacheConfig:
    """How eagerly TeaCache skips the block stack.

    Attributes:
        rel_l1_thresh: the blocks run once the accumulated, rescaled relative L1 distance reaches it. Higher is faster
            and less exact. Greater than 0.
        coefficients: polynomial that rescales the distance, highest power first, of any degree. `None` takes the one
            published for `transformer_type`, and the identity (with a warning) where none is published.
        transformer_type: transformer class name, or a row of the published table. `None` takes the class compiled.
        accumulation: "abs" adds the polynomial's magnitude (vLLM-Omni), "signed" its value (the TeaCache authors).
        num_warmup_steps: so many first steps of a generation are always computed. The very first always is.
        num_final_steps: so many last steps are always computed; needs `num_inference_steps` to be known.
        num_inference_steps: length of a generation in steps, or `None` where it is not known.
        max_consecutive_skips: after so many skips in a row the blocks run; `None` sets no limit.
        granularity: "batch" decides for the whole batch by its mean distance (vLLM-Omni, TeaCache); "sample" keeps the
            distance of each sample, runs the blocks when any sample needs them, and lets the others reuse their own
            residuals all the same, so that no sample's result depends on its neighbours.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value out of its range.
    """

    rel_l1_thresh: float = 0.2
    coefficients: tuple[float, ...] | None = None
    transformer_type: str | None = None
    accumulation: Accumulation = "abs"
    num_warmup_steps: int = 0
    num_final_steps: int = 0
    num_inference_steps: int | None = None
    max_consecutive_skips: int | None = None
    granularity: Granularity = "batch"

    def __post_init__(self) -> None:
        thresh = _number("rel_l1_thresh", self.rel_l1_thresh)
        if thresh <= 0:
            raise ValueError(
                f"rel_l1_thresh must be greater than 0, got {thresh}. Typical values lie between 0.05 and 0.8; "
                "to run without the cache, compile without this backend."
            )
        object.__setattr__(self, "rel_l1_thresh", thresh)
        if self.coefficients is not None:
            object.__setattr__(self, "coefficients", _coefficients(self.coefficients))
        if self.transformer_type is not None and not isinstance(self.transformer_type, str):
            raise TypeError(f"transformer_type must be the name of a transformer class, got {self.transformer_type!r}")
        if self.accumulation not in ("abs", "signed"):
            raise ValueError(f"accumulation must be 'abs' or 'signed', got {self.accumulation!r}")
        if self.granularity not in ("batch", "sample"):
            raise ValueError(f"granularity must be 'batch' or 'sample', got {self.granularity!r}")
        for name, least in (("num_warmup_steps", 0), ("num_final_steps", 0)):
            check_count(name, getattr(self, name), least)
        for name, least in (("num_inference_steps", 1), ("max_consecutive_skips", 1)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)
        if self.num_inference_steps is not None and self.num_warmup_steps >= self.num_inference_steps:
            warnings.warn(
                f"num_warmup_steps={self.num_warmup_steps} covers all num_inference_steps={self.num_inference_steps}: "
                "no step will be skipped.",
                TeaCacheWarning,
                stacklevel=3,
            )

    @classmethod
    def field_names(cls) -> list[str]:
        """Names of the settings, in order."""
        return [field.name for field in dataclasses.fields(cls)]

    def resolve(self, class_name: str, is_length_known: bool = False) -> ResolvedConfig:
        """The settings with the polynomial filled in for a transformer class.

        Args:
            class_name: class of the compiled model; `transformer_type` overrides it.
            is_length_known: whether somebody else has said how many steps a generation has.

        Raises:
            ValueError: `transformer_type` was given and nothing is published for it.
        """
        if self.num_final_steps and self.num_inference_steps is None and not is_length_known:
            warnings.warn(
                f"num_final_steps={self.num_final_steps} has no effect as long as num_inference_steps is not known. "
                "Pass it too, or call backend.refresh(pipeline, num_inference_steps).",
                TeaCacheWarning,
                stacklevel=2,
            )
        if self.coefficients is not None:
            return ResolvedConfig(self, self.coefficients, "given by the user")
        row = published(self.transformer_type or class_name)
        if advice := advice_on_threshold(self.rel_l1_thresh, row):
            warnings.warn(advice, TeaCacheWarning, stacklevel=2)
        if row is not None:
            return ResolvedConfig(self, row.coefficients, f"published for {row.name} ({row.source})")
        if self.transformer_type is not None:
            raise ValueError(
                f"transformer_type={self.transformer_type!r} has no published coefficients. Pass coefficients=[...], "
                f"or one of: {', '.join(published_names())}"
            )
        warnings.warn(
            f"no TeaCache coefficients are published for {class_name}: the relative L1 distance is accumulated "
            "unscaled. Pass coefficients=[...] (highest power first; [1.0, 0.0] silences this warning) and choose "
            "rel_l1_thresh by looking at results.",
            TeaCacheWarning,
            stacklevel=2,
        )
        return ResolvedConfig(self, IDENTITY, "identity (none published)")


@dataclass(frozen=True)
class ResolvedConfig:
    """A config and the polynomial that serves it.

    Attributes:
        config: the user's settings.
        coefficients: highest power first.
        origin: where the coefficients come from, in words.
    """

    config: TeaCacheConfig
    coefficients: tuple[float, ...]
    origin: str

    @property
    def caveat(self) -> str:
        """Where the polynomial is negative or not monotone on the working range; empty if nowhere."""
        return str(polynomial_facts(self.coefficients))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _coefficients(value: Any) -> tuple[float, ...]:
    items = value.tolist() if hasattr(value, "tolist") else value  # what numpy.polyfit returns, torch tensors
    if isinstance(items, (str, bytes, bytearray)) or not isinstance(items, Sequence):
        raise TypeError(f"coefficients must be a sequence of numbers, highest power first, got {value!r}")
    numbers_ = tuple(_number(f"coefficients[{i}]", item) for i, item in enumerate(items))
    if not numbers_:
        raise ValueError("coefficients must hold at least one number, got none; [1.0, 0.0] is the identity polynomial")
    if facts := str(polynomial_facts(numbers_)):
        warnings.warn(
            f"the polynomial coefficients={list(numbers_)} is {facts} on the working range [0, 0.3] of the relative "
            "distance: a larger change can count as a smaller one. Fit it anew, or raise num_warmup_steps.",
            TeaCacheWarning,
            stacklevel=4,
        )
    return numbers_
