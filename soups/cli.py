"""The command `soups`: recipes on your files of weights, and whether they belong together.

    soups greedy run/*.ckpt --score 'python eval.py {soup}' --goal max --out soup.safetensors
    soups uniform run/*.safetensors --out soup.safetensors
    soups doctor run/*.safetensors --init start.safetensors

`soups RECIPE --help` has the settings and examples of each. In a clone of the repository, `python -m soups` is the same
command, and `python -m soups experiment=NAME` makes the soups of a sweep.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from soups.commands import EXAMPLES, TITLES
from soups.errors import UserError, one_line_errors, refuse
from soups.ranks import end, start, this_rank

METRICS = ("top1", "macro_f1", "matthews", "accuracy_and_f1")
REPORT = (
    "examples that select nothing, by which the soup is compared with the best single model: of the kind of the "
    "held-out ones, a command, folder or file"
)
BASE = "of LoRA adapters: the model, file or folder, into which each is merged, so that the soup is a whole model"
FILES = "weight files, folders of save_pretrained, or patterns in quotes; run2 comes before run10"


class Parser(argparse.ArgumentParser):
    """Wrong words are one line, as all that a person can mend."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        refuse(f"{message}; {self.prog} --help has the settings and examples")


def _numbers(text: str) -> list[float]:
    """Numbers with commas between them.

    >>> _numbers("3,1,-0.5")
    [3.0, 1.0, -0.5]
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"write numbers with commas between them, as in 3,1; got {text!r}") from None


def _weights(text: str) -> list[float] | str:
    """Numbers, or the name of weights along a run."""
    return text if text == "1-sqrt" or text[:1].isalpha() else _numbers(text)


def _with_files(parser: Parser, *, top: bool = True) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help=FILES)
    parser.add_argument("--last", type=int, metavar="N", help="of one run: its last N files, by the numbers in names")
    if top:
        parser.add_argument("--top", type=int, metavar="N", help="of one run: its best N files, by --by")
        parser.add_argument(
            "--by", metavar="SCORES", help="a .json, .jsonl or .csv by file, or a metric of trainer_state.json"
        )
        parser.add_argument("--goal", dest="by_goal", choices=("max", "min"), default="", help="of --by")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors, .pt, .pth or .ckpt file, or a folder")
    parser.add_argument("--force", action="store_true", help="overwrite --out if it is a file that is there")


def _with_tensors(parser: Parser) -> "argparse._ArgumentGroup":
    group = parser.add_argument_group("what is averaged")
    group.add_argument("--key", help="which state dict, where a file has several: state_dict, ema, ...")
    group.add_argument("--exclude", metavar="REGEX", help="tensors with such names are the first model's")
    group.add_argument(
        "--only-common",
        action="store_true",
        help="average what all models have; other tensors are the first model's, or dropped",
    )
    return group


def _with_reading(parser: Parser) -> None:
    group = _with_tensors(parser)
    group.add_argument("--dtype", default="keep", choices=("keep", "F64", "F32", "F16", "BF16"), help="that is written")
    group.add_argument("--allow-unrelated", action="store_true", help="models not fine-tuned from one checkpoint, too")
    group.add_argument("--threads", type=int, default=2, choices=range(1, 65), metavar="N", help="that read and add")
    group.add_argument("--base", metavar="MODEL", help=BASE)


def _with_batch_norm(parser: Parser, *, init: bool = True, images: bool = True) -> None:
    what = "running means and variances: their average, those of --init, or measured anew on --images"
    parser.add_argument("--batch-norm", default="average", choices=("average", "keep", "recompute"), help=what)
    if init:
        parser.add_argument("--init", type=Path, help="the initialisation, for --batch-norm keep")
    if images:
        group = parser.add_argument_group("images on which --batch-norm recompute measures")
        group.add_argument("--images", type=Path, metavar="DIR", help="a folder of images for each class")
        _with_network(group)


def _with_network(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--network", help="timm:NAME, open_clip:NAME, transformers:FOLDER or function:module:name")
    group.add_argument("--batch-size", type=int, help="examples at once")
    group.add_argument("--image-size", type=int, help="of --images: pixels, where the network does not say")
    group.add_argument("--workers", type=int, help="of --images: processes that decode")


def _with_examples(parser: Parser, *, scored: bool) -> None:
    group = parser.add_argument_group("held-out examples, which neither trained the models nor will test the soup")
    one = group.add_mutually_exclusive_group(required=True)
    if scored:
        one.add_argument(
            "--score",
            metavar="COMMAND",
            help="prints a number as its last line for {soup}, and may write that of each example to {soup}.jsonl; "
            "or module:function",
        )
    else:
        one.add_argument("--loss", metavar="MODULE:FUNCTION", help="a function; returns network, batches, loss")
    one.add_argument("--images", type=Path, metavar="DIR", help="a folder of images for each class")
    one.add_argument("--texts", type=Path, metavar="FILE", help="labelled texts: .tsv, .csv or .jsonl")
    one.add_argument("--perplexity", type=Path, metavar="FILE", help="a text, or a .jsonl with a text in each line")
    if scored:
        one.add_argument(
            "--choices", type=Path, metavar="FILE", help="multiple choice: a .jsonl with prompt, choices, answer"
        )
        group.add_argument("--goal", choices=("max", "min"), help="of --score: whether it is to be high or low")
        group.add_argument("--journal", type=Path, help="a file of scores as they come; by default beside --out")
        group.add_argument(
            "--metric", help=f"of classes: {', '.join(METRICS)}; of {{soup}}.jsonl: which of its metrics"
        )
        group.add_argument("--report", metavar="WHAT", help=REPORT)
        group.add_argument(
            "--min-sigma", type=float, default=0.0, metavar="Z", help="add a model only if its gain is Z or more sigma"
        )
        group.add_argument(
            "--per-token", action="store_true", help="of --choices: mean likelihoods of a token, not sums"
        )
    _with_network(group)
    group.add_argument(
        "--templates", choices=("openai", "name"), help="of open_clip without a head: around class names"
    )
    group.add_argument("--columns", help="of --texts: what is read, such as text or premise,hypothesis")
    group.add_argument("--label", help="of --texts: the column of class numbers or names")
    group.add_argument("--max-length", type=int, help="of texts: tokens")


SETTINGS = (  # those that recipes in Python have under the same names
    *("dtype", "batch_norm", "init", "key", "exclude", "only_common", "allow_unrelated", "threads", "base"),
    *("weights", "alpha", "scales", "density", "scale", "seed", "goal", "scores", "ties", "rounds", "min_sigma"),
    *("per", "lr", "epochs", "weight_decay", "place"),
)
USES = {  # settings of held-out examples -> where they mean something
    "goal": ("score",),
    "network": ("images", "texts", "perplexity", "choices"),
    "batch_size": ("images", "texts", "perplexity", "choices"),
    "image_size": ("images",),
    "templates": ("images",),
    "workers": ("images",),
    "metric": ("score", "images", "texts"),
    "columns": ("texts",),
    "label": ("texts",),
    "max_length": ("texts", "perplexity", "choices"),
    "per_token": ("choices",),
}


def _held_out(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The score that was asked for, and the same of --report.

    Raises:
        UserError: a setting that this kind of score would ignore.
    """
    from soups.heldout import HeldOut  # noqa: PLC0415

    values = vars(arguments)
    kinds = ("score", "loss", "images", "texts", "perplexity", "choices")
    kind: Any = next((kind for kind in kinds if values.get(kind)), None)
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
    """The models; a shell sorts run10 before run2, so they are sorted anew where their order means nothing.

    Raises:
        UserError: --out is one of them, or is there already; or as `soups.along.chosen`.
    """
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
    files = _files(arguments, as_typed=name in ("weighted", "arithmetic"))
    held_out, report = _held_out(arguments)
    settings = {each: values[each] for each in SETTINGS if each in values} | ({"report": report} if report else {})
    before: tuple[Any, ...] = (files, held_out)
    kept = None  # what is known so far, from which a killed command continues
    if name not in SCORED:
        settings |= {} if held_out is None else {"images": held_out}
        before = (files,) if name in ("uniform", "weighted") else (settings.pop("init"), files)
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

    from soups.doctor import examine, read_scores, show  # noqa: PLC0415
    from soups.files.reading import Reading  # noqa: PLC0415
    from soups.sources import in_natural_order, matches  # noqa: PLC0415

    files = in_natural_order([path for pattern in arguments.files for path in matches(pattern)])
    scores = read_scores(arguments.scores) if arguments.scores else {}
    reading = Reading(arguments.key, arguments.exclude, arguments.only_common)
    show(examine(files, arguments.init, scores, reading, arguments.held_out), Console())


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


def _with_folders(lora: Parser, export: Parser) -> None:
    _with_files(lora)
    lora.add_argument("--weights", type=_numbers, help="one for each folder, as typed; equal if left out")
    lora.add_argument("--rank", type=int, help="of the soup; left out it is the sum of theirs, which is exact")
    lora.add_argument("--base", metavar="MODEL", help=f"{BASE}; DoRA needs it")
    export.add_argument("soup", type=Path, help="a file or a folder that a recipe wrote, or any weights")
    export.add_argument("--to", required=True, choices=("timm", "open_clip", "transformers", "onnx"))
    export.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    network = "timm:NAME, open_clip:NAME or transformers:FOLDER; not needed where a config lies beside the soup"
    export.add_argument("--network", help=network)
    export.add_argument("--classes", metavar="NAMES", help="of the head, in its order, with commas between them")
    export.add_argument("--license", default="other", help="of the weights, as the hub names licences")


def _parser() -> Parser:
    """All commands and their settings."""
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser("soups", description=__doc__, formatter_class=raw, allow_abbrev=False)
    kinds = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    made = {}
    for name in RUN:
        title = TITLES[name]
        lines = "\n".join(f"  {line}" for line in EXAMPLES[name].splitlines())
        made[name] = kinds.add_parser(
            name,
            help=title,
            description=f"{title[0].upper()}{title[1:]}.",
            epilog=f"examples:\n{lines}",
            formatter_class=raw,
            allow_abbrev=False,
        )
    for name in ("uniform", "weighted"):
        _with_files(made[name])
        _with_batch_norm(made[name])
    made["weighted"].add_argument(
        "--weights", type=_weights, required=True, help="one for each file, as typed: 3,1,1; of one run 1-sqrt, ema:0.9"
    )
    for name in ("wise-ft", "model-stock", "arithmetic", "ties", "dare"):
        _with_files(made[name])
        made[name].add_argument("--init", type=Path, required=True, help="the initialisation of the models")
        _with_batch_norm(made[name], init=False)
    made["arithmetic"].add_argument("--scales", type=_numbers, required=True, help="one for each file: 0.5,-0.2")
    for name, density in (("ties", 0.2), ("dare", 0.1)):
        made[name].add_argument("--density", type=float, default=density, help="share of the changes that is kept")
        made[name].add_argument("--scale", type=float, default=1.0, help="what the merged changes are multiplied by")
    made["dare"].add_argument("--seed", type=int, default=0, help="of the choice of changes")
    made["wise-ft"].add_argument("--alpha", type=float, default=0.5, help="0 is the initialisation, 1 the models' mean")
    for name in ("greedy", "random-order", "with-replacement"):
        _with_files(made[name], top=False)
        _with_examples(made[name], scored=True)
        _with_batch_norm(made[name], images=False)
        if name != "with-replacement":
            made[name].add_argument(
                "--ties", default="keep", choices=("keep", "drop"), help="a model that changes nothing"
            )
        if name != "random-order":
            made[name].add_argument("--scores", help="scores of single models that are known: .json, .jsonl or .csv")
    made["random-order"].add_argument("--seed", type=int, default=0, help="of the order")
    made["with-replacement"].add_argument("--rounds", type=int, default=20, help="the most models that are added")
    learned = made["learned"]
    _with_files(learned)
    _with_examples(learned, scored=False)
    _with_batch_norm(learned, images=False)
    learned.add_argument(
        "--per", default="model", choices=("model", "layer", "tensor"), help="what shares a coefficient"
    )
    learned.add_argument("--lr", type=float, default=0.1, help="of AdamW")
    learned.add_argument("--epochs", type=int, default=3)
    learned.add_argument("--weight-decay", type=float, default=0.0)
    learned.add_argument("--place", default="stream", choices=("stream", "host", "device"), help="of the models")
    for name in made.keys() - {"lora", "export", "doctor", "verify"}:
        _with_reading(made[name])
    _with_folders(made["lora"], made["export"])
    made["doctor"].add_argument("files", nargs="+", metavar="FILE", help=FILES)
    made["doctor"].add_argument("--init", type=Path, help="the weights that the models were fine-tuned from")
    made["doctor"].add_argument("--scores", type=Path, help="a .json of held-out scores by file name")
    made["doctor"].add_argument("--held-out", type=int, metavar="N", help="number of examples that --scores are of")
    _with_tensors(made["doctor"])
    made["verify"].add_argument("soup", type=Path)
    made["verify"].add_argument("--folder", type=Path, help="where the ingredients are; by default beside the soup")
    return top


RUN: dict[str, Callable[[argparse.Namespace], None]] = dict.fromkeys(TITLES, _soup)
RUN |= {"lora": _lora, "export": _export, "doctor": _doctor, "verify": _verify}
SCORED = ("greedy", "random-order", "with-replacement", "learned")  # by held-out examples; processes share the work


def main(words: Sequence[str] | None = None) -> None:
    """The command, with the words of the command line."""
    words = list(sys.argv[1:] if words is None else words)
    if not words:
        words = ["--help"]
    arguments = _parser().parse_args(words)

    def work() -> None:
        start()
        try:
            RUN[arguments.command](arguments)
        finally:
            end()

    one_line_errors(work, several=arguments.command in SCORED)


if __name__ == "__main__":
    main()
