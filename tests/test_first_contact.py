"""What a new user meets first, tried as one would: every answer is a line that says what to do."""

import ast
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.errors import UserError
from configs.first_contact import NEEDED, ROOM, free_bytes, is_command, missing_packages, python_problem, room_problem
from configs.schema import load
from slurm.jobs import left_rows
from soups.errors import PACKAGES, one_line_errors
from tests.commands import here, python, status_of

pytestmark = pytest.mark.slow  # dozens of commands are started

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
# What tracking, exports to ONNX, rebuilding the data and a benchmark need.
OPTIONAL = {"wandb", "onnx", "onnxruntime", "resvg_py", "skimage", "mergekit", "curvlinops"}
STARTS = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)


def command_of(path):
    """What is typed to start a file."""
    if path.name == "reproduce.py":
        return ["reproduce.py"]
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return ["-m", module.removesuffix(".__main__")]


COMMANDS = [command_of(path) for path in [*FILES, ROOT / "reproduce.py"] if STARTS.search(path.read_text())]
COMMANDS.remove(["-m", "configs.first_contact"])  # what the Makefile asks before there is an environment


def start(python, words, **more):
    return subprocess.run([python, *words], cwd=ROOT, capture_output=True, text=True, check=False, **more)


def refused(answer):
    """The one line that a command ended with."""
    assert answer.returncode == 2, (answer.stdout, answer.stderr)
    (line,) = answer.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python without a single package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin/python"


def old_python():
    """One that is older than what is supported, where this machine has one."""
    known = [*Path.home().glob(".pyenv/versions/3.*/bin/python"), *(shutil.which(f"python3.{i}") for i in range(6, 10))]
    for known_python in filter(None, map(str, known)):
        code = "import sys; sys.exit(sys.version_info >= (3, 10))"
        if subprocess.run([known_python, "-c", code], capture_output=True, check=False).returncode == 0:
            return known_python
    return pytest.skip("there is no Python before 3.10 here")


def test_there_are_commands():
    assert all(words in COMMANDS for words in (["-m", "soups"], ["-m", "soups.experiment.export"], ["reproduce.py"]))
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_without_packages_says_what_to_install(words, bare):
    line = refused(start(bare, words))
    assert re.search("lacks (hydra|numpy), .*`make setup`.* pip install -r requirements.txt", line), line


@pytest.mark.parametrize("words", ["-m soups", "-m soups.experiment.export", "-m tasks.check", "reproduce.py"])
def test_an_old_python_is_told_which_ones_will_do(words):
    assert "Python 3.10 to 3.13 is needed, and this is 3." in refused(start(old_python(), words.split()))


def test_make_with_an_old_python_is_told_so_before_anything_is_set_up(tmp_path):
    answer = start("make", [f"PYTHON={old_python()}", f"VENV={tmp_path / 'environment'}", "setup"])
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: Python 3.10 to 3.13 is needed, ")
    assert not (tmp_path / "environment").exists()


def test_the_first_file_is_read_by_old_versions_of_python():
    for path in [ROOT / "configs/first_contact.py", *(ROOT / package / "__init__.py" for package in PACKAGES)]:
        if path.exists():
            ast.parse(path.read_text(), feature_version=(3, 6))


def test_what_is_needed_is_what_is_imported():
    standard = sys.stdlib_module_names
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.split(".")[0] for name in names}
    found -= standard | set(PACKAGES) | OPTIONAL | {"reproduce"}
    assert found <= {*NEEDED, "tokenizers", "jinja2", "huggingface_hub", "torchdata", "pydantic_core", "markupsafe"}
    assert missing_packages() == ""
    assert "lacks nothing_like_it" in missing_packages(("torch", "nothing_like_it"))


def test_an_environment_that_does_not_fit_is_refused_by_commands_alone(tmp_path):
    assert is_command(["-m", "x"]) and is_command(["/a/reproduce.py", "experiment=demo"])
    assert not is_command(["/a/pytest"]) and not is_command([])
    assert python_problem((3, 10, 0)) == python_problem((3, 13, 5)) == ""
    assert "this is 3.9" in python_problem((3, 9, 18))
    assert room_problem(".venv", ROOM) == ""
    assert "takes 8 GB, and the disk of .venv has 0.5 GB left" in room_problem(".venv", ROOM // 16)
    assert free_bytes(str(tmp_path / "not/there")) > 0


def test_make_on_a_small_disk_is_told_so_before_anything_is_set_up():
    with small_disk("4m") as folder:
        answer = start("make", [f"PYTHON={sys.executable}", f"VENV={folder / 'environment'}", "setup"])
        assert answer.returncode == 2
        assert "error: an environment takes 8 GB, and the disk of " in answer.stderr
        assert not list(folder.iterdir())


@contextmanager
def small_disk(size):
    """A file system of a given size, or a skipped test."""
    folder = Path("/dev/shm") / f"model-soups-small-{os.getpid()}"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def test_tests_on_a_small_disk_are_told_so_before_any_of_them_runs():
    with small_disk("4m") as folder:
        words = ["-m", "pytest", "-n", "0", "tests/test_layout.py"]
        answer = start(sys.executable, words, env=os.environ | {"TMPDIR": str(folder)})
        assert answer.returncode == 2
        assert "tests write up to 6 GB, and " in answer.stdout + answer.stderr
        assert "passed" not in answer.stdout


def test_a_disk_that_fills_up_under_a_soup_is_one_line(tmp_path):
    save_file({"w": torch.ones(1_000_000)}, tmp_path / "a.safetensors")
    with small_disk("1m") as folder:
        for name in ("soup.safetensors", "soup.pt"):
            words = ["uniform", str(tmp_path / "a.safetensors"), "--out", str(folder / name)]
            assert "no space left on the disk" in refused(start(python(), ["-m", "soups", *words]))
            assert not list(folder.iterdir())
        small = os.environ | {"TMPDIR": str(folder)}
        answer = start(sys.executable, ["-m", "soups", *words[:-1], str(tmp_path / "b.pt")], env=small)
        assert "or have TMPDIR name a folder on a larger disk, and run the same again" in refused(answer)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words):
    starts_itself_anew = words == ["-m", "embedded.pretrain"]
    answer = start(python(), [*words, "--help"]) if starts_itself_anew else here([*words, "--help"])
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.splitlines()) >= 3 and "Hydra" not in answer.stdout


def test_what_analysis_is_to_do_may_stand_anywhere_among_its_words():
    assert here(["-m", "analysis", "list", "--help"]).stdout.startswith("Tables and figures of finished experiments")
    assert here(["-m", "analysis", "claims", "a=1"]).stderr == (
        "error: python -m analysis claims takes no settings: leave out a=1\n"
    )
    answer = here(["-m", "analysis", "experiment=demo", "report", "sweep.index=99"])
    assert answer.stderr == "error: bad config: sweep.index=99 is past the last row, 12\n"


def test_the_tests_meet_rows_of_other_settings_and_never_the_runs_of_a_person():
    """`make demo` comes before `make test`: conftest.py keeps every test out of what it left behind."""
    with pytest.raises(UserError, match=r"rows 0, 1 of runs/demo were made with other settings than these"):
        left_rows(load("demo", "cluster=slurm_cpu"))
    with pytest.raises(AssertionError, match=r"without paths\.runs it works in the clone's"):
        start(python(), ["-m", "slurm.status", "experiment=demo", "cluster=slurm_cpu"])


def test_missing_data_are_one_line(tmp_path):
    words = ["experiment=own_images", "task.folder=nowhere", "task.num_classes=3", f"paths.runs={tmp_path}"]
    answer = here(["-m", "finetune", *words])
    assert answer.returncode == 2
    (line,) = [line for line in answer.stderr.splitlines() if "error" in line]
    assert "nowhere" in line and "task.folder" in line and "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "run the same command again to continue"),
        (UserError("no"), 2, "error: no\n"),
        (ModuleNotFoundError(name="torchdata"), 2, "torchdata"),
        (PermissionError(errno.EACCES, "Denied", "/a/b"), 2, "error: /a/b cannot be read or written (Denied): name an"),
        (KeyError(1), 1, "Traceback"),
    ],
)
def test_exit_statuses_and_a_line(error, status, words, capsys):
    def raising():
        raise error

    assert status_of(lambda: one_line_errors(raising)) == status
    printed = capsys.readouterr().err
    assert words in printed and ("Traceback" in printed) == (status == 1) == (printed.count("\n") > 1)


def test_ctrl_c_ends_a_stage_with_130(tmp_path):
    words = ["-m", "finetune", "experiment=demo_tiny", "sweep.index=0", f"paths.runs={tmp_path}"]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which jobs in the background ignore
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True, "preexec_fn": heed}
    process = subprocess.Popen([python(), *words], cwd=ROOT, **pipes)
    deadline = time.monotonic() + 60
    while not (tmp_path / "demo_tiny").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "run the same command again to continue" in printed and "Traceback" not in printed


@pytest.mark.parametrize("length", [10, 10**6])  # held back until the end, and written at once
def test_a_command_whose_output_nobody_reads_ends_without_a_traceback(length):
    read, write = os.pipe()
    os.close(read)
    work = f"from soups.errors import one_line_errors as run; run(lambda: print('a' * {length}))"
    call = [sys.executable, "-c", work]
    answer = subprocess.run(call, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (answer.returncode, answer.stderr) == (128 + signal.SIGPIPE, "")
