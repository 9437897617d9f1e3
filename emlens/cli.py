"""The command line: demo, study run, doctor, report. Thin: it reads arguments, calls the rooms, and turns their errors into one line."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

EXAMPLES = """examples:
  emlens demo                          the shipped study, a page at runs/demo/report.html
  emlens demo --quick --out runs/quick the same code on fewer rows, in minutes
  emlens study new my.yaml             a study file with every key, a word on each; edit it
  emlens study run my.yaml --out runs/mine
  emlens doctor runs/my-model --adapter runs/x/adapter
                                       what must hold of a model before its activations are believed
  emlens report runs/demo              write the page of a finished run anew
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 only when all went well."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "act"):
        parser.print_help()
        return 2
    from .store import StoreError

    try:
        return args.act(args)
    except (StoreError, ValueError, KeyError, FileNotFoundError, RuntimeError) as error:
        if args.traceback:
            raise
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        _tell(str(said))
        return 1
    except KeyboardInterrupt:
        _tell("stopped" if args.act is _doctor else "stopped; what was finished is kept, the same command goes on from there")
        return 130


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="emlens", description="Mechanistic interpretability of emergent misalignment.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"emlens {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    demo = commands.add_parser("demo", help="run the shipped study on a small real model", epilog="example: emlens demo --quick --out runs/quick")
    demo.set_defaults(act=_study, file="demo")
    study = commands.add_parser("study", help="run a study file").add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = study.add_parser("new", help="write a study file with every key, a word on each", epilog="example: emlens study new my.yaml")
    new.add_argument("file", help="to be written; one that is there is left alone")
    new.set_defaults(act=_new)
    run = study.add_parser(
        "run", help="run every missing piece of a study", epilog="example: emlens study run my.yaml --out runs/mine",
        description="Every key of the file is checked before anything is run. `emlens study new my.yaml` writes one with every key, "
        "a word on each.",
    )  # fmt: skip
    run.add_argument("file", help="a .yaml study, or the name of a shipped one")
    run.set_defaults(act=_study)
    for one in (demo, run):
        one.add_argument("--quick", action="store_true", help="the study's own smaller settings: same code, fewer rows")
        one.add_argument("--out", metavar="DIR", help="run folder (default: runs/<name>, or runs/<name>-quick)")
    _add_doctor(commands)
    report = commands.add_parser("report", help="write the page of a finished run anew", epilog="example: emlens report runs/demo")
    report.add_argument("run", help="run folder")
    report.set_defaults(act=_report)
    return parser


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor", help="measure on a model what must hold of any", epilog="example: emlens doctor runs/my-model --adapter runs/x/adapter --json",
        description="One line a law: what was measured, how far it may be off, and what to do if it is. The table goes to stdout at the end, "
        "what is being done to stderr. Exit code 1 when a law is broken.",
    )  # fmt: skip
    doctor.add_argument("model", nargs="?", help="hub id, local folder, .gguf file, or an alias")
    doctor.add_argument("--adapter", metavar="DIR", action="append", default=[], help="PEFT folder or hub id; several are loaded together")
    doctor.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    doctor.add_argument("--device", help="cuda, mps, cpu (default: cpu)")
    doctor.add_argument("--engine", default="hooks", choices=("hooks", "bridge", "nnsight"), help="how places are read (default: hooks)")
    doctor.add_argument("--chat-template", metavar="T", help="Jinja text, or 'plain' for base models that have none")
    doctor.add_argument("--json", action="store_true", help="for machines")
    doctor.add_argument(
        "--families", action="store_true", help="instead of a model: tiny random models of many families, each with and without a LoRA"
    )
    doctor.set_defaults(act=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    if args.families == bool(args.model):
        raise ValueError("give a model (hub id, folder, .gguf file), or --families; emlens doctor --help shows an example")
    _tell("examining tiny models of many families" if args.families else f"opening {' with '.join([args.model, *args.adapter])}")
    from . import laws

    with redirect_stdout(sys.stderr):  # what libraries print is no part of the table
        report = laws.family_table() if args.families else laws.doctor(_patient(args))
    text = laws.family_text if args.families else laws.as_text
    _say(laws.as_json(report) if args.json else text(report))
    return 0 if laws.whole(report) else 1


def _patient(args: argparse.Namespace) -> Any:
    """The model to be examined, with the adapters on it."""
    from .models import load_model

    names = _names(args.adapter)
    model = load_model(
        args.model,
        dict(zip(names, args.adapter, strict=True)),
        dtype=args.dtype,
        device=args.device,
        engine=args.engine,
        chat_template=args.chat_template,
    )
    _tell(f"examining {model!r}; the table comes at the end")
    return model


def _names(sources: Sequence[str]) -> list[str]:
    """A name for each adapter: its folder's, or the one above for ``…/adapter`` (PEFT allows no dots); repeated ones are numbered."""
    names: list[str] = []
    for source in sources:
        parts = [part for part in source.replace("\\", "/").split("/") if part not in ("", ".", "..")] or ["adapter"]
        name = (parts[-2] if parts[-1] == "adapter" and len(parts) > 1 else parts[-1]).replace(".", "-")
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _study(args: argparse.Namespace) -> int:
    from .study import Study, command_line

    study = Study.load(args.file, quick=args.quick)
    out = args.out or f"runs/{study.config['name']}{'-quick' if args.quick else ''}"
    return _show(study.run(out, command=command_line()))


def _new(args: argparse.Namespace) -> int:
    from .store import write_text
    from .study import template

    path = Path(args.file)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{args.file!r} is no name of a study file: .yaml is needed at its end")
    if path.exists():
        raise ValueError(f"{args.file} is there already and is left as it is; choose another name")
    write_text(path, template())
    _say(f"{path}: every key, with a word on each. Edit it, then: emlens study run {path}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from .report import build

    build(args.run)
    return _show(args.run)


def _show(folder: str | Path) -> int:
    from .report import summary

    _say(summary(folder))
    return 0


def _tell(line: str) -> None:
    """What is being done, or went wrong: to stderr."""
    _write(f"emlens: {line}", sys.stderr)


def _say(text: str) -> None:
    """What was asked for: to stdout."""
    _write(text, sys.stdout)


def _write(text: str, stream: TextIO) -> None:
    """At once. That a pager or ``head`` has left off reading is no error: the exit code goes on to say what was found."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python itself would complain of it when it ends


if __name__ == "__main__":
    sys.exit(main())
