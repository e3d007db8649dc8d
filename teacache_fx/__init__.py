"""TeaCache for diffusion transformers as a torch.fx / torch.compile rewriting pass.

transformer.compile(backend=TeaCacheBackend(rel_l1_thresh=0.2), fullgraph=True)
"""

from teacache_fx.backend import TeaCacheBackend, teacache_backend
from teacache_fx.config import TeaCacheConfig
from teacache_fx.contexts import cache_context
from teacache_fx.errors import Declined, DeclineReason, TeaCacheWarning
from teacache_fx.explain import explain
from teacache_fx.policy import StepReason
from teacache_fx.report import RewriteReport
from teacache_fx.state import TeaCacheState
from teacache_fx.stats import CacheStats

__version__ = "0.1.0"

__all__ = [
    "CacheStats",
    "DeclineReason",
    "Declined",
    "RewriteReport",
    "StepReason",
    "TeaCacheBackend",
    "TeaCacheConfig",
    "TeaCacheState",
    "TeaCacheWarning",
    "cache_context",
    "explain",
    "teacache_backend",
]
