"""The paper's 33 tables and figures: what each shows, the experiments it is made of, and the functions that make it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.angles import draw_angles, measure_angles
from analysis.figures.coefficients import draw_coefficients, measure_coefficients
from analysis.figures.contours import draw_landscape
from analysis.figures.cross_dataset import draw_backbones, measure_backbones
from analysis.figures.grids import draw_grids, measure_grids
from analysis.figures.landscape import measure_landscape
from analysis.figures.pairs import draw_pairs, measure_pairs
from analysis.figures.pool_size import draw_pool_size, measure_pool_size
from analysis.figures.reliability import draw_reliability, measure_reliability
from analysis.figures.scatter import draw_scatter, draw_subgroups, measure_scatter, measure_subgroups
from analysis.figures.style import save_with_numbers, write_csv
from analysis.figures.training_seeds import draw_budget, draw_calibration, measure_seeds
from analysis.figures.wise_curves import draw_wise, measure_wise
from analysis.measure.methods import NAN
from analysis.tables.cells import write_cells
from analysis.tables.named_rows import draw_rows, measure_rows
from analysis.tables.paper import (
    cells_beside_paper,
    measure_beside_paper,
    measure_rows_beside_paper,
    row_cells_beside_paper,
    text_cells,
    text_numbers,
)
from analysis.tables.table2 import cost_cells, inference_table
from analysis.tables.table3 import GROUPED
from analysis.theory.approximation import draw_approximation, measure_approximation, summary_table
from configs.schema import Experiment

MEASURED = Path(__file__).resolve().parents[1] / "results/measured"
Configs = Sequence[Experiment]


@dataclass(frozen=True)
class Drawing:
    """A figure: its numbers from a finished run, and the picture from these numbers alone."""

    measure: Callable[..., pd.DataFrame]  # takes an experiment
    draw: Callable[..., Figure]  # takes the experiment and its numbers
    summary: Callable[[Experiment, pd.DataFrame], pd.DataFrame] | None = None  # another table, <name>_summary.csv
    ending = ""  # the files' names end with it
    is_one = False  # whether several experiments make one of it


@dataclass(frozen=True)
class Printed:
    """A table beside the paper's: its numbers from finished runs, and the cells and caption from these numbers alone.

    Differences to the paper stand only in tables of the paper's own experiments: of a proxy they say nothing.
    """

    measure: Callable[..., pd.DataFrame]  # takes an experiment, or all of them where `is_one`
    cells: Callable[[Any, pd.DataFrame], tuple[pd.DataFrame, str]]
    is_one: bool = False
    ending = "_with_paper"


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the paper."""

    shows: str
    paper: tuple[str, ...]  # experiments it is made of; none where the paper has formulas alone
    embedded: tuple[str, ...]  # their counterparts of the embedded benchmark
    forward: bool  # whether soups or points are evaluated for it that no recipe made
    made: Drawing | Printed

    def is_of(self, experiment: str) -> bool:
        """Whether an experiment is one of those it is made of."""
        return experiment in (*self.paper, *self.embedded)

    def is_papers(self, config: Experiment) -> bool:
        """Whether an experiment of it has the paper's model on the paper's data."""
        return config.name in self.paper and config.model.proxy_for is None and config.task.proxy_for is None

    @property
    def functions(self) -> str:
        """Where its numbers and its cells or picture are made, each as module:function."""
        second = self.made.draw if isinstance(self.made, Drawing) else self.made.cells
        whole = [getattr(function, "func", function) for function in (self.made.measure, second)]
        return " ".join(f"{function.__module__}:{function.__qualname__}" for function in whole)

    def write(self, configs: Configs, numbers: pd.DataFrame, stem: Path) -> list[Path]:
        """Write a figure as stem.{pdf,png,csv} with its summary, or a table as stem.{md,tex,csv}."""
        if isinstance(self.made, Drawing):
            files = save_with_numbers(self.made.draw(configs[0], numbers), numbers, stem)
            if self.made.summary is not None:
                table = self.made.summary(configs[0], numbers)
                files.append(write_csv(table, stem.with_name(f"{stem.name}_summary.csv"), "%.6f"))
            return files
        if "minus_paper" in numbers and not all(self.is_papers(config) for config in configs):
            numbers = numbers.assign(minus_paper=NAN)
        cells, caption = self.made.cells(configs if self.made.is_one else configs[0], numbers)
        return write_cells(cells, numbers, stem, caption)


def _texts(table: str) -> Printed:
    return Printed(partial(text_numbers, table=table), partial(text_cells, table=table), is_one=True)


def _methods(table: str) -> Printed:
    return Printed(partial(measure_beside_paper, table=table), cells_beside_paper)


def _rows(table: str) -> Printed:
    return Printed(partial(measure_rows_beside_paper, table=table), row_cells_beside_paper)


SCATTER = Drawing(measure_scatter, draw_scatter)
POOL_SIZE = Drawing(measure_pool_size, draw_pool_size)
ROWS = Drawing(measure_rows, draw_rows)
MADE: dict[str, Drawing | Printed] = {
    "table1": _methods("table1"),
    "table2": Printed(inference_table, cost_cells),
    "table3": _methods("table3"),
    "table4": _methods("table4"),
    "table5": _texts("table5"),
    "tablec1": _methods("tablec1"),
    "tablej1": _texts("tablej1"),
    "tablel1": _rows("tablel1"),
    "tablel2": _rows("tablel2"),
    "tablel3": _rows("tablel3"),
    "figure1": SCATTER,
    "figure2": Drawing(measure_landscape, partial(draw_landscape, log=True)),
    "figure3": Drawing(measure_angles, draw_angles),
    "figure4": Drawing(measure_pairs, draw_pairs),
    "figure5": SCATTER,
    "figureb1": POOL_SIZE,
    "figureb2": Drawing(partial(measure_seeds, calibrated=True), draw_calibration),
    "figured1": Drawing(measure_wise, draw_wise),
    "figuree1": Drawing(measure_backbones, draw_backbones),
    "figuref1": Drawing(measure_grids, draw_grids),
    "figureg1": Drawing(measure_subgroups, draw_subgroups),
    "figureg2": Drawing(partial(measure_scatter, one_shift=True), partial(draw_scatter, one_shift=True)),
    "figureg3": SCATTER,
    "figureg4": Drawing(partial(measure_seeds, calibrated=False), draw_budget),
    "figureh1": POOL_SIZE,
    "figureh2": POOL_SIZE,
    "figureh3": POOL_SIZE,
    "figureh4": POOL_SIZE,
    "figurej1": Drawing(measure_landscape, partial(draw_landscape, log=False)),
    "figurek1": Drawing(measure_approximation, draw_approximation, summary=summary_table),
    "figurel1": ROWS,
    "figurel2": ROWS,
    "figurel3": Drawing(partial(measure_scatter, bars=False), partial(draw_scatter, every_method=True)),
    **{
        f"coefficients_{each}": Drawing(partial(measure_coefficients, recipe=each), draw_coefficients)
        for each in GROUPED
    },
    "rows": ROWS,
    "reliability": Drawing(measure_reliability, draw_reliability),
}
TABLE = pd.read_csv(Path(__file__).with_name("artefacts.csv"), index_col="name", keep_default_na=False)
DRAWN = {  # all that `artefact=` may name
    name: Artefact(row.shows, tuple(row.paper.split()), tuple(row.embedded.split()), row.forward == "yes", MADE[name])
    for name, row in TABLE.iterrows()
}
ARTEFACTS = {name: each for name, each in DRAWN.items() if name.startswith(("table", "figure"))}  # the paper's: `all`
SHIFTS = "shift_mean"

NUMBERS = {  # that `python -m analysis list` has of the paper: table, row and column in results/paper
    "table1": (("table1", "greedy", "test"), ("table1", "greedy", SHIFTS)),
    "table3": (("table3", "greedy", "test"), ("table3", "best", "test"), ("table3", "uniform", "test")),
    "table4": (("table4", "greedy", "test"), ("table4", "best", "test"), ("table4", "greedy_ensemble", "test")),
    "table5": (("table5", "bert_base/greedy", "rte"), ("table5", "bert_base/best", "rte")),
    "tablec1": (("tablec1", "greedy", "test"), ("tablec1", "best", "test")),
    "tablej1": (("tablej1", "t5_large/greedy", "rte"), ("tablej1", "t5_large/uniform", "rte")),
    "tablel1": (("tablel1", "Soup of minimal, medium, strong", "test@3e-5"),),
    "tablel2": (("tablel2", "fix-aug", "test@3e-5"),),
    "tablel3": (("tablel3", "SAM, seed 0", "test"),),
    "figure1": (("table3", "greedy", "test"), ("table3", "greedy", SHIFTS)),
    "figure5": (("headlines", "align", "greedy minus best, test"),),
    "figuree1": (("headlines", "clip_vit_b32", "backbone soup minus zero-shot, CIFAR-100"),),
}
