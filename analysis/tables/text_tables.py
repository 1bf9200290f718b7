"""Tables 5 and J.1: several text models on several tasks, an experiment for each model and task."""

from collections.abc import Sequence

import pandas as pd

from analysis.measure.methods import best_of, measure
from analysis.tables.cells import BEST, METRICS, NAMES, gain
from analysis.tables.paper import MARKS, beside, legend, paper_table
from analysis.tables.paper_tables import LEVEL, with_significance
from analysis.tables.table3 import note
from configs.schema import Experiment
from eval.forward import Evaluator

RECIPES = {"table5": ("best", "greedy"), "tablej1": ("best", "uniform", "greedy")}
MODELS = {"bert_base": "BERT-base", "bert_large": "BERT-large", "t5_small": "T5-small"}
MODELS |= {"t5_base": "T5-base", "t5_large": "T5-large"}


def text_numbers(configs: Sequence[Experiment], table: str) -> pd.DataFrame:
    """One row per experiment and recipe, on its test split, beside the paper's number where it has one.

    Columns: network, task, protocol (apart, or paper: selected on the reported split), n, metric and those of
    `analysis.tables.paper_tables.with_significance`; ours and paper (per cent),
    minus_paper (points), confidence, source.

    Raises:
        UserError: a stage before this one is not finished.
    """
    parts = []
    for config in configs:
        evaluator, task = Evaluator(config), config.task
        _, methods = measure(evaluator)
        chosen = [method for method in methods if method.name in RECIPES[table]]
        tidy = with_significance(evaluator, chosen, best_of(methods))
        network, name, metric = network_of(config), task.subset or task.name, task.metrics.get(task.test, "top1")
        tidy = tidy[tidy["column"] == task.test].assign(
            network=network, task=name, protocol=task.protocol, metric=metric
        )
        rows = {method: f"{network}/{method}" for method in RECIPES[table]}
        parts.append(beside(tidy, table, rows, {task.test: name}).drop(columns="paper_spread"))
    return pd.concat(parts, ignore_index=True)


def network_of(config: Experiment) -> str:
    """The network of an experiment as results/paper calls it, e.g. bert_base; other networks by their names."""
    name = config.model.name or config.model.kind
    key = name.rpartition("/")[2].removesuffix("-uncased").replace("-", "_")
    return key if key in MODELS else name


def text_table(numbers: pd.DataFrame) -> pd.DataFrame:
    """One row per network, task and recipe, all cells text."""
    rows = []
    for cell in numbers.to_dict("records"):
        ours = f"{cell['ours']:.1f}"
        known = not pd.isna(cell["paper"])
        rows.append(
            {
                "Model": MODELS.get(cell["network"], cell["network"]),
                "Task": cell["task"],
                "Metric": METRICS[cell["metric"]],
                "n": str(cell["n"]),
                "Method": NAMES[cell["method"]],
                "Ours": f"**{ours}**" if cell["bold"] else ours,
                "Paper": f"{cell['paper']:.1f}{MARKS[cell['confidence']]}" if known else "",
                "Ours − paper": "" if pd.isna(cell["minus_paper"]) else f"{cell['minus_paper']:+.1f}",
                "Ours − best": gain(cell) if cell["method"] != "best" else "",
            }
        )
    table = pd.DataFrame(rows)
    return table if table["Ours − paper"].any() else table.drop(columns="Ours − paper")


def paper_rows(table: str, there: pd.DataFrame) -> pd.DataFrame:
    """The paper's numbers of models and tasks that were not run, as rows of `text_table`."""
    ran = set(there[["network", "method", "task"]].itertuples(index=False, name=None))
    rows = []
    for cell in paper_table(table).to_dict("records"):
        network, method = cell["row"].split("/")
        if method in NAMES and (network, method, cell["column"]) not in ran:
            paper = f"{cell['value']:.1f}{MARKS[cell['confidence']]}"
            rows.append((MODELS[network], cell["column"], NAMES[method], paper))
    return pd.DataFrame(rows, columns=["Model", "Task", "Method", "Paper"])


def text_cells(configs: Sequence[Experiment], numbers: pd.DataFrame, table: str) -> tuple[pd.DataFrame, str]:
    """Table 5 or J.1 as text cells, and its caption.

    Args:
        configs: one for each model and task.
        numbers: from `text_numbers`.
        table: table5 or tablej1.
    """
    cells = pd.concat([text_table(numbers), paper_rows(table, numbers)], ignore_index=True).fillna("")
    notes = " ".join(dict.fromkeys(note(config) for config in configs))
    text = (
        "Scores in %, on the test split. Bold: the better of an experiment's recipes, and what is not "
        f"significantly different from it (p >= {LEVEL}). Ours − best: points to {BEST}, with 95 % paired-bootstrap "
        "intervals. Rows without a number of ours are the paper's alone. "
        f"{notes} {legend(pd.concat([numbers, paper_table(table)]))}"
    )
    return cells, text
