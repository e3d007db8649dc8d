"""What the field calls the arguments of a denoiser."""

from __future__ import annotations

LATENT_NAMES = ("hidden_states", "latents", "sample", "x")
"""Names of the latents, the likeliest first."""

ENOUGH = 3
"""A score of `says_time` from which on the name alone tells a timestep."""

_TIME_WORDS = {  # the likeliest first
    "timestep": 4, "timesteps": 4, "t": 3, "time": 3, "time_step": 3, "sigma": 3, "sigmas": 3, "noise_level": 3,
    "noise_labels": 3, "c_noise": 3, "log_snr": 3,
}  # fmt: skip


def says_time(name: str, ndim: int) -> int:
    """How much name and number of dimensions of an argument say that it is a timestep, from 0 to 4.

    Per sample, token or frame it has up to three dimensions; `t` with three is as likely to be text. What is called a
    timestep in full is one with as many dimensions as the latents too, such as [batch, 1, frames, 1, 1].
    """
    score = _TIME_WORDS.get(name, ENOUGH if "timestep" in name else 0)
    most = 2 if name == "t" else 5 if score > ENOUGH else 3
    return score if ndim <= most else 0


def time_rank(name: str) -> int:
    """Settles a tie between two timesteps: the higher, the likelier is the name the first one's."""
    words = list(_TIME_WORDS)
    return -words.index(name) if name in words else -len(words)
