"""The words of the command `soups`: each command, what it is for, examples of it, and its settings."""

import argparse
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from soups.errors import UserError

EXPLAINED = """
uniform: the equal-weight mean of all models
  soups uniform run/*.safetensors --out soup.safetensors
  soups uniform run/checkpoint-* --last 3 --out soup
  soups uniform run/checkpoint-* --top 2 --by eval_loss --goal min --out soup
  soups uniform run/checkpoint-* --keep '^classifier' --from run/checkpoint-1 --out soup
weighted: the mean with a weight for each model
  soups weighted a.pt b.pt --weights 3,1 --out soup.pt
  soups weighted run/checkpoint-* --weights 1-sqrt --out soup
wise-ft: between the initialisation and the mean of the models
  soups wise-ft run/*.safetensors --init start.safetensors --alpha 0.5 --out soup.safetensors
greedy: add models best-first, keeping each one that does not make the score worse (Recipe 1)
  soups greedy run/*.ckpt --score 'python eval.py {soup}' --goal max --out soup.safetensors
  soups greedy run/*.pt --score 'python eval.py {soup}' --report 'python eval.py --test {soup}' --goal max --out s.pt
  soups greedy run/*.safetensors --score my_eval:accuracy --goal max --out soup.safetensors
  soups greedy run/*.safetensors --images held_out --network timm:resnet50 --out soup.safetensors
  soups greedy run/*.safetensors --images held_out --report test --min-sigma 1 --network timm:resnet50 --out soup.pt
  soups greedy run/checkpoint-* --texts held_out.tsv --out soup
  soups greedy llama-*/ --perplexity held_out.txt --out soup
  soups greedy llama-*/ --choices questions.jsonl --out soup
  torchrun --nproc-per-node 8 -m soups greedy run/*.safetensors --images held_out --network timm:resnet50 --out s.pt
random-order: the same in a random order, scoring no model alone but the first
  soups random-order run/*.pt --score my_eval:loss --goal min --seed 1 --out soup.pt
with-replacement: add the model that helps most, again and again; one added twice weighs twice
  soups with-replacement run/*.pt --score my_eval:loss --goal min --rounds 10 --out soup.pt
learned: learn how much each model weighs by gradient descent on held-out examples
  soups learned run/*.safetensors --images held_out --network timm:resnet50 --per layer --out s.pt
model-stock: between the initialisation and the mean, as the angles between models say; needs no examples
  soups model-stock run/*.safetensors --init start.safetensors --out soup.safetensors
arithmetic: the initialisation plus scaled changes of the models; scales may be negative
  soups arithmetic run/*.pt --init start.pt --scales 0.5,-0.2 --out soup.safetensors
ties: trimmed changes that agree in sign, added to the initialisation
  soups ties run/*.safetensors --init start.safetensors --density 0.2 --out soup.safetensors
dare: random parts of the changes, scaled up, added to the initialisation
  soups dare run/*.safetensors --init start.safetensors --density 0.1 --out soup.safetensors
slerp: two models on the great circle between them, tensor by tensor
  soups slerp a.pt b.pt --t 0.3 --out soup.pt
lora: one LoRA adapter whose update is the mean of the adapters' updates, or with --base the dense model
  soups lora adapters/* --out adapter
  soups lora adapters/* --rank 4 --out adapter
  soups lora adapters/* --base llama --out model
  soups greedy adapters/* --score 'python eval.py {soup}' --goal max --out adapter
  soups greedy adapters/* --base llama --perplexity held_out.txt --out model
export: a soup as a folder that timm, open_clip, transformers or ONNX loads
  soups export soup.safetensors --to timm --network timm:resnet50 --out exported
doctor: whether models belong in one soup, and whether it is likely to be better than the best of them
  soups doctor run/*.safetensors --init start.safetensors
  soups doctor run/*.safetensors --scores scores.json --held-out 616
make: make the soup of a recipe in a file: yours, mergekit's, or the one that lies beside a soup
  soups make recipe.yaml
  soups make soup.safetensors.recipe.yaml --folder run --out again.safetensors
  soups make mergekit.yaml --out merged --allow-unrelated
verify: make a soup again from its ingredients and compare every byte
  soups verify soup.safetensors --folder run
"""
# Of each command what it is for, and examples, which a test runs.
COMMANDS = {name: (title, lines) for name, title, lines in re.findall(r"^(\S+): (.+)\n((?:  .+\n)+)", EXPLAINED, re.M)}
OTHERS = ("export", "doctor", "make", "verify")  # which are no recipes
SCORED = ("greedy", "random-order", "with-replacement", "learned")  # by held-out examples; processes share the work
HAVE_START = ("wise-ft", "model-stock", "arithmetic", "ties", "dare")  # an initialisation
FILES = "weight files, folders of save_pretrained, or patterns in quotes; run2 comes before run10"
METRICS = ("top1", "macro_f1", "matthews", "accuracy_and_f1")
REPORT = (
    "examples that select nothing, by which the soup is compared with the best single model: of the kind of the "
    "held-out ones, a command, folder or file"
)
SCORE = (
    "prints a number as its last line for {soup}, and may write that of each example to {soup}.jsonl; or "
    "module:function"
)
FORCE = "overwrite --out if it is a file that is there"
BASE = "of LoRA adapters: the model, file or folder, into which each is merged, so that the soup is a whole model"


class Parser(argparse.ArgumentParser):
    """Wrong words are one line, as all that a person can mend."""

    def error(self, message: str) -> NoReturn:
        """Raise what the commands print, with the nearest word where one of a few was meant."""
        wrong, _, right = message.partition(" (choose from ")
        near = get_close_matches(wrong.rpartition(": ")[2].strip("'"), re.findall(r"[\w-]+", right), 1)
        meant = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"{message}{meant}; {self.prog} --help has the settings and examples")


def _numbers(text: str, or_else: str = "") -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        line = f"write numbers with commas between them, as in 3,1; got {text!r}{or_else}"
        raise argparse.ArgumentTypeError(line) from None


def _weights(text: str) -> list[float] | str:
    if text in ("uniform", "1-sqrt") or text.startswith("ema:"):
        return text
    return _numbers(text, "; along one run 1-sqrt or ema:0.9")


def _one_or_more(text: str) -> float | list[float]:
    values = _numbers(text)
    return values[0] if len(values) == 1 else values


def _with_files(parser: Parser, *, top: bool = True) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=FILES)
    add("--last", type=int, metavar="N", help="of one run: its last N files, by the numbers in names")
    if top:
        add("--top", type=int, metavar="N", help="of one run: its best N files, by --by")
        add("--by", metavar="SCORES", help="a .json, .jsonl or .csv by file, or a metric of trainer_state.json")
        add("--goal", dest="by_goal", choices=("max", "min"), default="", help="of --by")
    add("--out", type=Path, required=True, help="a .safetensors, .pt, .pth or .ckpt file, or a folder")
    add("--force", action="store_true", help=FORCE)


def _with_tensors(parser: Parser) -> "argparse._ArgumentGroup":
    group = parser.add_argument_group("what is averaged")
    group.add_argument("--key", help="which state dict, where a file has several: state_dict, ema, ...")
    names = "tensors with such names are those of --from"
    group.add_argument("--keep", "--exclude", dest="exclude", metavar="REGEX", help=names)
    common = "average what all models have; other tensors are the first model's, or dropped"
    group.add_argument("--only-common", action="store_true", help=common)
    return group


def _with_reading(parser: Parser) -> None:
    add = _with_tensors(parser).add_argument
    kept = "the model whose tensors are kept where they are not averaged; by default the first"
    add("--from", type=Path, dest="kept_from", metavar="FILE", help=kept)
    add("--dtype", default="keep", choices=("keep", "F64", "F32", "F16", "BF16"), help="that is written")
    add("--allow-unrelated", action="store_true", help="models not fine-tuned from one checkpoint, too")
    add("--threads", type=int, default=2, choices=range(1, 65), metavar="N", help="that read and add")
    add("--base", metavar="MODEL", help=BASE)


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
    one, add = group.add_mutually_exclusive_group(required=True), group.add_argument
    if scored:
        one.add_argument("--score", metavar="COMMAND", help=SCORE)
    else:
        one.add_argument("--loss", metavar="MODULE:FUNCTION", help="a function; returns network, batches, loss")
    one.add_argument("--images", type=Path, metavar="DIR", help="a folder of images for each class")
    one.add_argument("--texts", type=Path, metavar="FILE", help="labelled texts: .tsv, .csv or .jsonl")
    one.add_argument("--perplexity", type=Path, metavar="FILE", help="a text, or a .jsonl with a text in each line")
    if scored:
        lines = "multiple choice: a .jsonl with prompt, choices, answer"
        one.add_argument("--choices", type=Path, metavar="FILE", help=lines)
        add("--goal", choices=("max", "min"), help="of --score: whether it is to be high or low")
        add("--journal", type=Path, help="a file of scores as they come; by default beside --out")
        add("--metric", help=f"of classes: {', '.join(METRICS)}; of {{soup}}.jsonl: which of its metrics")
        add("--report", metavar="WHAT", help=REPORT)
        sigma = "add a model only if its gain is Z or more sigma"
        add("--min-sigma", type=float, default=0.0, metavar="Z", help=sigma)
        add("--per-token", action="store_true", help="of --choices: mean likelihoods of a token, not sums")
    _with_network(group)
    add("--templates", choices=("openai", "name"), help="of open_clip without a head: around class names")
    add("--columns", help="of --texts: what is read, such as text or premise,hypothesis")
    add("--label", help="of --texts: the column of class numbers or names")
    add("--max-length", type=int, help="of texts: tokens")


def _with_settings(made: dict[str, Parser]) -> None:
    """What a recipe has beside the settings of all."""
    along = "one for each file, as typed: 3,1,1; of one run 1-sqrt, ema:0.9"
    made["weighted"].add_argument("--weights", type=_weights, required=True, help=along)
    made["arithmetic"].add_argument("--scales", type=_numbers, required=True, help="one for each file: 0.5,-0.2")
    share = "share of the changes that is kept; or one for each file, as typed: 0.2,0.5"
    for name, density in (("ties", 0.2), ("dare", 0.1)):
        made[name].add_argument("--density", type=_one_or_more, default=density, help=share)
        made[name].add_argument("--scale", type=float, default=1.0, help="what the merged changes are multiplied by")
    made["dare"].add_argument("--seed", type=int, default=0, help="of the choice of changes")
    made["dare"].add_argument("--scales", type=_numbers, help="one for each file, as typed; equal if left out")
    sums = "what is left is divided by the density, or scaled to the sum of magnitudes of each tensor's changes (l1)"
    made["dare"].add_argument("--rescale", default="density", choices=("density", "l1", "none"), help=sums)
    made["ties"].add_argument("--weights", type=_numbers, help="one for each file, as typed; equal if left out")
    ranked = "changes that are ranked together; tensor is mergekit's way"
    made["ties"].add_argument("--per", default="model", choices=("model", "tensor"), help=ranked)
    divided = "divide by the sum of weights, or leave the weighted sum"
    for name in ("weighted", "ties"):
        made[name].add_argument("--normalize", action=argparse.BooleanOptionalAction, default=True, help=divided)
    made["slerp"].add_argument("--t", type=float, default=0.5, help="0 is the first file, 1 the second")
    made["wise-ft"].add_argument("--alpha", type=float, default=0.5, help="0 is the initialisation, 1 the models' mean")
    for name in ("greedy", "random-order"):
        ties = ("keep", "drop")
        made[name].add_argument("--ties", default="keep", choices=ties, help="a model that changes nothing")
    for name in ("greedy", "with-replacement"):
        known = "scores of single models that are known: .json, .jsonl or .csv"
        made[name].add_argument("--scores", help=known)
    made["random-order"].add_argument("--seed", type=int, default=0, help="of the order")
    made["with-replacement"].add_argument("--rounds", type=int, default=20, help="the most models that are added")
    add = made["learned"].add_argument
    add("--per", default="model", choices=("model", "layer", "tensor"), help="what shares a coefficient")
    add("--lr", type=float, default=0.1, help="of AdamW")
    add("--epochs", type=int, default=3)
    add("--weight-decay", type=float, default=0.0)
    add("--place", default="stream", choices=("stream", "host", "device"), help="of the models")


def _with_others(made: dict[str, Parser]) -> None:
    """Commands that average no files, or in another way."""
    add = made["lora"].add_argument
    _with_files(made["lora"])
    add("--weights", type=_numbers, help="one for each folder, as typed; equal if left out")
    add("--rank", type=int, help="of the soup; left out it is the sum of theirs, which is exact")
    add("--base", metavar="MODEL", help=f"{BASE}; DoRA needs it")
    add = made["export"].add_argument
    add("soup", type=Path, help="a file or a folder that a recipe wrote, or any weights")
    add("--to", required=True, choices=("timm", "open_clip", "transformers", "onnx"))
    add("--out", type=Path, required=True, help="a folder that is not there yet")
    network = "timm:NAME, open_clip:NAME or transformers:FOLDER; not needed where a config lies beside the soup"
    add("--network", help=network)
    add("--classes", metavar="NAMES", help="of the head, in its order, with commas between them")
    add("--license", default="other", help="of the weights, as the hub names licences")
    add = made["doctor"].add_argument
    add("files", nargs="+", metavar="FILE", help=FILES)
    add("--init", type=Path, help="the weights that the models were fine-tuned from")
    add("--scores", type=Path, help="held-out accuracies: .json, .jsonl or .csv")
    add("--held-out", type=int, metavar="N", help="number of examples that --scores are of")
    _with_tensors(made["doctor"])
    add = made["make"].add_argument
    add("recipe", type=Path, help="a yaml; more settings of its recipe may be typed behind it")
    add("--out", type=Path, help="as of the recipe; needed where the file names none")
    add("--folder", type=Path, help="where the models are; by default beside the file")
    add("--force", action="store_true", help=FORCE)
    made["verify"].add_argument("soup", type=Path)
    made["verify"].add_argument("--folder", type=Path, help="where the ingredients are; by default beside the soup")


def parser_of(description: str | None) -> Parser:
    """All commands and their settings."""
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser("soups", description=description, formatter_class=raw, allow_abbrev=False)
    kinds = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    made = {}
    for name, (title, examples) in COMMANDS.items():
        about, more = f"{title[0].upper()}{title[1:]}.", f"examples:\n{examples.rstrip()}"
        made[name] = kinds.add_parser(
            name, help=title, description=about, epilog=more, formatter_class=raw, allow_abbrev=False
        )
    recipes = made.keys() - {"lora", *OTHERS}
    for name in recipes:
        has_start, scored = name in HAVE_START, name in SCORED
        _with_files(made[name], top=not scored or name == "learned")
        if has_start:
            made[name].add_argument("--init", type=Path, required=True, help="the initialisation of the models")
        if scored:
            _with_examples(made[name], scored=name != "learned")
        _with_batch_norm(made[name], init=not has_start, images=not scored)
    _with_settings(made)
    for name in recipes:
        _with_reading(made[name])
    _with_others(made)
    return top
