"""A soup as a folder that the ingredients' library loads: weights, config, tokenizer and a model card."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from soups.files.atomic import write_json
from soups.files.checkpoints import BLOCK, Checkpoint, Entry, streamed
from soups.files.dtypes import FLOATS, KINDS, STORED
from soups.files.folders import INDEX, config_beside
from soups.files.opening import opened

if TYPE_CHECKING:
    from soups.soup import Soup

Z = 1.959963984540054  # of a 95 % interval
WEIGHTS = "model.safetensors"
OPEN_CLIP = "open_clip_model.safetensors"
# What libraries read beside the weights. Lists of shards speak of the ingredient's files, and a trainer's state of how
# it was made.
COMPANIONS = re.compile(r".*\.(json|jinja|model|tiktoken|py)|(merges|vocab|special_tokens_map|bpe\.codes)\.txt")
NOT_COPIED = re.compile(r"(.*\.(index|soup)|trainer_state|all_results|train_results|eval_results|adapter_config)\.json")
SHARES = ("top1", "accuracy")  # metrics that are a share of n examples
PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForMultipleChoice": "multiple-choice",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


def complete(folder: Path, like: Path, soup: "Soup") -> None:
    """Turn a folder with model.safetensors into one that the ingredients' library loads.

    Config, tokenizer and generation settings are those of `like`, the first ingredient; weights get the name that its
    library reads, and are in shards where its are.
    """
    beside = config_beside(like, "config.json", "open_clip_config.json")
    config: dict[str, Any] = {}
    if beside is not None:
        copy_companions(beside.parent, folder)
        if (folder / "open_clip_config.json").exists():
            (folder / WEIGHTS).rename(folder / OPEN_CLIP)
        elif (folder / "config.json").exists():
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            _renew_dtype(folder, config)
            index = beside.with_name(INDEX)
            if index.exists():
                split(folder / WEIGHTS, json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    _card(folder, config, soup).write(folder)


def companions(source: Path) -> list[Path]:
    """What libraries read beside the weights of a folder: configs, tokenizers and code, which is never executed."""
    files = [file for file in sorted(source.iterdir()) if file.is_file() and COMPANIONS.fullmatch(file.name)]
    return [file for file in files if not NOT_COPIED.fullmatch(file.name)]


def copy_companions(source: Path, folder: Path) -> None:
    """Put those of one folder into another."""
    for file in companions(source):
        shutil.copyfile(file, folder / file.name)


def _renew_dtype(folder: Path, config: dict[str, Any]) -> None:
    """config.json names the kind of number that most elements of the soup are; transformers loads them as that."""
    with opened([folder / WEIGHTS]) as (soup,):
        sizes = {kind: sum(e.size for e in soup.entries.values() if e.dtype == kind) for kind in FLOATS}
    usual = KINDS[max(sizes, key=lambda kind: sizes[kind])][0]
    keys = [key for key in ("dtype", "torch_dtype") if config.get(key) not in (None, usual)]
    if keys:
        write_json(folder / "config.json", config | dict.fromkeys(keys, usual))


def split(weights: Path, places: dict[str, str]) -> None:
    """Replace a .safetensors by shards and their index; tensors go to their places, or to the last of them."""
    last = max(places.values())
    with opened([weights]) as (checkpoint,):
        files = sorted({places.get(name, last) for name in checkpoint.entries})
        shards = {file: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files)}
        where = {name: shards[places.get(name, last)] for name in checkpoint.entries}
        for i, shard in enumerate(shards.values()):
            entries = {name: entry for name, entry in checkpoint.entries.items() if where[name] == shard}
            # The record of how it was made stands in the first: readers put the metadata of all shards together.
            _copy(checkpoint, entries, weights.with_name(shard), checkpoint.metadata if i == 0 else {"format": "pt"})
        total = sum(entry.size * STORED[entry.dtype].itemsize for entry in checkpoint.entries.values())
        listed = {name: where[name] for name in sorted(where)}
        write_json(weights.with_name(INDEX), {"metadata": {"total_size": total}, "weight_map": listed})
    weights.unlink()


def _copy(checkpoint: Checkpoint, entries: dict[str, Entry], path: Path, metadata: dict[str, str]) -> None:
    buffer = np.empty(8 * BLOCK, np.uint8)
    with streamed(path, entries, lambda: metadata) as write:
        for name in entries:
            start = 0
            for block in checkpoint.blocks(name, buffer):
                write(name, start, block)
                start += len(block)


def interval(correct: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of the share of n examples, at least 1, that are right, taken as independent.

    >>> [round(x, 4) for x in interval(50, 100)]
    [0.4038, 0.5962]
    """
    p = correct / n
    middle, half = p + Z**2 / (2 * n), Z * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + Z**2 / n)), min(1.0, (middle + half) / (1 + Z**2 / n))


@dataclass(frozen=True)
class Card:
    """README.md with the front matter that Hugging Face's hub reads."""

    title: str
    library: str  # as the hub calls it
    recipe: str
    about: str  # a sentence or two on network and classes
    use: str  # Python that loads the folder
    sections: dict[str, list[str]]  # heading -> lines, in order
    pipeline: str = ""  # the hub's name of the task; empty where it is not known
    licence: str = "other"  # of the weights, as the hub names licences
    results: Sequence[dict[str, Any]] = ()  # of the front matter's model-index
    more: dict[str, Any] = field(default_factory=dict)  # further front matter

    def write(self, folder: Path) -> None:
        """README.md in a folder."""
        matter: dict[str, Any] = {"license": self.licence, "library_name": self.library}
        if self.pipeline:
            matter["pipeline_tag"] = self.pipeline
        matter |= {"tags": ["model-soup", f"recipe:{self.recipe}"], **self.more}
        if self.results:
            matter["model-index"] = [{"name": self.title, "results": list(self.results)}]
        # JSON is YAML too, and needs no library to be written.
        front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in matter.items())
        lines = [f"# {self.title}", "", f"A model soup, recipe `{self.recipe}`: the average of the weights of"]
        lines[-1] += f" fine-tuned models (Wortsman et al., ICML 2022). {self.about}"
        sections = {"Use": ["```python", self.use.strip(), "```"], **self.sections}
        for heading, text in sections.items():
            lines += ["", f"## {heading}", "", *text]
        (folder / "README.md").write_text(f"---\n{front}---\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _card(folder: Path, config: dict[str, Any], soup: "Soup") -> Card:
    made = (config.get("architectures") or [""])[0]
    pipeline = next((name for end, name in PIPELINES.items() if made.endswith(end)), "")
    if (folder / "open_clip_config.json").exists():
        library, pipeline = "open_clip", "zero-shot-image-classification"
        use = 'import open_clip\n\nmodel, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")'
    elif made:
        library = "transformers"
        use = f'from transformers import {made}\n\nmodel = {made}.from_pretrained("FOLDER")'
    elif "architecture" in config:
        library, pipeline = "timm", "image-classification"
        use = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'
    else:
        library = "pytorch"
        use = f'from safetensors.torch import load_file\n\nweights = load_file("FOLDER/{WEIGHTS}")'
    table = ["| ingredient | share | alone |", "|---|---|---|"]
    for name in sorted(soup.names, key=lambda name: name not in soup.shares):
        share = _number(soup.shares[name], "by tensor") if name in soup.shares else "left out"
        table.append(f"| {name} | {share} | {_number(soup.alone.get(name), '')} |")
    licence = (
        "The licence of the weights is set by whoever publishes them. They come from the pretrained weights and the "
        "data of the ingredients, whose licences hold for what is made of them."
    )
    title, sections = f"{soup.recipe} soup of {len(soup.shares)} models", {"Ingredients": table, "Score": _score(soup)}
    about = f"Network: {made or config.get('architecture') or 'as the ingredients'}."
    return Card(title, library, soup.recipe, about, use, sections | {"Licence": [licence]}, pipeline)


def _number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.4g}"


def _score(soup: "Soup") -> list[str]:
    if soup.score is None:
        return ["It was not evaluated."]
    line = f"{soup.metric} {soup.score:.4g}"
    if soup.n is not None:
        line += f" on n = {soup.n:,} examples"
        if soup.metric in SHARES:
            low, high = interval(soup.score * soup.n, soup.n)
            line += f" (95 % interval {low:.4g} to {high:.4g}, Wilson's, which takes examples as independent)"
    lines = [line + ". The same examples selected the ingredients: test it on others."]
    if soup.gain is not None:
        ends = soup.gain.low, soup.gain.high
        interval_text = "" if None in ends else " (95 % interval {:+.4g} to {:+.4g}, paired)".format(*ends)
        lines += ["", f"Over the best single model: {soup.gain.mean:+.4g}{interval_text}."]
    if soup.report is not None:
        counted = "" if soup.report.n is None else f" of n = {soup.report.n:,}"
        lines += ["", f"On examples{counted} that selected nothing: {soup.metric} {soup.report.score:.4g}."]
    return lines
