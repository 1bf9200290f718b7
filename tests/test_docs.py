"""Every fenced bash command of the documentation runs, but those that say what they need."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "tasks/README.md", ROOT / "slurm/README.md"])
BLOCK = re.compile(
    r"(?P<mark><!-- needs: [^>\n]+ -->\n)?^```(?:bash|sh|console)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)


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


def test_links_lead_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project's files, tracked or new, in a folder of their own, so that runs/ is not the user's."""
    folder = tmp_path_factory.mktemp("clone") / "model-soups"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, clone):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for script in blocks(page)[0]:
        answer = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", in_small(script)],
            cwd=clone,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert answer.returncode == 0, f"{script}\n{answer.stdout[-2000:]}\n{answer.stderr[-2000:]}"
