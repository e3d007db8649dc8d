"""TeaCache as a torch.compile backend."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import fx, nn

from teacache_fx.compilers import check_inner, compile_with, inductor_options, is_inductor_option
from teacache_fx.config import TeaCacheConfig
from teacache_fx.errors import Declined, DeclineReason, TeaCacheWarning
from teacache_fx.flops import is_matmul
from teacache_fx.graph import compiled_root, state_examples
from teacache_fx.report import RewriteReport
from teacache_fx.rewrite import Pipeline
from teacache_fx.runtime import CachedGraph
from teacache_fx.state import StateStore
from teacache_fx.stats import CacheStats, collect

log = logging.getLogger(__name__)
_ON_DECLINE = ("warn", "raise", "ignore")


class TeaCacheBackend:
    """A torch.compile backend that puts TeaCache into the graph and hands it to an inner compiler.

        backend = TeaCacheBackend(rel_l1_thresh=0.2)
        transformer.compile(backend=backend, fullgraph=True)

    One backend may serve several models; each has its own states.

    Args:
        config: the settings; `None` for the defaults.
        inner: "inductor", "aot_eager" or "eager".
        on_decline: for a graph that cannot be rewritten: "warn" runs it uncached and warns once per model, "raise"
            raises `Declined` when the model is called, "ignore" runs it uncached.
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
        **config_fields: Any,
    ) -> None:
        if config is not None and not isinstance(config, TeaCacheConfig):
            raise TypeError(f"config must be a TeaCacheConfig, got {config!r}; or pass its fields as keywords")
        if unknown := sorted(set(config_fields) - set(TeaCacheConfig.field_names())):
            valid = ", ".join([*TeaCacheConfig.field_names(), "inner", "on_decline"])
            raise TypeError(f"unknown option {unknown[0]!r}; valid are {valid}")
        self.config = dataclasses.replace(config, **config_fields) if config else TeaCacheConfig(**config_fields)
        self.inner = check_inner(inner)
        self.on_decline = _check_on_decline(on_decline)
        self.reports: list[RewriteReport] = []
        self._stores: dict[tuple[str, TeaCacheConfig], StateStore] = {}
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
        root = compiled_root()
        class_name = type(root).__name__ if root is not None else "function"
        pipeline = Pipeline(gm)
        try:
            settings = self._settings(options or {}, mode)
            _check_model(root)
            pipeline.analyse()
            resolved = settings.config.resolve(class_name)
            rewritten = pipeline.rewrite(resolved)
        except Declined as declined:
            self.reports.append(RewriteReport(class_name, len(gm.graph.nodes), declined=declined))
            if settings.on_decline == "raise":
                return _raiser(declined)
            self._tell(root, class_name, gm, declined, settings)
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
        store = self._stores.setdefault((class_name, settings.config), StateStore())
        return CachedGraph(compiled, rewritten, store, settings.config)

    def stats(self) -> CacheStats:
        """What happened at each step so far, per model and context. Reads the records from the device."""
        contexts = []
        for (class_name, _), store in self._stores.items():
            contexts += collect(class_name, store.states)
        return CacheStats(tuple(contexts))

    def reset_state(self) -> None:
        """Makes the next step of every context the first of a generation. The statistics stay."""
        for store in self._stores.values():
            store.reset()

    def reset(self) -> None:
        """Forgets reports, states and statistics; `torch._dynamo.reset()` calls it as it drops the compiled graphs."""
        self.reports.clear()
        self._stores.clear()
        self._warned.clear()

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

    def _tell(
        self, root: nn.Module | None, class_name: str, gm: fx.GraphModule, declined: Declined, settings: _Settings
    ) -> None:
        log.info("%s declined: %s", class_name, declined)
        is_fragment = not any(map(is_matmul, gm.graph.nodes))  # what a graph break leaves has nothing to cache
        if settings.on_decline == "warn" and not is_fragment and root not in self._warned:
            if root is not None:
                self._warned.add(root)
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


def _check_model(root: nn.Module | None) -> None:
    if root is not None and not any(True for _ in root.parameters()):
        raise Declined(DeclineReason.NOT_A_MODEL, f"{type(root).__name__} has no parameters")


def _raiser(error: Exception) -> Callable[..., NoReturn]:
    def raise_error(*_: Any) -> NoReturn:
        raise error

    return raise_error


teacache_backend = TeaCacheBackend()
"""Ready-made backend with the default settings: `torch.compile(transformer, backend=teacache_backend)`."""
