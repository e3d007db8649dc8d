"""What became of each step of an exported program, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teacache_fx.errors import VerificationError
from teacache_fx.reference_steps import ReferenceStep

_COUNTERS = ("step_index", "consecutive_skips")
_GUARDS = ("previous_timestep", "timestep_direction", "latents_move", "previous_latents_move")
_CLEARLY = 3.0  # so many times nearer to one output than to the other


class ExportError(VerificationError):
    """An exported program does not do what the model with TeaCache does.

    Attributes:
        verification: what was found, step by step.
    """

    def __init__(self, verification: Verification) -> None:
        self.verification = verification
        super().__init__(str(verification))


@dataclass(frozen=True)
class VerifiedStep:
    """One step of a program.

    Attributes:
        expected: "computed", "skipped", or "mixed" where samples decide for themselves and differ.
        found: the decision whose output the program's is nearest to; "unclear" where they are alike.
        stated: what the program's own state says, "" where it cannot be read.
        difference: of the output from the expected one, relative to its largest value.
        kept: whether the state was kept from the step before and advanced; `None` where nothing tells.
        accumulated: the distance that was compared, in thresholds; `None` where a trajectory began.
    """

    expected: str
    found: str
    stated: str
    difference: float
    kept: bool | None
    accumulated: float | None

    def problem(self, tolerance: float) -> str:
        """What is wrong, or ""."""
        if self.found not in (self.expected, "unclear"):
            return f"{self.found} instead of {self.expected}"
        if self.stated not in (self.expected, ""):
            return f"its state says {self.stated}"
        if not self.difference <= tolerance:  # NaN is a problem too
            return "output differs"
        return "state was lost" if self.kept is False else ""


@dataclass(frozen=True)
class Verification:
    """What a program did; printed, a table.

    Attributes:
        program: its path or kind.
        steps: in order.
        tolerance: how far outputs may differ.
    """

    program: str
    steps: tuple[VerifiedStep, ...]
    tolerance: float

    @property
    def problem(self) -> str:
        """What is wrong in a word, or ""."""
        if not self.steps[0].difference <= self.tolerance:
            return "does not compute what the model does: other weights, or another model"
        skips = [step for step in self.steps if step.expected == "skipped"]
        if skips and all(step.found == "computed" for step in skips):
            return "computes every step: the cache has vanished, or other settings were exported"
        if any(step.problem(self.tolerance) for step in self.steps):
            return "differs from the model with TeaCache"
        if not any("skipped" in (step.found, step.stated) for step in skips):
            return "cannot be judged: computing and reusing give the same"
        return ""

    def __str__(self) -> str:
        rows = [("step", "expected", "found", "state says", "difference", "state kept", "distance", "")]
        for index, step in enumerate(self.steps):
            kept = "" if step.kept is None else "yes" if step.kept else "no"
            distance = "" if step.accumulated is None else f"{step.accumulated:.2f}"
            found = (step.expected, step.found, step.stated, f"{step.difference:.1e}", kept, distance)
            rows.append((str(index), *found, step.problem(self.tolerance)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        title = f"{self.program} {self.problem or 'does what the model with TeaCache does'}"
        return "\n".join([f"{title} (differences up to {self.tolerance:.0e} allowed; distance in thresholds)", *lines])


def judge(outputs: Sequence[Tensor], step: ReferenceStep, state: Mapping[str, Tensor]) -> VerifiedStep:
    """Compares one step of a program with the same step as it should be.

    Args:
        outputs: of the program.
        step: as it should be.
        state: that the program has afterwards, as far as it can be read.
    """
    distances = {decision: _distance(outputs, expected) for decision, expected in step.outputs.items()}
    found = min(distances, key=distances.__getitem__)
    others = [distance for decision, distance in distances.items() if decision != found]
    if others and (min(others) <= _CLEARLY * distances[found] or min(others) == 0):
        found = "unclear"
    kept = None
    if readable := [name for name in _COUNTERS if name in state]:
        guards = [name for name in _GUARDS if name in state]
        kept = all(_is_equal(state[name], step.state[name]) for name in readable)
        kept = kept and all(_is_near(state[name], step.state[name]) for name in guards)
    elif step.decision == "skipped" and found in ("computed", "skipped"):
        kept = found == "skipped"  # a residual that was not kept cannot be reused
    return VerifiedStep(step.decision, found, _stated(state), distances[step.decision], kept, step.accumulated)


def _is_equal(found: Tensor, expected: Tensor) -> bool:
    """See Note [Single numbers] in `state_buffers`: a buffer may have room for more than there is."""
    return torch.equal(found.cpu().reshape(-1)[: expected.numel()], expected.cpu().reshape(-1))


def _is_near(found: Tensor, expected: Tensor) -> bool:
    number, wanted = found.cpu().double().reshape(-1)[: expected.numel()], expected.cpu().double().reshape(-1)
    return torch.allclose(number, wanted, rtol=0.02, atol=1e-6)


def _stated(state: Mapping[str, Tensor]) -> str:
    if "reason" in state:
        is_skipped = state["reason"] == 0  # StepReason.SKIPPED
    elif "consecutive_skips" in state:
        is_skipped = state["consecutive_skips"] > 0
    else:
        return ""
    return "skipped" if bool(is_skipped.all()) else "mixed" if bool(is_skipped.any()) else "computed"


def _distance(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any output, relative to the largest value expected there; infinite with NaN."""
    largest = 0.0
    for output, wanted in zip(outputs, expected, strict=True):
        difference = (output.cpu().double() - wanted.cpu().double()).abs().max()
        relative = float(difference / wanted.cpu().double().abs().max().clamp_min(1e-12))
        largest = max(largest, float("inf") if relative != relative else relative)
    return largest
