"""Compiles captured graphs with TeaCache in them, and keeps the states of their contexts."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

from torch import fx, nn

from teacache_fx.advice import advice_on_generation
from teacache_fx.capture import capture_site, state_examples
from teacache_fx.checks import check_count
from teacache_fx.compilers import check_inner, compile_with, inductor_options, is_inductor_option
from teacache_fx.config import TeaCacheConfig
from teacache_fx.contexts import current_context, original
from teacache_fx.errors import Declined, DeclineReason, TeaCacheWarning
from teacache_fx.explanation import explained
from teacache_fx.extractors import has_extractor
from teacache_fx.flops import is_matmul
from teacache_fx.pipeline import Pipeline
from teacache_fx.report import RewriteReport
from teacache_fx.runtime import CachedGraph
from teacache_fx.state import TeaCacheState
from teacache_fx.stats import CacheStats, collect
from teacache_fx.store import MAX_CONTEXTS, StateStore
from teacache_fx.whole_call import current_call, current_capture

log = logging.getLogger(__name__)
_ON_DECLINE = ("warn", "raise", "ignore")


class GraphBackend:
    """What `TeaCacheBackend` is to torch.compile: compiles captured graphs and keeps the states of their contexts.

    Args:
        config, inner, on_decline, max_contexts, config_fields: as for `TeaCacheBackend`.

    Raises:
        TypeError, ValueError: as there.
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
        if config is not None and not isinstance(config, TeaCacheConfig):
            raise TypeError(f"config must be a TeaCacheConfig, got {config!r}; or pass its fields as keywords")
        if unknown := sorted(set(config_fields) - set(TeaCacheConfig.field_names())):
            valid = ", ".join([*TeaCacheConfig.field_names(), "inner", "on_decline", "max_contexts"])
            raise TypeError(f"unknown option {unknown[0]!r}; valid are {valid}")
        self.config = dataclasses.replace(config, **config_fields) if config else TeaCacheConfig(**config_fields)
        self.inner = check_inner(inner)
        self.on_decline = _check_on_decline(on_decline)
        self.max_contexts = check_count("max_contexts", max_contexts, 1)
        self.reports: list[RewriteReport] = []
        self._stores: dict[tuple[str, TeaCacheConfig], StateStore] = {}
        self._is_advised = False
        self._warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.__name__ = "teacache"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: dict[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compiles one captured graph; called by dynamo, with `options=` or `mode=` of torch.compile.

        torch.compile takes one of the two; to give both, put the mode among the options: `options={"mode": ...}`.

        The user's errors (an unknown option, `Declined` under `on_decline="raise"`) are raised when the model is
        called, as they are: whatever a backend itself raises, dynamo would wrap.
        """
        site = capture_site()
        root = site.root
        class_name = type(root).__name__ if root is not None else "function"
        try:
            settings = self._settings(options or {}, mode)
            _check_model(root)
            pipeline = Pipeline(gm, is_fragment=site.is_resumed and current_call() is not None)
            pipeline.analyse()
            length = current_context(root).num_inference_steps if root is not None else None
            resolved = settings.config.resolve(class_name, length is not None)
            rewritten = pipeline.rewrite(resolved)
        except Declined as refusal:
            declined = _with_hint(explained(refusal, site), class_name)
            self.reports.append(RewriteReport(class_name, len(gm.graph.nodes), declined=declined))
            part_of = current_capture()
            if part_of is not None and (site.is_part or root is not part_of.model):
                part_of.refusals.append((declined, site.graph_break))  # another part may hold the blocks
            elif settings.on_decline == "raise":
                return _raiser(declined)
            elif any(map(is_matmul, gm.graph.nodes)):  # else what a graph break leaves, and nothing to cache
                self.tell(root, class_name, declined, settings.on_decline)
            return compile_with(settings.inner, gm, example_inputs, settings.inductor)
        except (TypeError, ValueError) as error:
            return _raiser(error)
        started = time.perf_counter()
        inputs = [*example_inputs, *state_examples(rewritten.gm, len(example_inputs))]
        compiled = compile_with(settings.inner, rewritten.gm, inputs, settings.inductor)
        timings = {**pipeline.timings, "inner compiler": time.perf_counter() - started}
        report = RewriteReport(class_name, len(gm.graph.nodes), rewritten.plan, config=resolved, timings=timings)
        self.reports.append(report)
        log.info("%s", report)
        if (capture := current_capture()) is not None:
            capture.is_rewritten = True
        store = self._stores.setdefault((class_name, settings.config), StateStore(self.max_contexts))
        # A diffusers transformer that has cache_context; others have nothing to tell, and diffusers may be absent.
        if root is not None and hasattr(root, "_reset_stateful_cache"):
            from teacache_fx.listener import listen

            listen(root, self)
        return CachedGraph(compiled, rewritten, store, settings.config)

    def __deepcopy__(self, _: dict[int, Any]) -> GraphBackend:
        """A copied model has states of its own, and reports to the same backend."""
        return self

    def stats(self) -> CacheStats:
        """What happened at each step so far, per model and context. Reads the records from the device."""
        contexts = []
        for (class_name, _), store in self._stores.items():
            contexts += collect(class_name, store.recorded)
        return CacheStats(tuple(contexts))

    def reset_state(self, model: nn.Module | None = None) -> None:
        """Makes the next step the first of a generation. The statistics stay.

        Args:
            model: only for calls of this module, and within a `session` only for those of its request; `None` for all.
        """
        for store in list(self._stores.values()):
            states = store.states
            if model is not None:
                states = store.of_model(original(model), current_context(original(model)).request_id)
            for state in states:
                self._advise(state)
                state.reset()

    def reset_stats(self) -> None:
        """Forgets the steps so far; the states stay."""
        for store in list(self._stores.values()):
            store.forget_records()

    def end_session(self, request_id: Hashable) -> int:
        """Frees the states of a request that is done or was given up, and returns how many there were."""
        return sum(store.end_session(request_id) for store in list(self._stores.values()))

    def reset(self) -> None:
        """Forgets reports, states and statistics; `torch._dynamo.reset()` calls it as it drops the compiled graphs."""
        self.reports.clear()
        for state in [state for store in self._stores.values() for state in store.states]:
            state.reset()
        self._stores.clear()
        self._warned.clear()
        self._is_advised = False

    def _settings(self, options: dict[str, Any], mode: str | None) -> _Settings:
        own = {key: value for key, value in options.items() if key in _own_options()}
        other = {key: value for key, value in options.items() if key not in own}
        if unknown := [key for key in other if not is_inductor_option(key)]:
            raise ValueError(
                f"unknown option {unknown[0]!r}; TeaCache's are {', '.join(_own_options())}; "
                "inductor's are listed by torch._inductor.list_options()"
            )
        inner = check_inner(own.pop("inner", self.inner))
        on_decline = _check_on_decline(own.pop("on_decline", self.on_decline))
        mode = own.pop("mode", mode)
        config = dataclasses.replace(self.config, **own) if own else self.config
        return _Settings(config, inner, on_decline, inductor_options(inner, mode, other))

    def _advise(self, state: TeaCacheState) -> None:
        """Warns once if the cache did not help over a whole generation. Once it was seen to help, nothing is read."""
        length = state.steps_since_reset
        if self._is_advised or not 0 < length <= len(state.records):
            return
        has_hit = any((record[0] == 0).any() for record in list(state.records)[-length:])
        advice = advice_on_generation(length, has_hit)
        self._is_advised = bool(has_hit or advice)
        if advice:
            warnings.warn(advice, TeaCacheWarning, stacklevel=3)

    def tell(self, model: nn.Module | None, class_name: str, declined: Declined, on_decline: str | None = None) -> None:
        """Says that a model runs uncached, once for each model.

        Args:
            model: the transformer, `None` if it is not known.
            class_name: of the transformer.
            declined: why.
            on_decline: as for `TeaCacheBackend`; `None` for the backend's own.

        Raises:
            Declined: under `on_decline="raise"`.
        """
        on_decline = on_decline or self.on_decline
        log.info("%s declined: %s", class_name, declined)
        if on_decline == "raise":
            raise declined
        if on_decline == "warn" and model not in self._warned:
            if model is not None:
                self._warned.add(model)
            warnings.warn(f"{class_name} runs without TeaCache: {declined}", TeaCacheWarning, stacklevel=2)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """A backend's settings with the options of one torch.compile call applied."""

    config: TeaCacheConfig
    inner: str
    on_decline: str
    inductor: dict[str, Any]


def _own_options() -> list[str]:
    return [*TeaCacheConfig.field_names(), "inner", "on_decline", "mode"]


def _check_on_decline(value: object) -> str:
    if value not in _ON_DECLINE:
        raise ValueError(f"on_decline must be one of {', '.join(_ON_DECLINE)}, got {value!r}")
    return str(value)


def _with_hint(declined: Declined, class_name: str) -> Declined:
    if not has_extractor(class_name):
        return declined
    hint = "the extractor registered for it serves apply_teacache_hook and TeaCacheBackend.enable only"
    return Declined(declined.reason, f"{declined.detail}; {hint}", declined.node)


def _check_model(root: nn.Module | None) -> None:
    if root is not None and not any(True for _ in root.parameters()):
        raise Declined(DeclineReason.NOT_A_MODEL, f"{type(root).__name__} has no parameters")


def _raiser(error: Exception) -> Callable[..., NoReturn]:
    def raise_error(*_: Any) -> NoReturn:
        raise error

    return raise_error
