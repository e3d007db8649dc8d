"""Choosing the cache by name, on a command line or in the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from teacache_fx.backend import TeaCacheBackend

ENVIRONMENT_VARIABLE = "DIFFUSION_CACHE_BACKEND"
TEA_CACHE = "tea_cache"


def get_cache_backend(
    cache_backend: str | None = None, cache_config: Mapping[str, Any] | str | None = None, **backend_options: Any
) -> TeaCacheBackend | None:
    """Makes the cache backend of that name, for programs that let their users choose.

        backend = get_cache_backend(args.cache_backend, args.cache_config)
        if backend is not None:
            backend.enable(pipeline)

    Args:
        cache_backend: "tea_cache", or "none"; `None` asks the environment variable DIFFUSION_CACHE_BACKEND, and means
            "none" where that is not set or empty.
        cache_config: fields of `TeaCacheConfig`, as a mapping or as the text of a JSON object.
        backend_options: further arguments of `TeaCacheBackend`; they override the same ones in `cache_config`.

    Returns:
        the backend, or `None` for "none".

    Raises:
        TypeError: `cache_config` is neither, or has unknown fields.
        ValueError: the name is unknown, the text is not JSON, or a value is out of range.
    """
    name, origin = cache_backend, "cache_backend"
    if name is None:
        name, origin = os.environ.get(ENVIRONMENT_VARIABLE) or "none", ENVIRONMENT_VARIABLE
    if name not in (TEA_CACHE, "none"):
        raise ValueError(f"{origin} must be {TEA_CACHE!r} or 'none', got {name!r}")
    backend = TeaCacheBackend(**{**_fields(cache_config), **backend_options})  # checked for "none" too
    return backend if name == TEA_CACHE else None


def _fields(cache_config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(cache_config, str):
        try:
            cache_config = json.loads(cache_config)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"cache_config is no valid JSON ({error}): {cache_config!r}; expected something like "
                "'{\"rel_l1_thresh\": 0.2}'"
            ) from error
    if cache_config is None:
        return {}
    if not isinstance(cache_config, Mapping):
        raise TypeError(f"cache_config must be a mapping or the text of a JSON object, got {cache_config!r}")
    return dict(cache_config)
