"""The command line: `teacache-fx snapshot`, `diff`, `explain` and `verify`."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

_FACTORY = "module:factory, where factory() returns (model, kwargs) or (model, args, kwargs) of one step"
_TARGET = f"{_FACTORY}; or a .pt2 file"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; `None` for those of the process.

    Returns:
        exit status: 0, or 1 where `diff` or `verify` finds a difference or `explain` a model that is declined, or 2 for
        bad input.
    """
    arguments = _parser().parse_args(argv)
    from teacache_fx.targets import TargetError  # torch takes seconds to import; --help does without

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch and diffusers say about themselves is not what was asked for
        try:
            return int(arguments.run(arguments))
        except (TargetError, OSError) as error:
            print(f"teacache-fx: {error}", file=sys.stderr)
        except Exception as error:  # of the model or its factory; 1, as Python would exit with, says "they differ"
            traceback.print_exc()
            print(f"teacache-fx: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("teacache-fx", description="What TeaCache makes of a model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    snapshot = commands.add_parser(
        "snapshot", help="print plan and graph as a text that stays as long as the model does"
    )
    snapshot.add_argument("target", metavar="TARGET", help=_TARGET)
    snapshot.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there")
    snapshot.set_defaults(run=_snapshot)
    diff = commands.add_parser("diff", help="say what differs between two; exit status 1 if anything does")
    for name in ("old", "new"):
        diff.add_argument(name, metavar=name.upper(), help=f"{_TARGET}; or a snapshot's file")
    diff.add_argument("--full", action="store_true", help="all lines that differ, as `diff -u` shows them")
    diff.set_defaults(run=_diff)
    explain = commands.add_parser(
        "explain", help="print the plan, or why there is none; exit status 1 if there is none"
    )
    explain.add_argument("target", metavar="TARGET", help=_TARGET)
    explain.set_defaults(run=_explain)
    _add_verify(commands)
    return parser


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verify = commands.add_parser(
        "verify", help="run an exported program against its model, step by step; exit status 1 if they differ"
    )
    verify.add_argument("program", metavar="PROGRAM", help="a .pt2 of torch.export or AOTInductor, or an .onnx file")
    verify.add_argument("target", metavar="TARGET", help=_FACTORY)
    verify.add_argument("--thresh", type=float, metavar="X", help="rel_l1_thresh that was exported")
    verify.add_argument("--coefficients", type=_numbers, metavar="A,B,...", help="likewise, highest power first")
    verify.add_argument("--warmup-steps", type=int, metavar="N", help="num_warmup_steps, likewise")
    verify.add_argument("--tolerance", type=float, metavar="X", help="how far outputs may differ, relatively")
    verify.set_defaults(run=_verify)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers with commas between them, such as 1.0,0.0, not {text!r}") from error


def _snapshot(arguments: argparse.Namespace) -> int:
    from teacache_fx.targets import snapshot_of

    text = snapshot_of(arguments.target).text
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from teacache_fx.graph_diff import compare, unified
    from teacache_fx.targets import snapshot_of

    old, new = snapshot_of(arguments.old).text, snapshot_of(arguments.new).text
    difference = compare(old, new)
    if difference:
        print(unified(old, new, arguments.old, arguments.new) if arguments.full else difference)
    return 1 if difference else 0


def _explain(arguments: argparse.Namespace) -> int:
    from teacache_fx.explanation import explain, report_of
    from teacache_fx.exported import load_graph
    from teacache_fx.targets import TargetError, load_model

    if Path(arguments.target).suffix == ".pt2":
        try:
            report = report_of(load_graph(arguments.target), Path(arguments.target).stem)
        except (FileNotFoundError, ValueError) as error:
            raise TargetError(str(error)) from error
    else:
        model, args, kwargs = load_model(arguments.target)
        report = explain(model, *args, **kwargs)
    print(report)
    return 0 if report.is_rewritten else 1


def _verify(arguments: argparse.Namespace) -> int:
    from teacache_fx.config import TeaCacheConfig
    from teacache_fx.errors import Declined
    from teacache_fx.targets import TargetError, load_model
    from teacache_fx.verification import verify_export
    from teacache_fx.verified_steps import ExportError

    given = {
        "rel_l1_thresh": arguments.thresh,
        "coefficients": arguments.coefficients,
        "num_warmup_steps": arguments.warmup_steps,
    }
    model, args, kwargs = load_model(arguments.target)
    try:
        config = TeaCacheConfig(**{name: value for name, value in given.items() if value is not None})
        found = verify_export(arguments.program, model, args, kwargs, config=config, tolerance=arguments.tolerance)
    except ExportError as error:
        print(error)
        return 1
    except (OSError, TypeError, ValueError, ImportError, Declined) as error:
        raise TargetError(str(error)) from error
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
