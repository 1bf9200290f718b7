"""Every model of an experiment on every split, into the logits cache."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from configs.errors import UserError
from configs.schema import Experiment
from eval.calibration import expected_calibration_error
from eval.forward import Count, Evaluator
from eval.metrics import nll, topk
from store.atomic import read_json, read_jsonl, write_jsonl
from store.processes import Processes, wait_for_all
from store.runs import RunFolder
from store.workers import spread


def evaluate(config: Experiment, folder: Path, processes: Processes | None = None) -> str:
    """Logits of one model on the held-out, test and shift splits, and scores.jsonl beside it; returns one line.

    Args:
        config: of the experiment.
        folder: of the model.
        processes: that do it together; one of them writes the scores.

    Raises:
        UserError: missing or damaged weights, logits or data.
    """
    evaluator, task = Evaluator(config, processes), config.task
    digest = recorded_digest(folder)
    if digest is None:
        raise UserError(f"{folder} holds no finished model: run python -m finetune or python -m soups first")
    rows, scores = [], {}
    annotated: dict[str, Count] = {}
    for split in (task.held_out, *task.reported):
        logits = evaluator.logits_of_file(digest, folder / "weights.safetensors", split)
        count, scores[split] = evaluator.count(logits, split), evaluator.score(logits, split)
        seen, labels = evaluator.projected(logits, split), evaluator.split(split).labels
        row = {"weights": digest, "split": split, "correct": count.correct, "n": count.n, "top1": count.top1}
        if split == task.test:
            annotated = evaluator.annotated(logits)
        row |= {"top5": topk(seen, labels, min(5, seen.shape[1])), "nll": nll(seen, labels)}
        row |= {"ece": expected_calibration_error(seen, labels)}
        rows.append(row | {"metric": task.metrics.get(split, "top1"), "score": scores[split]})
    for name, count in annotated.items():
        row = {"weights": digest, "split": task.test, "correct": count.correct, "n": count.n, "top1": count.top1}
        rows.append(row | {"metric": name, "score": count.top1})
    if evaluator.processes.writes:
        write_jsonl(folder / "scores.jsonl", rows)
    line = f"{folder.relative_to(RunFolder.of(config).root)}: {task.test} {100 * scores[task.test]:.1f} %"
    if task.shifts:
        line += f", mean of shifts {100 * sum(scores[split] for split in task.shifts) / len(task.shifts):.1f} %"
    return line


def recorded_digest(folder: Path) -> str | None:
    """The digest of a finished model's weights, from the record written last; None where there are no weights."""
    record = next((path for path in (folder / "done.json", folder / "soup.json") if path.exists()), None)
    return read_json(record)["digest"] if record else None


def is_scored(folder: Path) -> bool:
    """Whether scores.jsonl is there and of the weights that are there now."""
    scores = folder / "scores.jsonl"
    return scores.exists() and {row["weights"] for row in read_jsonl(scores)} == {recorded_digest(folder)}


def model_folders(config: Experiment) -> list[Path]:
    """Folders of all finished models with weights: rows, the zero-shot model, soups; of a share, those that are in it.

    A row has its place among them whether or not it is finished, so that jobs that share them agree on who has which.
    """
    run, share = RunFolder.of(config), config.share
    rows = [run.ingredient(row) for row in range(config.sweep.size + 1)]
    soups = sorted(path.parent for path in (run.root / "soups").rglob("soup.json"))
    return [folder for folder in [*rows, run.zero_shot, *soups][share.index :: share.of] if recorded_digest(folder)]


def evaluate_all(config: Experiment, folders: Sequence[Path], console: Console | None = None) -> None:
    """Evaluate the models without scores yet, over the cluster's worker processes."""
    missing = [folder for folder in folders if not is_scored(folder)]
    spread(
        f"evaluating {len(missing)} models",
        [partial(evaluate, config, folder) for folder in missing],
        workers=config.cluster.workers,
        threads=config.cluster.threads,
        units=len(missing),
        done_units=lambda: sum(is_scored(folder) for folder in missing),
        report=str,
        console=console or Console(),
    )


def evaluate_together(config: Experiment, folders: Sequence[Path], processes: Processes) -> None:
    """Evaluate the models without scores yet, one after the other, each by all processes that torchrun started."""
    missing = [folder for folder in folders if not is_scored(folder)]
    wait_for_all(processes)  # so that all have the same list before scores are written
    for folder in missing:
        line = evaluate(config, folder, processes)
        if processes.writes:
            print(line, flush=True)
