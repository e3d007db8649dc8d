"""The trajectory guard on what samplers do to latents: Note [Trajectory guard] of the policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from teacache_fx.policy import Decision, PolicyState, StepReason, relative_move
from teacache_fx.trajectory import gather_evidence
from tests.simulation import plain, reasons

R = StepReason
Array = NDArray[np.float64]
Path = list[tuple[float, Array]]  # the timestep and the latents of each call
SHAPE = (2, 4, 12, 12)
PICTURES = [(0.3, 0.0), (1.0, 0.0), (1.0, 0.5), (2.0, 0.5)]  # spread and mean of the clean latents


def walk(path: Path, per_sample: bool = False) -> list[Decision]:
    """Decides along a path with a modulated input that never changes: all that is computed is a beginning."""
    shape = (path[0][1].shape[0],) if per_sample else ()
    state, previous, decisions = PolicyState.initial(shape=shape), torch.zeros(path[0][1].shape), []
    for time, latents in path:
        current = torch.tensor(latents, dtype=torch.float32)
        evidence = gather_evidence(torch.tensor(time), current, previous, [], per_sample=per_sample)
        decisions.append(plain(per_sample=per_sample).decide(torch.zeros(shape), evidence, state))
        state, previous = decisions[-1].state, current
    return decisions


def is_smooth(path: Path) -> bool:
    return reasons(walk(path)) == [R.FIRST] + [R.SKIPPED] * (len(path) - 1)


def picture(rng: np.random.Generator, spread: float = 1.0, mean: float = 0.0) -> Array:
    return mean + spread * rng.normal(size=SHAPE)


def velocity(latents: Array, sigma: float, clean: Array | None) -> Array:
    """Of a flow model that knows the picture, or (`None`) expects any picture of unit spread."""
    expected = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * latents if clean is None else clean
    noise = (latents - (1 - sigma) * expected) / sigma
    return noise - expected


def flow_sigmas(steps: int, shift: float) -> Array:
    sigmas = np.linspace(1, 0, steps + 1)
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def euler_flow(noise: Array, steps: int, shift: float, clean: Array | None) -> Path:
    sigmas, latents, path = flow_sigmas(steps, shift), noise, []
    for sigma, following in pairwise(sigmas):
        path.append((1000 * sigma, latents))
        latents = latents + (following - sigma) * velocity(latents, sigma, clean)
    return path


def heun_flow(noise: Array, steps: int, shift: float, clean: Array | None) -> Path:
    """Two calls a step, the second at the timestep of the next step's first: long and short moves take turns."""
    sigmas, latents, path = flow_sigmas(steps, shift), noise, []
    for sigma, following in pairwise(sigmas[:-1]):
        slope = velocity(latents, sigma, clean)
        predicted = latents + (following - sigma) * slope
        path += [(1000 * sigma, latents), (1000 * following, predicted)]
        latents = latents + (following - sigma) * (slope + velocity(predicted, following, clean)) / 2
    return path


def diffusion_sigmas() -> Array:
    """Noise over signal of the 1000 training steps of Stable Diffusion."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return np.asarray(np.sqrt((1 - alphas) / alphas))


def ddim(noise: Array, steps: int, clean: Array) -> Path:
    sigmas = diffusion_sigmas()
    times = np.linspace(999, 1, steps).astype(int)
    return [(float(t), (clean + sigmas[t] * noise) / np.sqrt(1 + sigmas[t] ** 2)) for t in times]


def ancestral(noise: Array, steps: int, clean: Array, rng: np.random.Generator) -> Path:
    """Euler ancestral: each step puts new noise in the place of old (k-diffusion's `get_ancestral_step`)."""
    times = np.linspace(999, 0, steps)
    sigmas = np.append(np.interp(times, np.arange(1000), diffusion_sigmas()), 0)
    latents, path = noise * sigmas[0], []
    for time, sigma, following in zip(times, sigmas[:-1], sigmas[1:], strict=True):
        path.append((float(time), latents / np.sqrt(sigma**2 + 1)))
        up = np.sqrt(following**2 * (sigma**2 - following**2) / sigma**2)
        down = np.sqrt(following**2 - up**2)
        latents = clean + (latents - clean) / sigma * down + up * rng.normal(size=SHAPE)
    return path


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("shift", [1, 3, 12])
@pytest.mark.parametrize("knows", [True, False])
def test_flow_samplers_are_smooth(shift: float, steps: int, knows: bool) -> None:
    for seed, (spread, mean) in enumerate(PICTURES):
        rng = np.random.default_rng(seed)
        clean, noise = picture(rng, spread, mean), rng.normal(size=SHAPE)
        assert is_smooth(euler_flow(noise, steps, shift, clean if knows else None))
        assert is_smooth(heun_flow(noise, steps, shift, clean if knows else None))


@pytest.mark.parametrize("steps", [20, 50])
def test_ancestral_samplers_are_smooth(steps: int) -> None:
    for seed, (spread, mean) in enumerate(PICTURES):
        rng = np.random.default_rng(seed)
        path = ancestral(rng.normal(size=SHAPE), steps, picture(rng, spread, mean), rng)
        assert is_smooth(path)
        moves = [float(decision.state.latents_move) for decision in walk(path)]
        assert steps > 20 or max(moves) > 0.6  # so this is the hard case


@pytest.mark.parametrize("steps", [20, 50])
def test_ddim_is_smooth(steps: int) -> None:
    for seed, (spread, mean) in enumerate(PICTURES):
        rng = np.random.default_rng(seed)
        assert is_smooth(ddim(rng.normal(size=SHAPE), steps, picture(rng, spread, mean)))


@pytest.mark.parametrize("moves", [(0.25, 0.01), (0.01, 0.25), (0.25, 0.001, 0.25, 0.2)])
def test_long_and_short_moves_may_take_turns(moves: Sequence[float]) -> None:
    latents, path = np.ones(SHAPE), []
    for step in range(24):
        path.append((1000.0 - 20 * step, latents))
        latents = latents * (1 + moves[step % len(moves)])
    assert is_smooth(path)


@pytest.mark.parametrize(
    ("ago", "before", "allowed"),
    [
        *(
            (1, before, allowed)
            for before, allowed in ((0.01, 0.3), (0.05, 0.3), (0.125, 0.625), (0.5, 0.9), (0.0, 0.9))
        ),
        *(
            (2, before, allowed)
            for before, allowed in ((0.01, 0.1), (0.05, 0.25), (0.125, 0.625), (0.5, 0.9), (0.0, 0.9))
        ),
    ],
)
def test_the_farthest_move(ago: int, before: float, allowed: float) -> None:
    """Five times the larger of the last two moves, at least 0.1 (0.3 while one is known) and at most 0.9."""
    for factor, reason in ((0.99, R.SKIPPED), (1.01, R.TRAJECTORY_RESTARTED)):
        changes = [*[0.0, before, 0.0][: 1 + ago], allowed * factor]
        sizes = np.cumprod([1 + change for change in changes])
        path = [(500.0 - step, np.full(SHAPE, size)) for step, size in enumerate(sizes)]
        assert reasons(walk(path))[-1] is reason


def test_a_move_of_three_steps_ago_does_not_count() -> None:
    sizes = np.cumprod([1, 1.2, 1.01, 1.01, 1.3])
    assert (
        reasons(walk([(500.0 - i, np.full(SHAPE, size)) for i, size in enumerate(sizes)]))[-1] is R.TRAJECTORY_RESTARTED
    )


@pytest.mark.parametrize("done", [1, 2, 19])
@pytest.mark.parametrize("time", ["same", "lower"])
@pytest.mark.parametrize("shift", [1, 12])
def test_another_trajectory_restarts(done: int, time: str, shift: float) -> None:
    """The timestep tells nothing: that of the last step once more, or the next lower one."""
    for seed, (spread, mean) in enumerate(PICTURES):
        rng = np.random.default_rng(seed)
        before = euler_flow(rng.normal(size=SHAPE), 20, shift, picture(rng, spread, mean))
        after = euler_flow(rng.normal(size=SHAPE), 20, shift, picture(rng, spread, mean))
        start = before[done - 1][0] if time == "same" else before[done][0]
        path = before[:done] + [(start * t / 1000, latents) for t, latents in after]
        found = reasons(walk(path))
        assert found[done] is R.TRAJECTORY_RESTARTED
        assert found.count(R.SKIPPED) == len(path) - 2  # and nothing else restarts


def taking_turns(rng: np.random.Generator, shift: float) -> Iterator[tuple[float, Array]]:
    """Two trajectories on one state."""
    paths = [euler_flow(rng.normal(size=SHAPE), 20, shift, picture(rng)) for _ in range(2)]
    for calls in zip(*paths, strict=True):
        yield from calls


@pytest.mark.parametrize("shift", [1, 3, 12])
def test_two_trajectories_that_take_turns_restart_at_every_turn(shift: float) -> None:
    for seed in range(3):
        found = reasons(walk(list(taking_turns(np.random.default_rng(seed), shift))))
        assert found == [R.FIRST] + [R.TRAJECTORY_RESTARTED] * 39


@pytest.mark.parametrize("sample", [0, 1])
def test_one_sample_of_a_batch_may_jump(sample: int) -> None:
    rng = np.random.default_rng(0)
    path = euler_flow(rng.normal(size=SHAPE), 20, 3, picture(rng))
    for step in range(10, 20):
        path[step][1][sample] = euler_flow(rng.normal(size=SHAPE), 20, 3, picture(rng))[0][1][sample]
    found = torch.stack([decision.reason for decision in walk(path, per_sample=True)])
    assert found[10, sample] == R.TRAJECTORY_RESTARTED
    assert found[:, 1 - sample].tolist() == [R.FIRST] + [R.SKIPPED] * 19


@pytest.mark.parametrize("per_sample", [False, True])
def test_channels_that_stay_do_not_dilute_the_move(per_sample: bool) -> None:
    current, previous, still = torch.rand(3, 4, 8, 8), torch.rand(3, 4, 8, 8), 100 * torch.rand(3, 12, 8, 8)
    alone = relative_move(current, previous, per_sample)
    together = relative_move(torch.cat([still, current], 1), torch.cat([still, previous], 1), per_sample)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_a_jump_beside_a_large_image_that_stays_restarts() -> None:
    rng = np.random.default_rng(0)
    image = 10 + rng.normal(size=(2, 36, 12, 12))
    path = euler_flow(rng.normal(size=SHAPE), 20, 3, picture(rng))[:9]
    path.append((path[-1][0] - 10, rng.normal(size=SHAPE)))
    found = reasons(walk([(time, np.concatenate([latents, image], 1)) for time, latents in path]))
    assert found == [R.FIRST] + [R.SKIPPED] * 8 + [R.TRAJECTORY_RESTARTED]
