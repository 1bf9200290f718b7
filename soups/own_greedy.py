"""Recipe 1 on files of one's own: a network of any library, and labelled images or texts that select."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from configs.data import Metric
from configs.errors import UserError
from configs.own_pool import OwnPool
from eval.scores import score
from soups.files import FileSoup, average_files
from soups.journal import Journal
from soups.mixture import Loader
from soups.own_examples import Examples, class_folders, examples_of
from soups.own_networks import OwnClassifier, build
from soups.recipes import greedy
from soups.refusals import refuse_unsuitable
from soups.residents import FileWeights
from store.pickled import tied_names
from store.runs import digest_of
from store.weights import Weights
from store.workers import progress_bar


def accuracy_on(own: OwnClassifier, examples: Examples, metric: Metric = "top1") -> Callable[[Weights], float]:
    """The score of weights on the examples, in [0, 1] (of matthews [-1, 1])."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own.network.to(device)

    @torch.inference_mode()
    def accuracy(weights: Weights) -> float:
        if own.load is not None:
            own.load(weights)
        else:
            named = {own.own_name(name): tensor for name, tensor in weights.items()}
            # Not strict: `fitting` has compared the names, and a tied tensor may stand in a file under one of them.
            own.network.load_state_dict({name: tensor for name, tensor in named.items() if name}, strict=False)
        own.ready()
        found = [own.logits(batch.to(device)).argmax(dim=1).cpu() for batch in examples.batches()]
        return score(metric, torch.cat(found), examples.labels)

    return accuracy


def fitting(path: Path, own: OwnClassifier) -> Loader:
    """A loader of a file that fits the network.

    Raises:
        UserError: it has other tensors or shapes than the network.
    """
    wanted, weights = own.network.state_dict(), FileWeights(path)
    if own.load is not None:
        return lambda: weights  # its library compares, when they are loaded
    theirs = {own.own_name(name): name for name in weights}
    theirs.pop(None, None)
    ties = tied_names(wanted)
    # A name may be missing where the tensor is there under another one.
    may_miss = {name for pair in ties.items() for name in pair if theirs.keys() & set(pair)}
    only = sorted(name for name in wanted.keys() ^ theirs.keys() if name and name not in may_miss)
    if only:
        raise UserError(f"{path} is not of this network: {only[0]!r} is not in both")
    which = "the network with a class for each folder of task.root" if own.class_ids is None else "the network"
    for name in wanted:  # in the network's order, so that a head's weight comes before its bias
        shape = tuple(weights.shape(theirs[name])) if name in theirs else tuple(wanted[name].shape)
        if shape != tuple(wanted[name].shape):
            raise UserError(f"{path}: {theirs[name]!r} is {shape}, {which} has {tuple(wanted[name].shape)}")
    return lambda: weights


def cook_greedy(pool: OwnPool, paths: list[Path]) -> FileSoup:
    """Cook and write the greedy soup of files, with every decision in its metadata.

    Accuracies stand in <out>.journal.jsonl as they come, so that a killed run continues; it is deleted at the end.

    Raises:
        UserError: files that do not fit the network or the folder's classes, or whatever `refuse_unsuitable` and
            `average_files` refuse.
    """
    assert pool.task is not None and pool.model is not None  # the schema sees to that
    classes = class_folders(pool.task)
    refuse_unsuitable(paths, unrelated=pool.unrelated == "average")
    own = build(pool.model, paths, list(FileWeights(paths[0])), classes)
    models = [fitting(path, own) for path in paths]
    examples = examples_of(pool.task, own, pool.model.batch_size)
    journal_path = pool.out.with_name(f"{pool.out.name}.journal.jsonl")
    settings = [pool.model.kind, pool.model.name, pool.model.image_size, pool.model.templates, pool.task.metric]
    journal = Journal(journal_path, prefix=digest_of([settings, examples.key]))
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("evaluating", total=2 * len(models) - 1)
        measured = journal.remembered(accuracy_on(own, examples, pool.task.metric))

        def accuracy(weights: Weights) -> float:
            found = measured(weights)
            bar.advance(task)
            return found

        held_out = []
        for path, load in zip(paths, models, strict=True):
            try:
                held_out.append(accuracy(load()))
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        soup = greedy(models, held_out, accuracy, ties=pool.ties)
    chosen = [paths[i] for i in soup.ingredients]
    decisions = [{"file": paths[t.candidate].name, "score": t.score, "accepted": t.accepted} for t in soup.trials]
    note: dict[str, Any] = {
        "recipe": "greedy",
        "ties": pool.ties,
        "batch_norm": pool.batch_norm,
        "decisions": decisions,
        "held_out": {"n": len(examples.labels), "metric": pool.task.metric},
        "model": [pool.model.kind, pool.model.name],
    }
    cooked = average_files(chosen, pool.out, dtype=pool.dtype, threads=pool.threads, note=note)
    journal_path.unlink(missing_ok=True)
    return cooked
