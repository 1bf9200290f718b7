"""Every fenced bash command of the documentation runs, but those that say what they need."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.artefacts import ARTEFACTS
from benchmarks.all import table
from tests.commands import python
from tests.faults import copy_tree

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "tasks/README.md", ROOT / "slurm/README.md"])
BLOCK = re.compile(
    r"(?P<mark><!-- needs: [^>\n]+ -->\n)?^```(?:bash|sh|console)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)


SMALLER = {"classes: 40": "classes: 10, shifts: [v2]", "rows: 3": "rows: 2", "resamples: 500": "resamples: 100"}


def blocks(page):
    """The commands of a page that need nothing, one script a block, and how many blocks it has."""
    found = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    return [block["code"] for block in found if not block["mark"]], len(found)


RUNNABLE = [page for page in PAGES if blocks(page)[0]]


def in_small(script):
    """The demo's commands on the experiment of the same stages that takes seconds."""
    return re.sub(r"\b(experiment=|runs/)demo\b(?!_)", r"\1demo_tiny", script)


def test_the_pages_have_commands():
    assert {page.name for page in RUNNABLE} >= {"README.md", "cluster.md", "datasets.md", "extend.md", "numbers.md"}


def test_a_mark_says_what_is_needed():
    text = "<!-- needs: a GPU -->\n```bash\nfalse\n```\n\n```bash\ntrue\n```\n"
    found = list(BLOCK.finditer(text))
    assert [(bool(block["mark"]), block["code"]) for block in found] == [(True, "false\n"), (False, "true\n")]


def test_readme_is_for_five_minutes_and_every_page_is_in_the_index():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(" ".join(line for line in lines if not line.startswith("|")).split()) < 1300  # words outside tables
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    absent = [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name}" not in index]
    assert absent == ["README.md"]


def test_every_notebook_and_figure_is_in_the_index_of_notebooks():
    index = (ROOT / "docs/notebooks.md").read_text(encoding="utf-8")
    assert all(f"(../notebooks/{path.name})" in index for path in (ROOT / "notebooks").glob("*.ipynb"))
    rows = " ".join(line.split("|")[1] for line in index.splitlines() if line.startswith("| "))
    named = {word.strip(",;").lower().replace(".", "") for word in rows.split()}
    assert {name.removeprefix("figure").removeprefix("table") for name in ARTEFACTS} <= named


def test_the_answers_on_pages_are_what_the_command_prints():
    printed = (ROOT / "results/measured/claims.md").read_text(encoding="utf-8").split("\n\n")[0]
    assert len(printed.splitlines()) == 2 + 6
    for page in ("README.md", "docs/results.md"):
        assert f"<!-- claims -->\n{printed}\n\n" in (ROOT / page).read_text(encoding="utf-8"), page


def test_the_speeds_on_the_first_page_are_those_that_were_measured():
    assert f"<!-- bench -->\n{table()}\n\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def missing_tests(text):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    return [name for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")]


def test_what_the_comparison_claims_of_this_library_has_a_test_and_of_others_a_place():
    text = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    assert missing_tests(text) == []
    table, _, places = text.partition("Where it is documented:")
    lines = [line for line in table.splitlines() if line.startswith("| ") and "mergekit 0.1.5" not in line]
    rows = [line.split("|")[1:-1] for line in lines]
    assert len(rows) >= 20
    for _, ours, *theirs in rows:
        assert "::" in ours
        for cell in theirs:
            numbers = re.findall(r"\[(\d)\]", cell)
            assert cell.strip() == "-" or (numbers and all(f"\n{number}. " in places for number in numbers)), cell


def test_the_tests_and_experiments_that_stand_beside_the_papers_text_exist():
    lines = (ROOT / "docs/experiments.md").read_text(encoding="utf-8").partition("## Where the paper's text decides")[2]
    rows = [line.split("|")[1:5] for line in lines.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 14
    for _, _, setting, tests in rows:
        assert missing_tests(tests) == []
        assert "::" in tests
        for field in re.findall(r"`(?:task|model|optim|augment|compute|cooking|regularizer|sweep)\.(\w+)", setting):
            schema = "".join((ROOT / "configs" / f"{name}.py").read_text() for name in ("schema", "data", "training"))
            assert f"    {field}: " in schema, field


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project's files, tracked or new, in a folder of their own, so that runs/ is not the user's."""
    folder = tmp_path_factory.mktemp("clone") / "model-soups"
    copy_tree(folder)
    tiny = folder / "configs/experiment/demo_tiny.yaml"  # smaller still: pages show commands, not numbers
    text = tiny.read_text(encoding="utf-8")
    for shipped, smaller in SMALLER.items():
        assert shipped in text
        text = text.replace(shipped, smaller)
    tiny.write_text(text, encoding="utf-8")
    command = folder.parent / "bin/soups"  # as pip installs it
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nexec python -m soups "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, clone):
    places = [clone.parent / "bin", Path(python()).parent, Path(sys.executable).parent, os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(map(str, places))}
    how = {"cwd": clone, "env": environment | {"HF_HUB_OFFLINE": "1"}, "timeout": 900}
    for script in blocks(page)[0]:
        call = ["bash", "-euo", "pipefail", "-c", in_small(script)]
        answer = subprocess.run(call, capture_output=True, text=True, check=False, **how)
        assert answer.returncode == 0, f"{script}\n{answer.stdout[-2000:]}\n{answer.stderr[-2000:]}"
