"""A pytest plugin: golden files of what TeaCache makes of your models. See `docs/ci.md`.

    def test_transformer(teacache_golden):
        teacache_golden("transformer", model, hidden_states=..., timestep=...)

It is loaded in every run of pytest where this package is installed, so torch is imported only by a test that uses it.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from teacache_fx.graph_diff import compare

DIRECTORY, SUFFIX = "goldens", ".teacache.txt"
_FIXTURE, _OUTPUT = "teacache_golden", "teacache_fx_goldens"


class TeaCacheGolden:
    """Compares models with golden files; what the fixture `teacache_golden` gives.

    Args:
        directory: of the golden files.
        is_updating: write them instead.
        used: takes the paths of those that were asked for.
    """

    def __init__(self, directory: Path, is_updating: bool, used: set[str]) -> None:
        self._directory, self._is_updating, self._used = directory, is_updating, used

    def __call__(self, name: str, model: Any, *args: Any, **kwargs: Any) -> None:
        """Captures the model, rewrites it, and compares the plan and the graph with the golden file of that name.

        Args:
            name: of the golden file, without its ending: letters, digits, `-`, `_` and `.`.
            model: the transformer; it stays as it is.
            *args: positional arguments of one step.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: the name is none for a file.
        """
        __tracebackhide__ = True
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name must be letters, digits, '-', '_' and '.', got {name!r}; the model comes second")
        from teacache_fx.snapshot import take_snapshot  # which imports torch

        path = self._directory / f"{name}{SUFFIX}"
        self._used.add(str(path))
        text = take_snapshot(model, args, kwargs).text
        if self._is_updating:
            self._directory.mkdir(parents=True, exist_ok=True)
            if not path.exists() or compare(path.read_text(encoding="utf-8"), text):
                path.write_text(text, encoding="utf-8")
        elif not path.exists():
            pytest.fail(
                f"no golden {path}: run `pytest --update-goldens`, read what it writes, and commit it", pytrace=False
            )
        elif difference := compare(path.read_text(encoding="utf-8"), text):
            heading = f"{type(model).__name__} is not as in {path.name}; `pytest --update-goldens` accepts the change:"
            pytest.fail(f"{heading}\n{difference}", pytrace=False)


class _Bookkeeper:
    """Knows which goldens were used, and so which were not.

    A golden is unused if all tests beside its directory have run and none has asked for it. Of a directory where a
    test was left out, was skipped or failed, nothing can be told.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.used, self._beside, self._unknown = set[str](), set[str](), set[str]()
        self._is_part = bool(config.option.collectonly) or any("::" in argument for argument in config.args)
        self._is_updating = bool(config.getoption("--update-goldens"))
        self._unused: list[Path] = []

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self._unknown.update(str(item.path.parent) for item in items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        collected = {item.path for item in session.items}
        for directory in {path.parent for path in collected}:
            if not any((directory / DIRECTORY).glob(f"*{SUFFIX}")):
                continue
            self._beside.add(str(directory))
            others = (path for path in directory.glob("*.py") if path not in collected)
            tests = (path for path in others if path.name.startswith("test_") or path.stem.endswith("_test"))
            if any(_FIXTURE in path.read_text("utf-8", "replace") for path in tests):
                self._unknown.add(str(directory))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if _FIXTURE in getattr(item, "fixturenames", ()) and not report.passed:
            self._unknown.add(str(item.path.parent))
        return report

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of xdist has ended: takes over what it knows."""
        told = getattr(node, "workeroutput", {}).get(_OUTPUT)
        for mine, theirs in zip((self.used, self._beside, self._unknown), told or (), strict=False):
            mine.update(theirs)
        self._is_part |= told is None  # it has crashed

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[_OUTPUT] = [sorted(known) for known in (self.used, self._beside, self._unknown)]
            return
        if self._is_part or session.shouldstop or session.shouldfail:
            return
        for directory in sorted(self._beside - self._unknown):
            there = sorted((Path(directory) / DIRECTORY).glob(f"*{SUFFIX}"))
            self._unused += [path for path in there if str(path) not in self.used]
        if self._is_updating:
            for path in self._unused:
                path.unlink()
        elif self._unused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._unused:
            terminalreporter.section("goldens that no test asks for", red=not self._is_updating)
            for path in self._unused:
                terminalreporter.line(f"{path} (removed)" if self._is_updating else str(path))
            if not self._is_updating:
                terminalreporter.line("delete them, or run `pytest --update-goldens`")


_BOOKKEEPER = pytest.StashKey[_Bookkeeper]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--update-goldens`."""
    group = parser.getgroup("teacache-fx")
    group.addoption("--update-goldens", action="store_true", help="rewrite golden files instead of comparing with them")


def pytest_configure(config: pytest.Config) -> None:
    """Begins to keep book of the goldens."""
    keeper = config.stash[_BOOKKEEPER] = _Bookkeeper(config)
    config.pluginmanager.register(keeper, "teacache_fx_bookkeeper")


@pytest.fixture
def teacache_golden(request: pytest.FixtureRequest) -> TeaCacheGolden:
    """Compares what TeaCache makes of a model with a golden file in `goldens/` beside the test."""
    is_updating = bool(request.config.getoption("--update-goldens"))
    return TeaCacheGolden(request.path.parent / DIRECTORY, is_updating, request.config.stash[_BOOKKEEPER].used)
