"""The paper's 33 tables and figures: what each shows, the experiments it is made of, and the functions that make it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from analysis.figures.angles import draw_angles, measure_angles
from analysis.figures.coefficients import draw_coefficients, measure_coefficients
from analysis.figures.contours import draw_landscape
from analysis.figures.cross_dataset import draw_backbones, measure_backbones
from analysis.figures.grids import draw_grids, measure_grids
from analysis.figures.landscape import measure_landscape
from analysis.figures.pairs import draw_pairs, measure_pairs
from analysis.figures.pool_size import draw_pool_size, measure_pool_size
from analysis.figures.reliability import draw_reliability, measure_reliability
from analysis.figures.scatter import draw_scatter, draw_subgroups, measure_methods, measure_scatter, measure_subgroups
from analysis.figures.style import save_with_numbers, write_csv
from analysis.figures.training_seeds import draw_budget, draw_calibration, measure_seeds
from analysis.figures.wise_curves import draw_wise, measure_wise
from analysis.measure.methods import NAN
from analysis.tables.cells import write_cells
from analysis.tables.named_rows import draw_rows, measure_rows
from analysis.tables.paper_tables import (
    cells_beside_paper,
    measure_beside_paper,
    measure_rows_beside_paper,
    row_cells_beside_paper,
)
from analysis.tables.table2 import cost_cells, inference_table
from analysis.tables.table3 import GROUPED
from analysis.tables.text_tables import text_cells, text_numbers
from analysis.theory.approximation import draw_approximation, measure_approximation, summary_table
from configs.schema import Experiment

MEASURED = Path(__file__).resolve().parents[1] / "results/measured"
GLUE = ("mrpc", "rte", "cola", "sst2")
Configs = Sequence[Experiment]


@dataclass(frozen=True)
class Drawing:
    """A figure: its numbers from a finished run, and the picture from these numbers alone."""

    measure: Callable[..., pd.DataFrame]  # takes an experiment and a console
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

    def measure(self, configs: Configs, console: Console | None) -> pd.DataFrame:
        """Its numbers, of one experiment, or of all where `made.is_one`."""
        if isinstance(self.made, Drawing):
            return self.made.measure(configs[0], console)
        return self.made.measure(configs if self.made.is_one else configs[0])

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
ONE_SHIFT = Drawing(partial(measure_scatter, one_shift=True), partial(draw_scatter, one_shift=True))
EVERY_METHOD = Drawing(measure_methods, partial(draw_scatter, every_method=True))
POOL_SIZE = Drawing(measure_pool_size, draw_pool_size)
ROWS = Drawing(measure_rows, draw_rows)
TABLE3, TABLE4 = ("table3_clip_b32",), ("table4_vitg",)
TABLE5 = tuple(f"tablej1_{network}_base_{task}" for network in ("bert", "t5") for task in GLUE)
TABLEJ1 = tuple(
    f"tablej1_{network}_{task}"
    for network in ("bert_base", "bert_large", "t5_small", "t5_base", "t5_large")
    for task in GLUE
)
DEMO = ("demo",)
SHIFTS = "shift_mean"

ARTEFACTS = {
    "table1": Artefact("headline numbers of the largest model", TABLE4, ("demo_vit_g",), _methods("table1")),
    "table2": Artefact("methods, formulas and the cost of an answer", (), DEMO, Printed(inference_table, cost_cells)),
    "table3": Artefact("every recipe and baseline, CLIP ViT-B/32", (*TABLE3, "released"), DEMO, _methods("table3")),
    "table4": Artefact(
        "ViT-G/14 on ImageNet, its other labels and five shifts", TABLE4, ("demo_vit_g",), _methods("table4")
    ),
    "table5": Artefact("BERT-base and T5-base on four GLUE tasks", TABLE5, ("demo_text",), _texts("table5")),
    "tablec1": Artefact(
        "BASIC-L on ImageNet and five shifts", ("tablec1_basic",), ("demo_basic",), _methods("tablec1")
    ),
    "tablej1": Artefact("five text models on four GLUE tasks", TABLEJ1, ("demo_text",), _texts("tablej1")),
    "tablel1": Artefact(
        "soups of augmentations against distillation", ("tablel1_distill",), ("demo_distill",), _rows("tablel1")
    ),
    "tablel2": Artefact(
        "soups of augmentations against fix-aug", ("tablel2_fixaug",), ("demo_fixaug",), _rows("tablel2")
    ),
    "tablel3": Artefact(
        "soups of models trained without and with SAM", ("tablel3_sam",), ("demo_sam",), _rows("tablel3")
    ),
    "figure1": Artefact(
        "ingredients and soups, test against shifts", (*TABLE3, "figure5_align", "released"), DEMO, SCATTER
    ),
    "figure2": Artefact(
        "error landscape in a plane",
        ("figure2_landscape",),
        ("demo_landscape",),
        Drawing(measure_landscape, partial(draw_landscape, log=True)),
    ),
    "figure3": Artefact(
        "gain of an average against angle", ("figure3_angles",), ("demo_angles",), Drawing(measure_angles, draw_angles)
    ),
    "figure4": Artefact("soup against ensemble of random pairs", TABLE3, DEMO, Drawing(measure_pairs, draw_pairs)),
    "figure5": Artefact(
        "ingredients and soups of ALIGN and ViT-G", ("figure5_align", *TABLE4), ("demo_align", "demo_vit_g"), SCATTER
    ),
    "figureb1": Artefact("by the number of models considered", TABLE3, DEMO, POOL_SIZE),
    "figureb2": Artefact(
        "calibration of soup and ensemble",
        ("figureb2_seeds",),
        ("demo_seeds_only",),
        Drawing(partial(measure_seeds, calibrated=True), draw_calibration),
    ),
    "figured1": Artefact(
        "curves from the initialisation to every model and soup (WiSE-FT)",
        (*TABLE3, "standard_zeroshot"),
        ("demo", "demo_grid_zeroshot"),
        Drawing(measure_wise, draw_wise),
    ),
    "figuree1": Artefact(
        "soups of backbones fine-tuned on other data sets",
        ("figuree1_soups",),
        ("demo_cross_dataset",),
        Drawing(measure_backbones, draw_backbones),
    ),
    "figuref1": Artefact(
        "averages of the ends of one-dimensional grids",
        tuple(f"figuref1_{grid}" for grid in ("optimizer", "augment", "lr")),
        ("demo_grids",),
        Drawing(measure_grids, draw_grids),
    ),
    "figureg1": Artefact(
        "FMoW and iWildCam, CLIP ViT-L",
        ("figureg1_fmow", "figureg1_iwildcam"),
        DEMO,
        Drawing(measure_subgroups, draw_subgroups),
    ),
    "figureg2": Artefact("CIFAR-10 against CIFAR-10.1", ("figureg2_cifar10",), DEMO, ONE_SHIFT),
    "figureg3": Artefact(
        "a pool from an initialisation without contrastive pretraining",
        ("figureg3_in22k",),
        ("demo_imagenet_init",),
        SCATTER,
    ),
    "figureg4": Artefact(
        "models that differ by seed alone, of two initialisations",
        ("figureg4_clip", "figureg4_in22k"),
        ("demo_seeds_only", "demo_imagenet_init"),
        Drawing(partial(measure_seeds, calibrated=False), draw_budget),
    ),
    "figureh1": Artefact("as B.1: linear probe, standard grid", ("standard_lp",), ("demo_grid_lp",), POOL_SIZE),
    "figureh2": Artefact("as B.1: linear probe, extreme grid", ("extreme_lp",), ("demo_extreme_lp",), POOL_SIZE),
    "figureh3": Artefact(
        "as B.1: zero-shot, standard grid", ("standard_zeroshot",), ("demo_grid_zeroshot",), POOL_SIZE
    ),
    "figureh4": Artefact(
        "as B.1: zero-shot, extreme grid", ("extreme_zeroshot",), ("demo_extreme_zeroshot",), POOL_SIZE
    ),
    "figurej1": Artefact(
        "error landscape at a ten times larger learning rate",
        ("figurej1_landscape",),
        ("demo_landscape_high_lr",),
        Drawing(measure_landscape, partial(draw_landscape, log=False)),
    ),
    "figurek1": Artefact(
        "approximation (1) against the truth",
        ("extreme_lp",),
        ("demo_extreme_lp",),
        Drawing(measure_approximation, draw_approximation, summary=summary_table),
    ),
    "figurel1": Artefact("soups of averages along training (EMA, SWA)", ("figurel1_clip",), ("demo_ema_swa",), ROWS),
    "figurel2": Artefact(
        "the same, from an initialisation pretrained on labels", ("figurel2_in22k",), ("demo_imagenet_init",), ROWS
    ),
    "figurel3": Artefact("Figure 1 with all methods of Table 3", TABLE3, DEMO, EVERY_METHOD),
}

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

MORE = {  # no figures of the paper, drawn by the same command
    f"coefficients_{recipe}": Artefact(
        "mixing coefficients by group of parameters (Appendix I)",
        (),
        (),
        Drawing(partial(measure_coefficients, recipe=recipe), draw_coefficients),
    )
    for recipe in GROUPED
} | {
    "rows": Artefact("named rows and their soups, test against shifts", (), (), ROWS),
    "reliability": Artefact(
        "reliability diagrams before and after a temperature", (), (), Drawing(measure_reliability, draw_reliability)
    ),
}


DRAWN = ARTEFACTS | MORE  # all that `artefact=` may name; `all` means the paper's
