"""Means and other mixtures of a pool's models: what they answer, on disk, for figures that need hundreds of them."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

from rich.console import Console
from torch import Tensor

from analysis.results import SHIFT_MEAN, Method, bootstrap_groups, columns_of, shift_name, titled
from analysis.tables import measured
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.significance import Difference, paired_bootstrap
from soups.average import Average, Loader
from soups.files.atomic import digest_of
from soups.files.weights import Weights
from soups.scorers.metrics import score
from store.arrays import cached_array
from store.runs import Ingredient
from store.workers import spread


class RunningMean:
    """The mean of models that are added one after the other; each is read once, when a mean is asked for."""

    def __init__(self) -> None:
        self.members: list[Ingredient] = []
        self._average: Average | None = None
        self._read = 0

    def add(self, member: Ingredient) -> None:
        """One more model."""
        self.members.append(member)

    def weights(self) -> dict[str, Tensor]:
        """The mean of all that were added.

        Raises:
            ValueError: nothing was added, or models that do not fit together.
        """
        for member in self.members[self._read :]:
            average, weights = self._average, member.load()
            self._average, self._read = (
                Average.of(weights) if average is None else average.plus(weights),
                self._read + 1,
            )
        if self._average is None:
            raise ValueError("a mean needs at least one model")
        return self._average.weights()


def key_of_mean(members: Sequence[Ingredient]) -> str:
    """Names the mean of some models, in whatever order, without reading them."""
    return digest_of({"mean of": sorted(each.digest for each in members)})


def answers(evaluator: Evaluator, key: str, load: Loader, split: str) -> Tensor:
    """(N,) class ids that a mixture predicts on a split, from disk or by a forward pass.

    Of so many mixtures not the logits are kept, which of ImageNet's splits are hundreds of megabytes each.

    Args:
        evaluator: of the experiment.
        key: names the mixture.
        load: called only when a forward pass is needed.
        split: of the experiment's task.
    """

    def compute() -> Tensor:
        return evaluator.predicted(evaluator.fresh_logits(load(), split), split).float().unsqueeze(1)

    path = evaluator.place("answers", split, key)
    return cached_array(path, (len(evaluator.split(split)), 1), compute).squeeze(1).long()


def is_answered(evaluator: Evaluator, key: str) -> bool:
    """Whether a mixture's answers on every split that reports are on disk."""
    return all(evaluator.place("answers", split, key).exists() for split in evaluator.config.task.reported)


def method_of_answers(
    name: str, models: int, said: Callable[[str], Tensor], held_out: float, evaluator: Evaluator
) -> Method:
    """A method from the (N,) class ids that it answers on each split that reports."""
    task = evaluator.config.task
    found = {split: said(split) for split in task.reported}
    images = {split: evaluator.split(split) for split in task.reported}
    hits = {split: found[split] == images[split].labels for split in task.reported}
    other = [split for split in task.reported if task.metrics.get(split, "top1") != "top1"]
    scores = {s: score(task.metrics[s], found[s], images[s].labels, images[s].groups) for s in other}
    return Method(name, models, hits, held_out, predicted={split: (found[split],) for split in other}, scores=scores)


def method_of_mixture(name: str, key: str, load: Loader, evaluator: Evaluator) -> Method:
    """A method from a mixture of weights, which are put together once where any of its answers is missing."""

    @lru_cache(maxsize=1)
    def once() -> Weights:
        return load()

    return method_of_answers(name, 1, partial(answers, evaluator, key, once), float("nan"), evaluator)


def method_of_model(name: str, ingredient: Ingredient, evaluator: Evaluator) -> Method:
    """A method from a model of the pool, whose logits are kept."""

    def said(split: str) -> Tensor:
        return evaluator.predicted(evaluator.logits(ingredient.digest, ingredient.load, split), split)

    return method_of_answers(name, 1, said, ingredient.held_out_score, evaluator)


def measure_mixtures(
    config: Experiment,
    title: str,
    keys: Sequence[str],
    calls: Sequence[Callable[[], str]],
    console: Console | None = None,
) -> None:
    """Let the cluster's worker processes make the calls, unless all mixtures are answered already.

    Args:
        config: of the experiment.
        title: of the progress bar.
        keys: mixtures that the calls answer.
        calls: picklable; each returns a line.
        console: where the bar goes.

    Raises:
        UserError: missing or damaged weights or data, or a worker that was killed.
    """
    evaluator = Evaluator(config)
    missing = [key for key in dict.fromkeys(keys) if not is_answered(evaluator, key)]
    if not missing:
        return
    spread(
        f"evaluating {len(missing)} {title}",
        calls,
        workers=config.cluster.workers,
        threads=config.cluster.threads,
        units=len(missing),
        done_units=lambda: sum(is_answered(evaluator, key) for key in missing),
        report=str,
        console=console or Console(),
    )


def difference_in(
    config: Experiment, evaluator: Evaluator, ours: Method, baseline: Method, splits: tuple[str, ...]
) -> Difference:
    """Accuracy of one method minus another's, averaged over splits, with a paired bootstrap interval.

    The interval is NaN where a split is scored by anything but top-1, which would have to be computed anew for every
    draw; the difference is that of the scores.
    """
    if any(split in ours.scores for split in splits):
        mean = sum(ours.accuracy(split) - baseline.accuracy(split) for split in splits) / len(splits)
        return Difference(mean, float("nan"), float("nan"))
    return paired_bootstrap(
        [ours.hits[split] for split in splits],
        [baseline.hits[split] for split in splits],
        bootstrap_groups(config, evaluator, splits),
        resamples=config.analysis.resamples,
        seed=config.analysis.seed,
    )


def drawn_columns(config: Experiment) -> dict[str, tuple[str, ...]]:
    """The columns that curves are drawn in, and the splits of each: test, and the mean of the shifts if there are any.

    >>> from configs.schema import load
    >>> list(drawn_columns(load("demo_tiny")))
    ['test', 'shift_mean']
    """
    columns = columns_of(config)
    return {name: columns[name] for name in (config.task.test, SHIFT_MEAN) if name in columns}


def axis_labels(config: Experiment) -> dict[str, str]:
    """What the axis of each drawn column says, with what is measured and its unit.

    >>> from configs.schema import load
    >>> axis_labels(load("demo_tiny"))["shift_mean"]
    'Mean of 5 shifts, top-1 accuracy (%)'
    """
    names = {config.task.test: f"{titled(config.task.name)} test", SHIFT_MEAN: titled(shift_name(config))}
    found = {}
    for column, splits in drawn_columns(config).items():
        metric = measured(config.task, splits)
        found[column] = f"{names[column]}, {metric[:1].lower()}{metric[1:]} (%)"
    return found
