"""The pytest plugin, run by pytest itself on test files as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacache_fx.snapshot import take_snapshot
from tests import toys

_QUIETLY = ("-p", "no:cacheprovider", "-W", "ignore", "--show-capture=no")
_TEST = """
import torch
from tests import toys

def test_small(teacache_golden):
    teacache_golden("small", toys.make(), **toys.inputs())

def test_large(teacache_golden):
    teacache_golden("large", toys.make(num_blocks=3), **toys.inputs())
"""


@pytest.fixture(scope="module", autouse=True)
def _torch_is_loaded() -> None:
    """The inner runs unload what they have loaded, and torch cannot be loaded twice."""
    take_snapshot(toys.make(), (), toys.inputs())


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(test_models=_TEST)
    return pytester


def _run(project: pytest.Pytester, *arguments: str) -> tuple[dict[str, int], str]:
    result = project.runpytest_inprocess(*_QUIETLY, *arguments)
    return result.parseoutcomes(), result.stdout.str()


def _golden(project: pytest.Pytester, name: str = "small") -> Path:
    return project.path / "goldens" / f"{name}.teacache.txt"


def test_from_nothing_to_a_caught_change(project: pytest.Pytester) -> None:
    outcomes, text = _run(project)
    assert outcomes == {"failed": 2}
    assert "no golden" in text
    assert "pytest --update-goldens" in text

    assert _run(project, "--update-goldens")[0] == {"passed": 2}
    assert _run(project)[0] == {"passed": 2}
    written = _golden(project).read_text("utf-8")

    changed = _TEST.replace("toys.make(),", "toys.make(toys.RotaryInPlaceDiT),")
    project.makepyfile(test_models=changed)
    outcomes, text = _run(project)
    assert outcomes == {"failed": 1, "passed": 1}
    failure = text.split("FAILURES")[1].split("short test summary")[0]
    assert "+ empty_like(taken.3) -> f32[2, 8, 32]" in failure
    assert "blocks.0 (and 1 more alike)" in failure
    assert "testing.py" not in failure, "the plugin's own code is of no interest"
    assert len(failure.splitlines()) < 40
    assert _golden(project).read_text("utf-8") == written


def test_unused_goldens(project: pytest.Pytester) -> None:
    _run(project, "--update-goldens")
    old = _golden(project, "old")
    old.write_text("teacache-fx snapshot", "utf-8")
    result = project.runpytest_inprocess(*_QUIETLY)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes() == {"passed": 2}
    assert str(old) in result.stdout.str()
    assert project.runpytest_inprocess(*_QUIETLY, "--collect-only").ret == pytest.ExitCode.OK
    # Of a run that leaves tests out, nothing can be told.
    for part in (["-k", "small"], ["test_models.py::test_small"], ["--deselect", "test_models.py::test_large"]):
        assert project.runpytest_inprocess(*_QUIETLY, *part).ret == pytest.ExitCode.OK
        assert _run(project, "--update-goldens", *part)[0]["passed"] == 1
        assert old.exists()
        assert _golden(project, "large").exists()
    assert "(removed)" in _run(project, "--update-goldens")[1]
    assert not old.exists()
    assert _golden(project).exists()


def test_a_failed_test_makes_no_golden_unused(project: pytest.Pytester) -> None:
    _run(project, "--update-goldens")
    project.makepyfile(
        test_models=_TEST.replace('    teacache_golden("large"', '    assert 0\n    teacache_golden("large"')
    )
    outcomes, text = _run(project, "--update-goldens")
    assert outcomes == {"passed": 1, "failed": 1}
    assert "no test asks for" not in text
    assert _golden(project, "large").exists()


def test_names_that_are_none(project: pytest.Pytester) -> None:
    project.makepyfile(test_models=_TEST.replace('"small"', '"../small"'))
    text = _run(project, "-k", "small")[1]
    assert "name must be letters, digits, '-', '_' and '.', got '../small'" in text


def test_beneath_xdist(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker knows the goldens of its own tests alone."""
    _run(project, "--update-goldens")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    arguments = (*_QUIETLY, "-n", "2")
    _golden(project, "old").write_text("teacache-fx snapshot", "utf-8")
    result = project.runpytest_subprocess(*arguments)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.parseoutcomes() == {"passed": 2}


def test_torch_is_imported_by_nobody_who_needs_none(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import sys\ndef test(): assert 'torch' not in sys.modules and 'teacache_fx.testing' in sys.modules"
    )
    assert pytester.runpytest_subprocess("-p", "no:hypothesispytest").parseoutcomes() == {"passed": 1}
