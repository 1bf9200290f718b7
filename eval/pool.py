"""Every model of an experiment on every split, into the logits cache."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.errors import UserError
from configs.schema import Experiment
from eval.calibration import reliability_bins
from eval.forward import Evaluator
from eval.metrics import nll, topk
from soups.files.atomic import read_json, read_jsonl, write_jsonl
from store.processes import Processes, end_processes, first_decides, start_processes
from store.rows import identity
from store.runs import WEIGHTS, RunFolder, done_rows, finished, weights_of
from store.staging import staged
from store.workers import spread, use_threads


def evaluate(config: Experiment, folder: Path, processes: Processes | None = None) -> str:
    """Logits of one model on the held-out, test and shift splits, and scores.jsonl beside it; returns one line."""
    evaluator, task = Evaluator(config, processes), config.task
    weights = first_decides(lambda: recorded_weights(config, folder), evaluator.processes)
    if not weights:
        raise UserError(f"{folder} holds no finished model: run python -m finetune or python -m soups first")
    rows = [row for file, digest in weights.items() for row in _scores(evaluator, folder / file, digest)]
    first_decides(lambda: write_jsonl(folder / "scores.jsonl", rows), evaluator.processes)
    first = rows[: len(rows) // len(weights)]  # those of weights.safetensors
    scores = {row["split"]: row["score"] for row in first if row["metric"] not in task.annotations}
    line = f"{folder.relative_to(RunFolder.of(config).root)}: {task.test} {100 * scores[task.test]:.1f} %"
    if task.shifts:
        line += f", mean of shifts {100 * sum(scores[split] for split in task.shifts) / len(task.shifts):.1f} %"
    return line


def _scores(evaluator: Evaluator, file: Path, digest: str) -> list[dict[str, Any]]:
    task, rows, annotated = evaluator.config.task, [], {}
    _ = evaluator.annotations  # damaged ones are refused before any forward pass
    for split in (task.held_out, *task.reported):
        logits = evaluator.logits_of_file(digest, file, split)
        right, n = evaluator.count(logits, split)
        seen, labels = evaluator.projected(logits, split), evaluator.split(split).labels
        row = {"weights": digest, "split": split, "correct": right, "n": n, "top1": right / n}
        row |= {"top5": topk(seen, labels, min(5, seen.shape[1])), "nll": nll(seen, labels)}
        row |= {"ece": reliability_bins(seen, labels).ece, "metric": task.metrics.get(split, "top1")}
        rows.append(row | {"score": evaluator.score(logits, split)})
        if split == task.test:
            annotated = evaluator.annotated(logits)
    for name, found in annotated.items():
        right, n = int(found.right.sum()), len(found.right)
        row = {"weights": digest, "split": task.test, "correct": right, "n": n, "top1": right / n}
        rows.append(row | {"metric": name, "score": found.accuracy})
    return rows


def recorded_weights(config: Experiment, folder: Path) -> dict[str, str]:
    """File -> digest of a finished model's weights, and of those beside them that single models are chosen from."""
    record = next((path for path in (folder / "done.json", folder / "soup.json") if path.exists()), None)
    done = read_json(record) if record else {}
    if not done.get("digest"):
        return {}
    kinds = weights_of(done).items()
    return {WEIGHTS: done["digest"]} | {f: made["digest"] for k, (f, made) in kinds if k in config.cooking.individuals}


def is_scored(config: Experiment, folder: Path) -> bool:
    """Whether scores.jsonl is there and scores the weights that are there now."""
    scores, weights = folder / "scores.jsonl", recorded_weights(config, folder)
    return scores.exists() and {row["weights"] for row in read_jsonl(scores)} == set(weights.values())


def model_folders(config: Experiment) -> list[Path]:
    """Folders of all finished models with weights: rows, the zero-shot model, soups; only this job's, where jobs share.

    An unfinished row keeps its place among them, so that jobs that share them agree on who has which.
    """
    run, share = RunFolder.of(config), config.share
    done_rows(config)
    finished(run.zero_shot, identity(config, 0))
    rows = [run.ingredient(row) for row in range(config.sweep.size + 1)]
    soups = sorted(path.parent for path in (run.root / "soups").rglob("soup.json"))
    folders = [*rows, run.zero_shot, *soups][share.index :: share.of]
    return [folder for folder in folders if recorded_weights(config, folder)]


def evaluate_all(config: Experiment, folders: Sequence[Path], console: Console | None = None) -> None:
    """Evaluate the models without scores yet, over the cluster's worker processes."""
    missing = [folder for folder in folders if not is_scored(config, folder)]
    spread(
        f"evaluating {len(missing)} models",
        [partial(evaluate, config, folder) for folder in missing],
        workers=config.cluster.workers,
        threads=config.cluster.threads,
        units=len(missing),
        done_units=lambda: sum(is_scored(config, folder) for folder in missing),
        report=str,
        console=console or Console(),
    )


def evaluate_here(config: Experiment) -> None:
    """Evaluate all finished models over worker processes, or one by one by all processes that torchrun started."""
    use_threads(config.cluster.threads)
    config, processes = staged(config), start_processes()
    folders = first_decides(lambda: model_folders(config), processes)
    root = RunFolder.of(config).root
    if not folders and config.share.of == 1:
        raise UserError(f"no finished model in {root}: run python -m finetune first")
    if processes.world == 1:
        evaluate_all(config, folders)
    else:
        for folder in first_decides(lambda: [each for each in folders if not is_scored(config, each)], processes):
            line = evaluate(config, folder, processes)
            if processes.is_main:
                print(line, flush=True)
        end_processes()
    if processes.is_main:
        print(f"{len(folders)} models evaluated. Next: python -m soups run={root}, then python -m analysis run={root}")
