"""The paper's 33 artefacts are all there, and made of experiments that exist."""

import importlib
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from analysis.artefacts import (
    ARTEFACTS,
    DRAWN,
    MEASURED,
    NUMBERS,
    draw,
    measured_experiment,
    measured_files,
    named,
    paper_numbers,
    parts_of,
    redraw,
    state,
)
from analysis.claims import POOLS, gain_figure
from analysis.figures.style import save
from analysis.subpools import write_pays
from analysis.will_it_help import write_will_it_help
from configs.cli import parts_of as parts_of_experiment
from configs.errors import UserError
from configs.schema import load
from soups.experiment.soups import make_soups
from tests.commands import here
from tests.experiments import EXPERIMENTS
from tests.pools import finished_pool


def test_there_are_10_tables_and_23_figures():
    tables = [name for name in ARTEFACTS if name.startswith("table")]
    assert (len(tables), len(ARTEFACTS) - len(tables)) == (10, 23)


def test_every_experiment_behind_them_exists_and_belongs_to_paper_or_demo_full():
    named_there = {each for artefact in ARTEFACTS.values() for each in (*artefact.paper, *artefact.embedded)}
    assert named_there <= set(EXPERIMENTS) | {"released"}
    whole = set(load("demo_full").parts) | set(load("paper").parts) | {"released"}
    assert named_there <= whole


@pytest.mark.slow
def test_demo_full_has_a_part_for_each_artefact():
    parts = parts_of_experiment(load("demo_full"), [])
    assert {part.name for part in parts} == set(load("demo_full").parts)
    assert all(parts_of(name, parts) for name in ARTEFACTS)


@pytest.mark.slow
def test_what_is_typed_reaches_every_part_but_not_what_names_the_whole():
    typed = ["experiment=demo_full", "artefact=all", "paths.runs=elsewhere", "analysis.resamples=7"]
    parts = parts_of_experiment(load("demo_full"), typed)
    assert {str(part.paths.runs) for part in parts} == {"elsewhere"}
    assert {part.analysis.resamples for part in parts} == {7}
    assert {part.artefact for part in parts} == {None}


def test_every_number_that_is_named_is_in_the_papers_tables():
    assert NUMBERS.keys() < ARTEFACTS.keys()
    for name, numbers in NUMBERS.items():
        assert paper_numbers(name).count(",") >= len(numbers) - 1


def test_an_artefact_that_is_none_is_refused():
    with pytest.raises(UserError, match="artefact=figure9"):
        named("figure9")


def test_what_was_not_measured_says_what_to_run_and_is_not_drawn(tmp_path):
    command = "python reproduce.py experiment=demo_align, then python -m analysis artefact=figure5"
    assert command in state("figure5", tmp_path)
    with pytest.raises(UserError, match=f"figure5 is not measured yet: {command}"):
        redraw("figure5", tmp_path / "out", tmp_path)
    with pytest.raises(UserError, match="artefact=reliability experiment=NAME"):
        redraw("reliability", tmp_path / "out", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["table3", "tablel1", "figureg4"])
def test_what_was_measured_is_made_again_without_runs(tmp_path, name):
    files = redraw(name, tmp_path)
    kept = {file.name: file for file in measured_files(name).values()}
    assert {file.name for file in files if file.suffix == ".csv"} == set(kept)
    assert all((tmp_path / each).read_bytes() == file.read_bytes() for each, file in kept.items())


def committed_figures():
    """The committed pictures of results/measured, and for each how today's code draws it from the csv beside it."""
    found = {}
    for name, artefact in DRAWN.items():
        for experiment, file in measured_files(name).items() if not artefact.is_table else ():
            found[file.stem] = partial(artefact.shown, [measured_experiment(experiment)])
    return found | {"claims_gain": gain_figure}


@pytest.mark.slow
def test_every_committed_figure_has_a_csv_that_it_is_drawn_from():
    drawn = set(committed_figures()) | {"subpools_gain", "will_it_help"}
    assert drawn == {path.stem for path in MEASURED.glob("*.png")} == {path.stem for path in MEASURED.glob("*.pdf")}


def same_picture(drawn):
    """Whether a file shows what the committed one of its name does."""
    with Image.open(MEASURED / drawn.name) as kept, Image.open(drawn) as new:
        # Another machine may shade a pixel otherwise; a word that changed is a hundred pixels in black and white.
        return kept.size == new.size and np.abs(np.asarray(kept, float) - np.asarray(new, float)).mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("stem", sorted(committed_figures()))
def test_each_committed_figure_is_what_todays_code_draws_from_its_csv(stem, tmp_path):
    save(committed_figures()[stem](pd.read_csv(MEASURED / f"{stem}.csv")), tmp_path / stem)
    assert same_picture(tmp_path / f"{stem}.png")


@pytest.mark.slow
def test_the_figures_of_several_pools_are_what_todays_code_draws_from_their_csvs(tmp_path):
    for file in MEASURED.glob("*.csv"):
        shutil.copy(file, tmp_path)
    write_pays(tmp_path, POOLS)
    write_will_it_help(tmp_path, tmp_path / "table.json")
    assert same_picture(tmp_path / "subpools_gain.png")
    assert same_picture(tmp_path / "will_it_help.png")


def test_no_two_artefacts_are_the_same_picture_of_the_same_runs():
    seen = [(artefact.measure, artefact.show, artefact.embedded) for artefact in ARTEFACTS.values()]
    assert not [each for each in seen if seen.count(each) > 1]
    files = [path for path in MEASURED.iterdir() if path.suffix in (".png", ".csv")]
    assert len({path.read_bytes() for path in files}) == len(files)


def test_every_function_behind_an_artefact_is_where_the_list_says():
    for artefact in ARTEFACTS.values():
        for place in artefact.functions.split():
            module, _, function = place.partition(":")
            assert callable(getattr(importlib.import_module(module), function)), place


def test_an_artefact_is_drawn_recorded_and_published(tmp_path, in_process):
    config, _ = finished_pool(
        tmp_path / "runs", "recipes=[best]", "model.templates=null", "cluster.workers=1", f"paths.results={tmp_path}"
    )
    make_soups(config, config.recipes, Console(quiet=True))
    files = draw(config, "figure1", [config])
    assert [file.name for file in files] == [
        f"demo_tiny_figure1{end}" for end in (".pdf", ".png", ".csv", "_provenance.json")
    ]
    assert all(file.parent == tmp_path for file in files)


def test_the_list_has_each_with_its_state_and_its_functions_whole():
    answer = here(["-m", "analysis", "list"])
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    for name, artefact in ARTEFACTS.items():
        start = next(i for i, line in enumerate(lines) if line.startswith(name))
        assert "measured" in lines[start + 1]
        assert lines[start + 2].endswith(artefact.functions)
    assert "33 tables and figures" in answer.stdout


@pytest.mark.slow
def test_an_artefact_of_another_experiment_says_which_it_is_made_of(tmp_path):
    answer = here(["-m", "analysis", "artefact=tablel1", "experiment=table5", f"paths.runs={tmp_path}"])
    assert answer.returncode == 2
    assert answer.stderr.strip().endswith("made of tablel1_distill, demo_distill, none of which table5 has")


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_an_experiment_of_parts_runs_draws_and_reports_each(tmp_path):
    own = [f"paths.runs={tmp_path}", "recipes=[best,uniform,greedy]"]
    words = ["experiment=demo_full", "parts=[demo_tiny]", *own]
    answer = here(["reproduce.py", *words])
    assert answer.returncode == 0, answer.stderr
    assert "artefact=all experiment=demo_full" in answer.stdout
    assert not (tmp_path / "demo_full").exists()
    answer = here(["-m", "analysis", "artefact=table3", "experiment=demo_tiny", *own])  # of no artefact, but asked for
    assert (tmp_path / "demo_tiny/analysis/table3_with_paper.md").exists(), answer.stderr
    answer = here(["-m", "analysis", "report", *words])
    assert answer.stdout.strip() == str(tmp_path / "demo_tiny/report.html"), answer.stderr
