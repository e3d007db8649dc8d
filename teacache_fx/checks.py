"""Checks of arguments that several modules take."""

from __future__ import annotations


def check_count(name: str, value: object, least: int) -> int:
    """Returns a count.

    Raises:
        TypeError: it is no integer.
        ValueError: it is less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
