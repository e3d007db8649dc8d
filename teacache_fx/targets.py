"""What the command line works on: `module:factory`, or a file."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from teacache_fx.snapshot import Snapshot, read_program, take_snapshot

_WANTED = "a tuple (model, kwargs) or (model, args, kwargs)"


class TargetError(ValueError):
    """What was given on the command line cannot be worked on; the message says why, and what can."""


def load_model(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model that a factory makes, and the arguments of one step.

    Args:
        target: `module:factory`; the module is looked for in the current directory, too.

    Raises:
        TargetError: there is no such module or factory, or it makes something else.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise TargetError(f"{target!r} is neither a file nor module:factory, such as my_models:transformer")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"{target!r}: no module named {error.name!r}; run it where the module can be imported"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise TargetError(f"{target!r}: {module_name} has no function {name!r}")
    try:
        made = factory()
    except SystemExit as error:
        raise TargetError(f"{target!r} ends the process instead of making a model: sys.exit({error.code!r})") from error
    if isinstance(made, (tuple, list)) and len(made) in (2, 3) and isinstance(made[0], nn.Module):
        args, kwargs = made[1:] if len(made) == 3 else ((), made[1])
        if isinstance(args, Sequence) and isinstance(kwargs, Mapping):
            return made[0], tuple(args), dict(kwargs)
    raise TargetError(f"{target!r} must return {_WANTED}, got {_kind(made)}")


def snapshot_of(target: str) -> Snapshot:
    """The snapshot of what a factory makes or of an exported program, or one that stands in a file.

    Args:
        target: `module:factory`, a `.pt2` file, or a file that `teacache-fx snapshot` or the pytest plugin has written.

    Raises:
        TargetError: it is none of these.
    """
    path = Path(target)
    if not path.is_file() and ":" in target:
        model, args, kwargs = load_model(target)
        return take_snapshot(model, args, kwargs)
    if not path.is_file():
        raise TargetError(f"{target!r}: no such file, and no module:factory")
    if path.suffix == ".pt2":
        try:
            return read_program(path)
        except ValueError as error:
            raise TargetError(str(error)) from error
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("teacache-fx snapshot"):
        raise TargetError(f"{target!r} is no snapshot: `teacache-fx snapshot module:factory -o FILE` writes one")
    return Snapshot(text)


def _kind(made: Any) -> str:
    if isinstance(made, (tuple, list)):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return type(made).__name__
