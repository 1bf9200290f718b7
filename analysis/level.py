"""Which methods of a table are level with its best: what a paired test cannot tell from it stands in bold too."""

from collections.abc import Sequence

from analysis.results import Method, accuracy_in, bootstrap_groups, columns_of
from configs.schema import Experiment
from eval.forward import Evaluator
from eval.significance import paired_permutation

LEVEL = 0.05  # of significance, as in Table 4


def level_with_best(
    config: Experiment, methods: Sequence[Method], evaluator: Evaluator, column: str, *, permutations: int = 10_000
) -> frozenset[str]:
    """Names of the best method of a column and of those that are not significantly worse.

    The test swaps the answers of two models image by image, or class by class where the task's intervals draw classes;
    of right and wrong answers on one split, image by image, that is McNemar's exact test. Scores that are no mean over
    images (macro F1, Matthews) have no such test, and the best alone is named.

    Args:
        config: of the experiment.
        methods: at least one.
        evaluator: of the experiment.
        column: a split, or the mean of the shifts.
        permutations: drawn where not all can be gone through.

    Source: the paper's Table 4, whose caption names McNemar's exact test and a permutation test at 0.05.
    """
    splits = columns_of(config)[column]
    best = max(methods, key=lambda method: accuracy_in(config, method, column))
    if any(split in best.scores for split in splits):
        return frozenset({best.name})
    units = bootstrap_groups(config, evaluator, splits)
    found = {best.name}
    for method in methods:
        ours, theirs = ([each.hits[split] for split in splits] for each in (method, best))
        seed = config.analysis.seed
        if paired_permutation(ours, theirs, units, permutations=permutations, seed=seed).p >= LEVEL:
            found.add(method.name)
    return frozenset(found)
