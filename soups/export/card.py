"""The model card of an export: README.md with the front matter that Hugging Face's hub reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import binomtest

from configs.exporting import Target
from soups.export.source import Part, Source

LIBRARY: dict[Target, str] = {"timm": "timm", "open_clip": "open_clip", "transformers": "transformers", "onnx": "onnx"}
METRICS = {"top1": "accuracy", "matthews": "matthews_correlation", "macro_f1": "f1"}


def interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, in [0, 1].

    Args:
        correct: examples that are right.
        n: examples, at least 1, taken as independent.
        level: of confidence.

    Source: Wilson 1927, as scipy computes it.

    >>> [round(x, 4) for x in interval(50, 100)]
    [0.4038, 0.5962]
    """
    found = binomtest(correct, n).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def _dataset(source: Source) -> str:
    task = source.task
    if task is None:
        return "images of one's own"
    return task.subset or (task.kind if task.kind in ("emoji", "sentiment") else task.folder.name)


def front_matter(source: Source, to: Target, licence: str) -> dict[str, Any]:
    """What the hub shows and searches."""
    text = source.model.is_reader
    matter: dict[str, Any] = {
        "license": licence,
        "library_name": LIBRARY[to],
        "pipeline_tag": "text-classification" if text else "image-classification",
        "tags": ["model-soup", f"recipe:{source.recipe}"],
    }
    if source.model.kind not in ("timm", "open_clip") and source.model.name and "/" in source.model.name:
        matter["base_model"] = source.model.name
    results = [
        {
            "task": {"type": matter["pipeline_tag"]},
            "dataset": {"name": _dataset(source), "type": _dataset(source), "split": row["split"]},
            "metrics": [{"type": METRICS.get(row["metric"], row["metric"]), "value": round(row["score"], 4)}],
        }
        for row in source.scores
    ]
    if results:
        matter["model-index"] = [{"name": source.title, "results": results}]
    return matter


def _scores(source: Source) -> list[str]:
    if not source.scores:
        held_out = f" Its ingredients were chosen on {source.held_out_images} labelled images."
        return ["It was not evaluated here." + (held_out if source.held_out_images else "")]
    assert source.task is not None
    role = {source.task.held_out: "selected on", source.task.test: "test"}
    lines = ["| split | role | metric | score | top-1 | 95 % interval of top-1 | n |", "|---|---|---|---|---|---|---|"]
    for row in source.scores:
        low, high = interval(row["correct"], row["n"])
        lines.append(
            f"| {row['split']} | {role.get(row['split'], 'shift')} | {row['metric']} | {row['score']:.4f} "
            f"| {100 * row['top1']:.1f} % | {100 * low:.1f} to {100 * high:.1f} % | {row['n']:,} |"
        )
    return [*lines, "", "Intervals are Wilson's, which take examples as independent. Held-out chose the ingredients."]


def _part(part: Part) -> str:
    share = "by tensor" if part.weight is None else f"{part.weight:.4g}"
    held_out = "" if part.held_out is None else f"{100 * part.held_out:.1f} %"
    drawn = ", ".join(f"{name}={_short(value)}" for name, value in part.drawn.items())
    return f"| {part.name} | {share} | {held_out} | {drawn} |"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ingredients(source: Source) -> list[str]:
    if not source.parts:
        return ["One fine-tuned model, not an average." if source.task else "The file does not record them."]
    head = ["| ingredient | share | held-out | settings |", "|---|---|---|---|"]
    return head + [_part(part) for part in source.parts if part.weight != 0]


def _proxies(source: Source) -> list[str]:
    named = [("model", source.model.proxy_for), ("benchmark", source.task.proxy_for if source.task else None)]
    lines = [f"- The {what} stands in the place of the paper's: a proxy for {name}." for what, name in named if name]
    return lines or ["- No proxy: model and data are what they are called."]


def _licence(source: Source, licence: str) -> str:
    start = source.model.name or source.model.kind
    said = "is set by whoever publishes it" if licence == "other" else f"was set to {licence} by whoever exported it"
    text = (
        f"The licence of the weights {said}. They come from the pretrained weights {start} and from the data "
        f"{_dataset(source)}, whose licences hold for what is made of them."
    )
    return text + (" DATA_LICENSES.md of the code lists those of the icons." if _dataset(source) == "emoji" else "")


def write_card(source: Source, to: Target, licence: str, use: str, folder: Path) -> None:
    """README.md: front matter, how to load it, recipe, ingredients, scores, proxies, licence, provenance.

    Args:
        source: what was exported.
        to: the library.
        licence: of the weights, as the hub names licences.
        use: Python that loads the folder and computes logits.
        folder: where it goes.
    """
    matter = yaml.safe_dump(front_matter(source, to, licence), sort_keys=False, allow_unicode=True)
    body = [
        f"# {source.title}",
        "",
        f"A model soup, recipe `{source.recipe}`: the average of the weights of fine-tuned models (Wortsman et "
        f"al., ICML 2022). Network: {source.model.name or source.model.kind}; {len(source.class_names)} classes.",
        "",
        "## Use",
        "",
        f"```python\n{use.strip()}\n```",
        "",
        "## Ingredients",
        "",
        *_ingredients(source),
        "",
        "## Scores",
        "",
        *_scores(source),
        "",
        "## What was a proxy",
        "",
        *_proxies(source),
        "",
        "## Licence",
        "",
        _licence(source, licence),
        "",
        "## Provenance",
        "",
        *_provenance(source.provenance),
        "",
    ]
    (folder / "README.md").write_text(f"---\n{matter}---\n\n" + "\n".join(body), encoding="utf-8")


def _provenance(record: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    commit = record.get("commit")
    lines = [f"- commit {commit}{', with changes' if record.get('modified') else ''}"] if commit else []
    return [*lines, f"- cooked with {versions}"] if versions else lines or ["- not recorded"]
