"""The paper's 33 tables and figures: what each shows, the experiments it is made of, and the function that draws it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from rich.console import Console

from analysis.figures.angles import figure3
from analysis.figures.cross_dataset import figuree1
from analysis.figures.grids import figuref1
from analysis.figures.landscape import figure2, figurej1
from analysis.figures.pairs import figure4
from analysis.figures.pool_size import figureb1, figureh1, figureh2, figureh3, figureh4
from analysis.figures.reliability import figure_reliability
from analysis.figures.scatter import figurel1, figurel2, figurel3
from analysis.figures.training_seeds import figureb2, figureg4
from analysis.figures.wise_curves import figured1
from analysis.tables.paper import paper_table
from analysis.tables.paper_tables import methods_beside_paper, named_rows_beside_paper
from analysis.tables.table2 import table2
from analysis.tables.table3 import publish, scatter
from analysis.tables.text_tables import texts_beside_paper
from analysis.theory.approximation import figurek1
from configs.errors import UserError
from configs.schema import Experiment
from soups.files.atomic import write_json
from store.provenance import provenance
from store.runs import RunFolder

MEASURED = Path(__file__).resolve().parents[1] / "results/measured"
GLUE = ("mrpc", "rte", "cola", "sst2")
Draw = Callable[[Sequence[Experiment], Console | None], list[Path]]
DrawOne = Callable[..., list[Path]]  # of an experiment and console=


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the paper."""

    shows: str
    paper: tuple[str, ...]  # experiments it is made of; none where the paper has formulas alone
    embedded: tuple[str, ...]  # their counterparts of the embedded benchmark
    draw: Draw  # from finished experiments; returns the files that it wrote
    numbers: tuple[tuple[str, str, str], ...] = ()  # of results/paper (table, row, column), the first to look at

    def is_of(self, experiment: str) -> bool:
        """Whether an experiment is one of those it is made of."""
        return experiment in (*self.paper, *self.embedded)


def each(draw: DrawOne) -> Draw:
    """One table or figure for each experiment."""

    def drawn(configs: Sequence[Experiment], console: Console | None) -> list[Path]:
        return [file for config in configs for file in draw(config, console=console)]

    return drawn


def _table(draw: Callable[[Experiment], list[Path]]) -> Draw:
    return lambda configs, _: [file for config in configs for file in draw(config)]


def _texts(table: str) -> Draw:
    return lambda configs, _: texts_beside_paper(configs, table)


def _methods(table: str) -> Draw:
    return _table(partial(methods_beside_paper, table=table))


def _rows(table: str) -> Draw:
    return _table(partial(named_rows_beside_paper, table=table))


def _scatter(stem: str) -> Draw:
    return each(partial(scatter, stem=stem))


TABLE3, TABLE4 = ("table3_clip_b32",), ("table4_vitg",)
DEMO = ("demo",)
SHIFTS = "shift_mean"

ARTEFACTS = {
    "table1": Artefact(
        "headline numbers of the largest model",
        TABLE4,
        DEMO,
        _methods("table1"),
        (("table1", "greedy", "test"), ("table1", "greedy", SHIFTS)),
    ),
    "table2": Artefact("methods, formulas and the cost of an answer", (), DEMO, _table(table2)),
    "table3": Artefact(
        "every recipe and baseline, CLIP ViT-B/32",
        (*TABLE3, "released"),
        DEMO,
        _methods("table3"),
        (("table3", "greedy", "test"), ("table3", "best", "test"), ("table3", "uniform", "test")),
    ),
    "table4": Artefact(
        "ViT-G/14 on ImageNet, its other labels and five shifts",
        TABLE4,
        DEMO,
        _methods("table4"),
        (("table4", "greedy", "test"), ("table4", "best", "test"), ("table4", "greedy_ensemble", "test")),
    ),
    "table5": Artefact(
        "BERT-base and T5-base on four GLUE tasks",
        tuple(f"tablej1_{network}_base_{task}" for network in ("bert", "t5") for task in GLUE),
        ("demo_text",),
        _texts("table5"),
        (("table5", "bert_base/greedy", "rte"), ("table5", "bert_base/best", "rte")),
    ),
    "tablec1": Artefact(
        "BASIC-L on ImageNet and five shifts",
        ("tablec1_basic",),
        DEMO,
        _methods("tablec1"),
        (("tablec1", "greedy", "test"), ("tablec1", "best", "test")),
    ),
    "tablej1": Artefact(
        "five text models on four GLUE tasks",
        tuple(
            f"tablej1_{network}_{task}"
            for network in ("bert_base", "bert_large", "t5_small", "t5_base", "t5_large")
            for task in GLUE
        ),
        ("demo_text",),
        _texts("tablej1"),
        (("tablej1", "t5_large/greedy", "rte"), ("tablej1", "t5_large/uniform", "rte")),
    ),
    "tablel1": Artefact(
        "soups of augmentations against distillation",
        ("tablel1_distill",),
        ("demo_distill",),
        _rows("tablel1"),
        (("tablel1", "Soup of minimal, medium, strong", "test@3e-5"),),
    ),
    "tablel2": Artefact(
        "soups of augmentations against fix-aug",
        ("tablel2_fixaug",),
        ("demo_fixaug",),
        _rows("tablel2"),
        (("tablel2", "fix-aug", "test@3e-5"),),
    ),
    "tablel3": Artefact(
        "soups of models trained without and with SAM",
        ("tablel3_sam",),
        ("demo_sam",),
        _rows("tablel3"),
        (("tablel3", "SAM, seed 0", "test"),),
    ),
    "figure1": Artefact(
        "ingredients and soups, test against shifts",
        (*TABLE3, "figure5_align", "released"),
        DEMO,
        _scatter("figure1"),
        (("table3", "greedy", "test"), ("table3", "greedy", SHIFTS)),
    ),
    "figure2": Artefact("error landscape in a plane", ("figure2_landscape",), ("demo_landscape",), each(figure2)),
    "figure3": Artefact("gain of an average against angle", ("figure3_angles",), ("demo_angles",), each(figure3)),
    "figure4": Artefact("soup against ensemble of random pairs", TABLE3, DEMO, each(figure4)),
    "figure5": Artefact(
        "ingredients and soups of ALIGN and ViT-G",
        ("figure5_align", *TABLE4),
        DEMO,
        _scatter("figure5"),
        (("headlines", "align", "greedy minus best, test"),),
    ),
    "figureb1": Artefact("by the number of models considered", TABLE3, DEMO, each(figureb1)),
    "figureb2": Artefact("calibration of soup and ensemble", ("figureb2_seeds",), ("demo_seeds_only",), each(figureb2)),
    "figured1": Artefact(
        "curves from the initialisation to every model and soup (WiSE-FT)",
        (*TABLE3, "standard_zeroshot"),
        ("demo", "demo_grid_zeroshot"),
        each(figured1),
    ),
    "figuree1": Artefact(
        "soups of backbones fine-tuned on other data sets",
        ("figuree1_soups",),
        ("demo_cross_dataset",),
        each(figuree1),
        (("headlines", "clip_vit_b32", "backbone soup minus zero-shot, CIFAR-100"),),
    ),
    "figuref1": Artefact(
        "averages of the ends of one-dimensional grids",
        tuple(f"figuref1_{grid}" for grid in ("optimizer", "augment", "lr")),
        ("demo_grids",),
        each(figuref1),
    ),
    "figureg1": Artefact(
        "FMoW and iWildCam, CLIP ViT-L",
        ("figureg1_fmow", "figureg1_iwildcam"),
        DEMO,
        _scatter("figureg1"),
    ),
    "figureg2": Artefact("CIFAR-10 against CIFAR-10.1", ("figureg2_cifar10",), DEMO, _scatter("figureg2")),
    "figureg3": Artefact(
        "a pool from an initialisation without contrastive pretraining",
        ("figureg3_in22k",),
        ("demo_imagenet_init",),
        _scatter("figureg3"),
    ),
    "figureg4": Artefact(
        "models that differ by seed alone, of two initialisations",
        ("figureg4_clip", "figureg4_in22k"),
        ("demo_seeds_only", "demo_imagenet_init"),
        each(figureg4),
    ),
    "figureh1": Artefact("as B.1: linear probe, standard grid", ("standard_lp",), ("demo_grid_lp",), each(figureh1)),
    "figureh2": Artefact("as B.1: linear probe, extreme grid", ("extreme_lp",), ("demo_extreme_lp",), each(figureh2)),
    "figureh3": Artefact(
        "as B.1: zero-shot, standard grid", ("standard_zeroshot",), ("demo_grid_zeroshot",), each(figureh3)
    ),
    "figureh4": Artefact(
        "as B.1: zero-shot, extreme grid", ("extreme_zeroshot",), ("demo_extreme_zeroshot",), each(figureh4)
    ),
    "figurej1": Artefact(
        "error landscape at a ten times larger learning rate",
        ("figurej1_landscape",),
        ("demo_landscape_high_lr",),
        each(figurej1),
    ),
    "figurek1": Artefact("approximation (1) against the truth", ("extreme_lp",), ("demo_extreme_lp",), each(figurek1)),
    "figurel1": Artefact(
        "soups of averages along training (EMA, SWA)", ("figurel1_clip",), ("demo_ema_swa",), each(figurel1)
    ),
    "figurel2": Artefact(
        "the same, from an initialisation pretrained on labels",
        ("figurel2_in22k",),
        ("demo_imagenet_init",),
        each(figurel2),
    ),
    "figurel3": Artefact("Figure 1 with all methods of Table 3", TABLE3, DEMO, each(figurel3)),
}

MORE = {  # no figures of the paper, drawn by the same command
    "reliability": Artefact("reliability diagrams before and after a temperature", (), (), each(figure_reliability))
}


DRAWN = ARTEFACTS | MORE  # all that `artefact=` may name; `all` means the paper's


FORWARD = "forward"  # as artefact=forward: all of NEED_FORWARD
NEED_FORWARD = (  # those that evaluate soups or points of a plane which no recipe made, and keep what they answer
    *("figure2", "figure3", "figure4", "figureb1", "figureb2", "figured1", "figuree1", "figuref1", "figureg4"),
    *("figureh1", "figureh2", "figureh3", "figureh4", "figurej1", "figurek1", "figurel1", "figurel2"),
    *("tablel1", "tablel2", "tablel3"),
)


def forward_artefacts(experiment: str) -> list[str]:
    """The tables and figures of an experiment that need forward passes of their own, which a GPU does fast.

    >>> forward_artefacts("table3_clip_b32")
    ['figure4', 'figureb1', 'figured1']
    """
    return [name for name in NEED_FORWARD if ARTEFACTS[name].is_of(experiment)]


def named(name: str) -> list[str]:
    """Artefacts that `artefact=name` means: itself, all, or those that need forward passes of their own.

    Raises:
        UserError: there is none of this name.
    """
    if name == FORWARD:
        return list(NEED_FORWARD)
    if name != "all" and name not in DRAWN:
        raise UserError(f"artefact={name}: there is no such table or figure; python -m analysis list names all")
    return list(ARTEFACTS) if name == "all" else [name]


def parts_of(name: str, configs: Sequence[Experiment]) -> list[Experiment]:
    """Those of the experiments that an artefact is made of, in its order."""
    artefact = DRAWN[name]
    by_name = {config.name: config for config in configs}
    return [by_name[each] for each in (*artefact.paper, *artefact.embedded) if each in by_name]


def draw(config: Experiment, name: str, configs: Sequence[Experiment], console: Console) -> list[Path]:
    """Make an artefact, record where it comes from, and publish it where `paths.results` is set.

    Args:
        config: that was asked for; says where results go.
        name: of the artefact.
        configs: finished experiments it is made of.
        console: for progress.

    Raises:
        UserError: one is not finished, or is of another shape than the artefact needs.
    """
    files = DRAWN[name].draw(configs, console)
    homes = {RunFolder.of(each).analysis: each for each in configs}
    for folder, each in homes.items():
        if any(file.parent == folder for file in files):
            record = {"artefact": name, "experiment": each.name, "sweep_seed": each.sweep.seed, "rows": each.sweep.size}
            record["date"] = datetime.now(timezone.utc).date().isoformat()
            write_json(folder / f"{name}_provenance.json", record | provenance())
            files.append(folder / f"{name}_provenance.json")
    if config.paths.results is None:
        return files
    return [publish(file, config.paths.results, homes[file.parent].name) for file in files]


def paper_numbers(name: str) -> str:
    """What the paper says, for `python -m analysis list`; empty where no number was recovered.

    >>> paper_numbers("table3")
    'greedy test 81.03, best test 80.38, uniform test 79.97'
    """
    found = []
    for table, row, column in ARTEFACTS[name].numbers:
        numbers = paper_table(table)
        value = numbers[(numbers["row"] == row) & (numbers["column"] == column)]["value"]
        found.append(f"{row} {column} {value.item():g}")
    return ", ".join(found)


def measured_files(name: str) -> list[Path]:
    """The numbers of an artefact that were measured and committed, one csv an experiment."""
    artefact = ARTEFACTS[name]
    found = []
    for experiment in (*artefact.paper, *artefact.embedded):
        stems = (f"{experiment}_{name}", f"{experiment}_{name}_with_paper")
        found += [MEASURED / f"{stem}.csv" for stem in stems if (MEASURED / f"{stem}.csv").exists()]
    return found
