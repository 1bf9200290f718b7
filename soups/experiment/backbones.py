"""Soups of backbones on a data set that none of them was trained on (Appendix E), zero-shot by class names.

    python -m soups.experiment.backbones name=mine model=clip_vit_b32 task=cifar100 \
      'towers=[runs/figuree1_dtd/ingredients/001,runs/figuree1_cars/ingredients/001]'

Reads   the pretrained model, the weights of the rows named in `towers`, in the order in which they are added
Writes  runs/<name>/backbones.csv: of the pretrained model and of each average of it with the first 1, 2, ... towers
        (and of each tower alone) the accuracies with the same zero-shot head, for every split that reports
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.significance import paired_bootstrap
from soups.average import Average
from soups.files.atomic import read_json, replacing
from soups.files.weights import Weights, digest, load_weights
from store.runs import RunFolder
from tasks.load import class_names

HEAD = ("head.weight", "head.bias")


def read_tower(folder: Path, like: Weights) -> dict[str, Tensor]:
    """A row's tower under the head of `like`; a `UserError` for no finished row, or a tower of another network."""
    record = folder / "done.json"
    if not record.exists() or read_json(record)["status"] != "done":
        raise UserError(f"towers: {folder} holds no finished row; it is a folder as runs/NAME/ingredients/001")
    weights = load_weights(folder / "weights.safetensors", read_json(record)["digest"])
    weights |= {name: like[name] for name in HEAD}
    wrong = [
        name
        for name in sorted(weights.keys() | like.keys())
        if name not in weights or name not in like or weights[name].shape != like[name].shape
    ]
    if wrong:
        raise UserError(f"towers: {folder} is not of the network that model= names; {wrong[0]!r} differs")
    return weights


def pools(start: Weights, folders: tuple[Path, ...]) -> Iterator[tuple[str, int, Weights]]:
    """What is measured: name, how many models it averages, weights. One tower and one sum are in memory at a time."""
    yield "zero-shot", 1, start
    total = Average().plus(start)
    for folder in folders:
        tower = read_tower(folder, start)
        yield f"{folder}", 1, tower
        total = total.plus(tower)
        yield f"zero-shot + {total.count - 1} towers", total.count, total.weights()


def measure(config: Experiment) -> pd.DataFrame:
    """One row for each pool and split: correct, n, accuracy, difference to zero-shot with its interval; fractions."""
    if not config.towers or config.model.head != "zero_shot":
        raise UserError("name rows in towers=[runs/NAME/ingredients/001,...], and set model.head=zero_shot")
    from models.classifier import pretrained  # noqa: PLC0415  # seconds that reading towers need not wait for

    evaluator = Evaluator(config)
    start = pretrained(config.model, class_names(config.task)).state_dict()
    rows: list[dict[str, Any]] = []
    baseline: dict[str, Tensor] = {}
    for name, models, weights in pools(start, config.towers):
        read: Callable[[], Weights] = partial(dict, weights)
        logits = {split: evaluator.logits(digest(weights), read, split) for split in config.task.reported}
        for split, found in logits.items():
            hits = evaluator.hits(found, split)
            gain = paired_bootstrap(
                [hits],
                [baseline.setdefault(split, hits)],
                [torch.arange(len(hits))],
                resamples=config.analysis.resamples,
                seed=config.analysis.seed,
            )
            rows.append(
                {
                    "pool": name,
                    "models": models,
                    "split": split,
                    "correct": int(hits.sum()),
                    "n": len(hits),
                    "accuracy": hits.double().mean().item(),
                    "difference": gain.mean,
                    "low": gain.low,
                    "high": gain.high,
                }
            )
    return pd.DataFrame(rows)


def run(config: Experiment) -> None:
    """Measure, write and print."""
    table = measure(config)
    path = RunFolder.of(config).root / "backbones.csv"
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.8f")
    for row in table.to_dict("records"):
        gain = "difference {difference:+.1%} [{low:+.1%}, {high:+.1%}]".format(**row)
        print("{pool}: {split} {accuracy:.1%} (n = {n}), ".format(**row) + gain)
    print(path)


if __name__ == "__main__":
    from configs.cli import entry_point

    entry_point(run)()
