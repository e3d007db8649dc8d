"""TeaCache for diffusion transformers as a torch.fx / torch.compile rewriting pass.

transformer.compile(backend=TeaCacheBackend(rel_l1_thresh=0.2), fullgraph=True)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacache_fx.backend import TeaCacheBackend, teacache_backend
    from teacache_fx.config import TeaCacheConfig
    from teacache_fx.contexts import cache_context, session
    from teacache_fx.errors import Declined, DeclineReason, TeaCacheWarning
    from teacache_fx.explanation import explain
    from teacache_fx.export import rewrite
    from teacache_fx.extractors import CacheContext, register_extractor
    from teacache_fx.hook import TeaCacheHook, apply_teacache_hook, remove_teacache_hook
    from teacache_fx.policy import StepReason
    from teacache_fx.report import RewriteReport
    from teacache_fx.select import get_cache_backend
    from teacache_fx.state import TeaCacheState
    from teacache_fx.stats import CacheStats
    from teacache_fx.verification import verify_export

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
    "rewrite",
    "session",
    "teacache_backend",
    "verify_export",
]

_HOMES = {
    "backend": ("TeaCacheBackend", "teacache_backend"),
    "config": ("TeaCacheConfig",),
    "contexts": ("cache_context", "session"),
    "errors": ("Declined", "DeclineReason", "TeaCacheWarning"),
    "explanation": ("explain",),
    "export": ("rewrite",),
    "extractors": ("CacheContext", "register_extractor"),
    "hook": ("TeaCacheHook", "apply_teacache_hook", "remove_teacache_hook"),
    "policy": ("StepReason",),
    "report": ("RewriteReport",),
    "select": ("get_cache_backend",),
    "state": ("TeaCacheState",),
    "stats": ("CacheStats",),
    "verification": ("verify_export",),
}


def __getattr__(name: str) -> Any:
    """Imports a public name's module when it is asked for.

    The pytest plugin is loaded in every run of pytest, and must not bring torch along; and the hook is a diffusers
    hook, while diffusers is slow to import and not required.
    """
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        if home != "hook" or not str(error.name).startswith("diffusers"):
            raise
        raise ImportError(f"{name} needs diffusers: pip install 'teacache-fx[diffusers]'") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
