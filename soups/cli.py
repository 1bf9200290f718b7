"""The command `soups`: recipes on your files of weights, and whether they belong together.

    soups greedy run/*.ckpt --score 'python eval.py {soup}' --goal max --out soup.safetensors
    soups uniform run/*.safetensors --out soup.safetensors
    soups doctor run/*.safetensors --init start.safetensors

`soups RECIPE --help` has the settings and examples of each. In a clone of the repository, `python -m soups` is the same
command, and `python -m soups experiment=NAME` makes the soups of a sweep.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from soups.errors import InterruptedBySignalError, UserError, one_line_errors, refuse
from soups.ranks import end, start, this_rank
from soups.words import COMMANDS, HAVE_START, METRICS, OTHERS, SCORED, parser_of

KINDS = ("score", "loss", "images", "texts", "perplexity", "choices")  # of held-out examples
USES = {  # settings of held-out examples -> the kinds of them where they mean something
    "goal": ("score",),
    "network": KINDS[2:],
    "batch_size": KINDS[2:],
    "image_size": ("images",),
    "templates": ("images",),
    "workers": ("images",),
    "metric": ("score", "images", "texts"),
    "columns": ("texts",),
    "label": ("texts",),
    "max_length": ("texts", "perplexity", "choices"),
    "per_token": ("choices",),
}
# Other words that are no settings of a recipe in Python.
ELSEWHERE = ("command", "files", "last", "top", "by", "by_goal", "out", "force", "more", "journal", "report")


def _held_out(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The score that was asked for, and the same of --report."""
    from soups.scoring import HeldOut  # noqa: PLC0415

    values = vars(arguments)
    kind: Any = next((kind for kind in KINDS if values.get(kind)), None)
    given = {name: values[name] for name in USES if values.get(name)}
    for name in given:
        if kind is None:
            raise UserError(f"--{name.replace('_', '-')} is for --images, which --batch-norm recompute needs")
        if kind not in USES[name]:
            flags = " and ".join(f"--{each}" for each in USES[name])
            raise UserError(f"--{name.replace('_', '-')} is for {flags}, and --{kind} would ignore it")
    report = values.get("report")
    if kind is None or kind == "loss":
        return values.get(kind), None
    if kind == "score":
        from soups.scorers.outside import scorer_of  # noqa: PLC0415

        of = partial(scorer_of, goal=values["goal"], metric=values["metric"])
        return of(values[kind]), None if report is None else of(report)
    if given.get("metric", METRICS[0]) not in METRICS:
        raise UserError(f"--metric {given['metric']}: of --{kind} there are {', '.join(METRICS)}")
    if "columns" in given:
        given["columns"] = tuple(given["columns"].split(","))
    return HeldOut(kind, values[kind], **given), None if report is None else HeldOut(kind, Path(report), **given)


def _files(arguments: argparse.Namespace, *, as_typed: bool = False) -> list[Path]:
    """The models; a shell sorts run10 before run2, so they are sorted anew where their order means nothing."""
    from soups.along import chosen, in_time_order  # noqa: PLC0415
    from soups.soup import refuse_out  # noqa: PLC0415
    from soups.sources import in_natural_order, matches  # noqa: PLC0415

    found = [path for pattern in arguments.files for path in matches(pattern)]
    refuse_out(arguments.out, found, force=arguments.force)
    values = vars(arguments)
    if isinstance(values.get("weights"), str):  # weights along a run
        found = in_time_order(found)
    found = found if as_typed else in_natural_order(found)
    return chosen(
        found, last=arguments.last, top=values.get("top"), by=values.get("by"), goal=values.get("by_goal", "")
    )


def _soup(arguments: argparse.Namespace) -> None:
    """Make a soup by a recipe, print what it is and save it; a weight for each file is for files as they were typed."""
    values, name, out = vars(arguments), arguments.command, arguments.out
    of_each = any(isinstance(values.get(setting), (list, str)) for setting in ("weights", "scales", "density"))
    files = _files(arguments, as_typed=of_each or name == "slerp")
    held_out, report = _held_out(arguments)
    others = {*KINDS, *USES, *ELSEWHERE} - {"goal"}
    settings = {each: value for each, value in values.items() if each not in others}
    settings |= {"report": report} if report else {}
    before: tuple[Any, ...] = (files, held_out)
    kept = None  # what is known so far, from which a killed command continues
    if name not in SCORED:
        settings |= {} if held_out is None else {"images": held_out}
        before = (settings.pop("init"), files) if name in HAVE_START else (files,)
    elif name == "learned":
        kept = settings["state"] = out.with_name(f"{out.name}.state.pt")
    else:
        kept = settings["journal"] = arguments.journal or out.with_name(f"{out.name}.journal.jsonl")
    soup = getattr(import_module("soups"), name.replace("-", "_"))(*before, **settings)
    if this_rank()[0] == 0:  # the first process alone
        print(soup)
        path = soup.save(out)
        print(*soup.remarks, path, sep="\n")
        if kept is not None and not values.get("journal"):
            kept.unlink(missing_ok=True)  # its scores are in the soup's record


def _doctor(arguments: argparse.Namespace) -> None:
    from rich.console import Console  # noqa: PLC0415

    from soups.doctor import examine, show  # noqa: PLC0415
    from soups.files.reading import Reading  # noqa: PLC0415
    from soups.sources import in_natural_order, matches  # noqa: PLC0415

    files = in_natural_order([path for pattern in arguments.files for path in matches(pattern)])
    reading = Reading(arguments.key, arguments.exclude, arguments.only_common)
    show(examine(files, arguments.init, arguments.scores, reading, arguments.held_out), Console())


def _make(arguments: argparse.Namespace) -> None:
    """Make the soup of a recipe in a file; settings that are typed beside win over those in it."""
    from soups.verify import make  # noqa: PLC0415

    def run(words: list[str]) -> None:
        inner = _parser().parse_args([*words, *(["--force"] if arguments.force else []), *arguments.more])
        if inner.command in OTHERS:
            raise UserError(f"recipe: {inner.command} makes no soup: write uniform, weighted, ties, ...")
        RUN[inner.command](inner)

    make(arguments.recipe, arguments.out, arguments.folder, run, force=arguments.force, more=arguments.more)


def _verify(arguments: argparse.Namespace) -> None:
    from soups.verify import answer  # noqa: PLC0415

    is_so, line = answer(arguments.soup, arguments.folder)
    print(line)
    sys.exit(0 if is_so else 1)


def _lora(arguments: argparse.Namespace) -> None:
    from soups.lora import soup_folders  # noqa: PLC0415

    files, weights = _files(arguments, as_typed=arguments.weights is not None), arguments.weights
    if arguments.base is None:
        soup = soup_folders(files, arguments.out, weights=weights, rank=arguments.rank)
        print(f"{arguments.out}: {len(files)} adapters, {soup.remarks()[0]}")
        return
    if arguments.rank is not None:
        raise UserError("--rank is of an adapter, and with --base the soup is a whole model: leave one of them out")
    soups = import_module("soups")
    dense = soups.weighted(files, weights or [1.0] * len(files), base=arguments.base)
    print(dense, dense.save(arguments.out), sep="\n")


def _export(arguments: argparse.Namespace) -> None:
    from soups.export.files import export_soup  # noqa: PLC0415

    classes = arguments.classes.split(",") if arguments.classes else ()
    words = (arguments.soup, arguments.to, arguments.out)
    print(export_soup(*words, network=arguments.network, classes=classes, licence=arguments.license))


def _interrupt(signum: int, _: Any) -> NoReturn:
    raise InterruptedBySignalError(signum)


_parser = partial(parser_of, __doc__)
RUN: dict[str, Callable[[argparse.Namespace], None]] = dict.fromkeys(COMMANDS, _soup)
RUN |= {"lora": _lora, "export": _export, "doctor": _doctor, "make": _make, "verify": _verify}


def main(words: Sequence[str] | None = None) -> None:
    """The command, with the words of the command line."""
    words = list(sys.argv[1:] if words is None else words)
    if not words:
        words = ["--help"]
    try:
        arguments, more = _parser().parse_known_args(words)
        if more and arguments.command != "make":
            _parser().error(f"unrecognized arguments: {' '.join(more)}")
        arguments.more = more
    except UserError as error:
        refuse(str(error))

    def work() -> None:
        start()
        # So that what it wrote on the way is deleted; several are ended by torchrun, whatever they wait for.
        before = signal.signal(signal.SIGTERM, _interrupt) if this_rank()[1] == 1 else None
        try:
            RUN[arguments.command](arguments)
        finally:
            end()
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    one_line_errors(work, several=arguments.command in SCORED)


if __name__ == "__main__":
    main()
