"""TeaCache for diffusion transformers as a torch.fx / torch.compile rewriting pass.

transformer.compile(backend=TeaCacheBackend(rel_l1_thresh=0.2), fullgraph=True)
"""

import importlib
from typing import TYPE_CHECKING, Any

from teacache_fx.backend import TeaCacheBackend, teacache_backend
from teacache_fx.config import TeaCacheConfig
from teacache_fx.contexts import cache_context, session
from teacache_fx.errors import Declined, DeclineReason, TeaCacheWarning
from teacache_fx.explain import explain
from teacache_fx.extractors import CacheContext, register_extractor
from teacache_fx.policy import StepReason
from teacache_fx.report import RewriteReport
from teacache_fx.select import get_cache_backend
from teacache_fx.state import TeaCacheState
from teacache_fx.stats import CacheStats

if TYPE_CHECKING:
    from teacache_fx.hook import TeaCacheHook, apply_teacache_hook, remove_teacache_hook

__version__ = "0.1.0"

__all__ = [
    "CacheContext",
    "CacheStats",
    "DeclineReason",
    "Declined",
    "RewriteReport",
    "StepReason",
    "TeaCacheBackend",
    "TeaCacheConfig",
    "TeaCacheHook",
    "TeaCacheState",
    "TeaCacheWarning",
    "apply_teacache_hook",
    "cache_context",
    "explain",
    "get_cache_backend",
    "register_extractor",
    "remove_teacache_hook",
    "session",
    "teacache_backend",
]


def __getattr__(name: str) -> Any:
    """The hook is a diffusers hook: diffusers, slow to import and not required, is imported when it is asked for."""
    if name not in ("TeaCacheHook", "apply_teacache_hook", "remove_teacache_hook"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        hook = importlib.import_module("teacache_fx.hook")
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs diffusers: pip install 'teacache-fx[diffusers]'") from error
    return getattr(hook, name)
