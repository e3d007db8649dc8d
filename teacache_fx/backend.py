"""TeaCache as a torch.compile backend, and as something to switch on for a whole pipeline."""

from __future__ import annotations

import importlib.util
import logging
import warnings
import weakref
from typing import Any

from torch import nn

from teacache_fx.advice import advice_on_length
from teacache_fx.checks import check_count
from teacache_fx.config import TeaCacheConfig
from teacache_fx.contexts import original, set_num_inference_steps
from teacache_fx.errors import TeaCacheWarning
from teacache_fx.graph_backend import GraphBackend
from teacache_fx.store import MAX_CONTEXTS

log = logging.getLogger(__name__)


class TeaCacheBackend(GraphBackend):
    """A torch.compile backend that puts TeaCache into the graph and hands it to an inner compiler.

        backend = TeaCacheBackend(rel_l1_thresh=0.2)
        transformer.compile(backend=backend, fullgraph=True)   # one model, or
        backend.enable(pipeline)                               # every transformer of a diffusers pipeline

    One backend may serve several models; each has its own states.

    Args:
        config: the settings; `None` for the defaults.
        inner: "inductor", "aot_eager" or "eager".
        on_decline: for a graph that cannot be rewritten: "warn" runs it uncached and warns once per model, "raise"
            raises `Declined` when the model is called, "ignore" runs it uncached.
        max_contexts: states kept per model class: guidance branches times requests in flight. The least recently used
            one goes first; each holds a residual as large as the tokens that it belongs to.
        config_fields: fields of `TeaCacheConfig`, set on top of `config`.

    Raises:
        TypeError: an unknown field, or a `config` that is no `TeaCacheConfig`.
        ValueError: a value out of range.
    """

    def __init__(
        self,
        config: TeaCacheConfig | None = None,
        *,
        inner: str = "inductor",
        on_decline: str = "warn",
        max_contexts: int = MAX_CONTEXTS,
        **config_fields: Any,
    ) -> None:
        super().__init__(config, inner=inner, on_decline=on_decline, max_contexts=max_contexts, **config_fields)
        self._enabled: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def enable(self, pipeline: Any) -> None:
        """Applies TeaCache to every transformer of a pipeline: `transformer`, and `transformer_2` where there is one.

        Each is compiled when it is called for the first time.

        Args:
            pipeline: a diffusers pipeline, or anything that has a `transformer`.

        Raises:
            ImportError: diffusers is not installed.
            TypeError: the pipeline has no transformer.
            ValueError: a transformer has TeaCache already, or is compiled already.
        """
        _check_diffusers()
        from teacache_fx.hook import apply_teacache_hook, check_applicable

        transformers = _transformers(pipeline)
        for transformer in transformers:
            check_applicable(transformer)  # all of them before the first is changed
        for transformer in transformers:
            apply_teacache_hook(transformer, self)
            self._enabled.add(transformer)
        log.info("TeaCache enabled on %s", ", ".join(type(transformer).__name__ for transformer in transformers))

    def disable(self, pipeline: Any) -> None:
        """Takes TeaCache off the pipeline's transformers that this backend has enabled.

        Raises:
            TypeError: the pipeline has no transformer.
        """
        for transformer in _transformers(pipeline):
            if (transformer := original(transformer)) in self._enabled:
                from teacache_fx.hook import remove_teacache_hook

                remove_teacache_hook(transformer)
                self._enabled.discard(transformer)

    def is_enabled(self) -> bool:
        """Whether `enable` has been called for a pipeline that still exists."""
        return len(self._enabled) > 0

    def refresh(self, pipeline: Any, num_inference_steps: int | None = None, verbose: bool = True) -> None:
        """Begins a new generation: forgets what is cached for the pipeline, and learns how many steps follow.

        It need not be called, since the cache notices by itself; with the number of steps known the last ones can be
        forced (`num_final_steps`).

        Args:
            pipeline: a diffusers pipeline, or anything that has a `transformer`.
            num_inference_steps: length of the coming generations in steps; `None` for not known.
            verbose: log it.

        Raises:
            TypeError: the pipeline has no transformer, or the number is no integer.
            ValueError: the number is not positive.
        """
        if num_inference_steps is not None:
            check_count("num_inference_steps", num_inference_steps, 1)
            if advice := advice_on_length(num_inference_steps):
                warnings.warn(advice, TeaCacheWarning, stacklevel=2)
        for transformer in _transformers(pipeline):
            transformer = original(transformer)
            self.reset_state(transformer)
            set_num_inference_steps(transformer, num_inference_steps)
            if verbose:
                length = "unknown" if num_inference_steps is None else num_inference_steps
                log.info("TeaCache refreshed for %s, steps: %s", type(transformer).__name__, length)


def _transformers(pipeline: Any) -> list[nn.Module]:
    found = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    transformers = [model for model in found if isinstance(model, nn.Module)]
    if not transformers:
        raise TypeError(
            f"pipeline {type(pipeline).__name__} has no transformer; pass a pipeline with a `transformer`, or compile "
            "the model itself: model.compile(backend=backend)"
        )
    return transformers


def _check_diffusers() -> None:
    if importlib.util.find_spec("diffusers") is None:
        raise ImportError(
            "enable() needs diffusers: pip install 'teacache-fx[diffusers]', or compile the model itself: "
            "model.compile(backend=backend)"
        )


teacache_backend = TeaCacheBackend()
"""Ready-made backend with the default settings: `torch.compile(transformer, backend=teacache_backend)`."""
