"""Notebooks answer a question from RUN: of committed results and of a run of yours. None of them trains."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from IPython.display import Markdown
from matplotlib.figure import Figure
from nbclient import NotebookClient

from analysis.artefacts import results_of
from analysis.tables.table3 import analyse
from configs.cli import record_words
from configs.errors import UserError
from soups.experiment.soups import make_soup
from soups.files.atomic import read_json
from store.runs import RunFolder
from tests.commands import python
from tests.pools import finished_pool, small_network

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SOUP_BETTER = ROOT / "notebooks/is_my_soup_better.ipynb"
QUICK = ("is_my_soup_better", "two_checkpoints")  # the others draw six figures and more, each tested by itself


def cells_of(path, kind="code"):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]
    return [re.sub(r"^%.*$", "", cell, flags=re.MULTILINE) for cell in cells]


def played(path, run=None):
    """What each code cell of a notebook shows, in this process, with RUN set to another folder where one is given."""
    names, shown = {"__name__": "__main__"}, []
    for cell in cells_of(path):
        tree = ast.parse(cell)
        for node in tree.body:
            if run and isinstance(node, ast.Assign) and node.targets[0].id == "RUN":
                node.value = ast.copy_location(ast.Constant(str(run)), node.value)
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), names)
        shown.append(last and eval(compile(last, path.name, "eval"), names))
    return shown


@every_notebook
def test_a_notebook_asks_a_question_has_a_run_to_set_and_says_in_words_what_is_seen(path):
    first, *rest = cells_of(path, "markdown")
    assert first.startswith("# ")
    assert "RUN" in first
    assert any(re.search(r"^RUN = ", cell, re.MULTILINE) for cell in cells_of(path))
    assert len(rest) >= 2
    last = nbformat.read(path, as_version=4).cells[-1]
    assert (last.cell_type, last.source[:2]) == ("markdown", "**")


@every_notebook
def test_a_notebook_is_short_and_trains_nothing(path):
    assert len(nbformat.read(path, as_version=4).cells) <= 18
    tree = ast.parse("\n".join(cells_of(path)))
    defined = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert defined == (["score"] if path.stem == "two_checkpoints" else [])  # the score is the reader's own
    imported = {node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"finetune", "models"}


@every_notebook
def test_what_is_committed_shows_pictures_or_tables_and_no_warning_of_a_machine(path):
    outputs = [each for cell in nbformat.read(path, as_version=4).cells for each in cell.get("outputs", [])]
    assert any("image/png" in each.get("data", {}) for each in outputs)
    assert not [each for each in outputs if each.output_type == "error" or each.get("name") == "stderr"]


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else pytest.mark.slow) for p in NOTEBOOKS]
)
def test_a_notebook_runs_on_what_is_committed(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shown = played(path)
    assert any(isinstance(each, Figure) for each in shown)
    for each in shown:
        assert not isinstance(each, Figure) or each.axes
        assert not isinstance(each, Markdown) or "|" in each.data


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """The folder of a finished run: three models, moved by chance, of ten classes."""
    runs = tmp_path_factory.mktemp("runs")
    settings = ["recipes=[best,uniform,greedy]", "cluster.workers=1"]
    settings += small_network(tmp_path_factory.mktemp("network"))
    config, evaluator = finished_pool(runs, *settings)
    for recipe in config.recipes:
        make_soup(recipe, evaluator)
    analyse(config)
    typed = ["experiment=demo_tiny", "task.classes=10", "analysis.resamples=200", *settings, f"paths.runs={runs}"]
    record_words(config, typed)
    return RunFolder.of(config).root


def test_my_own_run_answers_whether_its_soup_is_better_and_what_greedy_decided(own_run, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = played(SOUP_BETTER, own_run)
    printed = capsys.readouterr().out
    record = read_json(own_run / "soups/greedy/soup.json")
    kept, tried = len(record["ingredients"]), len(record["trials"])
    assert f"Greedy soup of {kept}: test " in printed
    assert "over the best single model: " in printed
    assert "of 3 on test" in printed
    assert f"{kept} of {tried} models are in the soup." in printed
    decisions = results_of(str(own_run)).decisions()
    assert decisions["held_out"].tolist() == [trial["score"] for trial in record["trials"]]
    kept_before = [trial["score"] for trial in record["trials"] if trial["accepted"]]
    assert decisions["before"].iloc[1] == kept_before[0]
    assert sum(isinstance(each, Figure) for each in shown) == 3


def test_a_run_that_is_none_and_what_a_run_lacks_say_what_to_type(own_run, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"RUN=.*/nothing: neither a run's folder nor"):
        results_of(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"figure3.csv is missing: type python -m analysis artefact=figure3 run=.*tiny"):
        results_of(str(own_run)).draw("figure3")
    with pytest.raises(UserError, match="has no record of greedy_ensemble"):
        results_of(str(own_run)).decisions("greedy_ensemble")
    monkeypatch.chdir(ROOT)
    kept = results_of("results/measured/demo_seeds_seed1")
    assert kept.config.sweep.seed == 1
    with pytest.raises(UserError, match="RUN needs the folder of a run"):
        kept.decisions()


@pytest.mark.slow
def test_a_kernel_runs_a_notebook_from_its_own_folder_and_shows_its_figure(tmp_path, monkeypatch):
    words = [python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    place = tmp_path / "kernels/quick/kernel.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"argv": words, "display_name": "quick", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = nbformat.read(ROOT / "notebooks/two_checkpoints.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.get("outputs", []).clear()
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=120, kernel_name="quick", resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert "image/png" in {kind for output in shown for kind in output["data"]}
