"""Notebooks run from what is committed, draw something, train nothing and define nothing."""

import ast
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.commands import python

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(notebook):
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith("%"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_only_draws(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 10
    tree = ast.parse(code_of(notebook))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module.partition(".")[0] for module in imported if module} & {"finetune", "soups", "models", "torch"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_shows_pictures_or_tables_and_no_warning_of_a_machine(path):
    outputs = [each for cell in nbformat.read(path, as_version=4).cells for each in cell.get("outputs", [])]
    assert any("data" in each for each in outputs)
    assert not [each for each in outputs if each.output_type == "error" or each.get("name") == "stderr"]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A running kernel whose libraries are loaded already, for one notebook after another."""
    folder = tmp_path_factory.mktemp("jupyter")
    words = [python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    place = folder / "kernels/quick/kernel.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"argv": words, "display_name": "quick", "language": "python"}))
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=120, kernel_name="quick")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        with client.setup_kernel():
            yield client


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_a_clone_and_shows_what_it_draws(path, client):
    notebook = client.nb = nbformat.read(path, as_version=4)
    # No name of the notebook before is left, and its folder is where Jupyter starts one.
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {path.parent}"))
    for number, cell in enumerate(notebook.cells):
        cell["outputs"] = []
        client.execute_cell(cell, number)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    kinds = {kind for output in shown for kind in output["data"]}
    assert "image/png" in kinds
    assert not (ROOT / "notebooks/runs").exists()
