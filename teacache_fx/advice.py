"""What to tell a user whom the cache does not help."""

from __future__ import annotations

from teacache_fx.coefficients import PublishedPolynomial

FEWEST_STEPS = 20
"""Generations with fewer steps gain little (vLLM-Omni's TeaCache guide)."""


def advice_on_length(num_inference_steps: int) -> str:
    """On a generation of so many steps; empty if they are enough."""
    if num_inference_steps >= FEWEST_STEPS:
        return ""
    steps = "1 step" if num_inference_steps == 1 else f"{num_inference_steps} steps"
    return (
        f"a generation of {steps} leaves little to skip: below {FEWEST_STEPS} steps the latents "
        "move far at each; use more steps, or run without the cache"
    )


def advice_on_generation(num_steps: int, has_hit: bool) -> str:
    """On a generation that is over; empty if the cache helped, or if a single step was but a trial.

    Args:
        num_steps: steps in it.
        has_hit: whether any was skipped.
    """
    if has_hit or num_steps < 2:
        return ""
    return advice_on_length(num_steps) or (
        f"not one of {num_steps} steps was skipped: raise rel_l1_thresh, or pass coefficients that fit this model "
        "(backend.stats() shows the distances that were reached)"
    )


def advice_on_threshold(rel_l1_thresh: float, row: PublishedPolynomial | None) -> str:
    """On a threshold far from those published with the polynomial; empty between half the lowest and the highest.

    Args:
        rel_l1_thresh: the threshold.
        row: the published polynomial in use, if it is one.
    """
    ladder = {float(thresh): gain for thresh, gain in row.rel_l1_thresh.items()} if row is not None else {}
    if row is None or not ladder:
        return ""
    low, high = min(ladder), max(ladder)
    if low / 2 <= rel_l1_thresh <= high:
        return ""
    effect = "hardly a step will be skipped" if rel_l1_thresh < low else "the result may suffer visibly"
    rungs = ", ".join(f"{thresh:g} ({gain})" for thresh, gain in ladder.items())
    return f"rel_l1_thresh={rel_l1_thresh:g} is out of the ladder published for {row.name}, so {effect}; it is {rungs}"


NEW_CONDITIONING = (
    "every call brought conditioning tensors of its own, so each was taken for another prompt and computed: pass the "
    "same tensor objects at each step, or name the branch: with teacache_fx.cache_context(model, 'cond')"
)
