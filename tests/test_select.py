"""The cache by name: from an argument, from the environment, with a JSON config."""

from __future__ import annotations

from typing import Any

import pytest

from teacache_fx import get_cache_backend


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFUSION_CACHE_BACKEND", raising=False)


def test_nothing_chosen_is_no_cache() -> None:
    assert get_cache_backend() is None
    assert get_cache_backend("none", {"rel_l1_thresh": 0.3}) is None


@pytest.mark.parametrize("config", [{"rel_l1_thresh": 0.3}, '{"rel_l1_thresh": 0.3}'])
def test_by_name(config: Any) -> None:
    backend = get_cache_backend("tea_cache", config, inner="eager")
    assert backend is not None
    assert (backend.config.rel_l1_thresh, backend.inner) == (0.3, "eager")


def test_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "tea_cache")
    backend = get_cache_backend(cache_config={"rel_l1_thresh": 0.3})
    assert backend is not None
    assert backend.config.rel_l1_thresh == 0.3
    assert get_cache_backend("none") is None, "the argument counts more"
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "")
    assert get_cache_backend() is None


def test_keywords_count_more_than_the_config() -> None:
    backend = get_cache_backend("tea_cache", {"inner": "eager", "rel_l1_thresh": 0.3}, inner="aot_eager")
    assert backend is not None
    assert (backend.inner, backend.config.rel_l1_thresh) == ("aot_eager", 0.3)


@pytest.mark.parametrize(
    ("name", "config", "error", "message"),
    [
        ("teacache", None, ValueError, "cache_backend must be 'tea_cache' or 'none', got 'teacache'"),
        ("tea_cache", "{rel_l1_thresh: 0.2}", ValueError, "cache_config is no valid JSON"),
        ("tea_cache", "[0.2]", TypeError, "must be a mapping or the text of a JSON object, got "),
        ("tea_cache", {"threshold": 0.2}, TypeError, "unknown option 'threshold'; valid are rel_l1_thresh"),
        ("tea_cache", {"rel_l1_thresh": 0}, ValueError, "rel_l1_thresh must be greater than 0"),
        ("none", {"threshold": 0.2}, TypeError, "unknown option 'threshold'"),
    ],
)
def test_wrong_choices(name: str, config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_cache_backend(name, config)


def test_a_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "cache_dit")
    with pytest.raises(ValueError, match="DIFFUSION_CACHE_BACKEND must be 'tea_cache' or 'none', got 'cache_dit'"):
        get_cache_backend()
