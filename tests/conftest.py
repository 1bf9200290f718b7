"""How the tests are spread over processes, and what they need of the machine."""

import multiprocessing.spawn
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

# Two files of tests run side by side, each of which starts processes: with a thread a core in all of them, they would
# wait for each other. Before anything loads torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # as store.workers has them
ROOM = 6 * 10**9  # bytes; all tests at once have been seen to hold 3.8e9
ROOT = Path(__file__).resolve().parents[1]
IN_RUNS = {
    "finetune",
    "eval",
    "soups",
    "analysis",
    "slurm.status",
    "slurm.retry",
    "reproduce.py",
    "tasks.check",
}  # commands


class OneCluster(LoadFileScheduling):
    """A file to a process, and all of tests/cluster to the same one, since a machine has one Slurm."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)


def pytest_configure(config):
    """One quick python for all processes that run tests, which takes seconds to load its libraries."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        from tests.commands import SHARED, begin

        os.environ[SHARED] = begin()


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_make_scheduler(config, log):
    return OneCluster(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_sessionstart(session):
    """A disk that fills up under the tests fails hundreds of them, each with another message."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < ROOM and not hasattr(session.config, "workerinput"):
        pytest.exit(
            f"tests write up to {ROOM / 1e9:.0f} GB, and {folder} has {free / 1e9:.1f} GB left: free some, or name a "
            "folder elsewhere with TMPDIR=FOLDER",
            returncode=2,
        )


def reads_the_clones_runs(words, cwd):
    """Whether a command would work in the clone's runs/, which may hold a person's results."""
    if isinstance(words, str | bytes | os.PathLike) or Path(cwd or Path.cwd()).resolve() != ROOT:
        return False
    typed = [str(word) for word in words]
    of_data = "tasks.check" in typed and any(word.startswith("task.folder=") for word in typed)  # keeps its lists there
    if "--help" in typed or not (of_data or any(word.startswith("experiment=") for word in typed)):
        return False
    return not IN_RUNS.isdisjoint(typed) and not any(word.startswith("paths.runs=") for word in typed)


@pytest.fixture(scope="session", autouse=True)
def quick_workers():
    """A worker process that a test's own process starts is spared the import of libraries, as commands are."""
    from tests.commands import python

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.spawn, "get_executable", lambda: os.fsencode(python()))
        yield


@pytest.fixture(scope="session", autouse=True)
def kept_answers():
    """Experiments are loaded from answers of Hydra that are kept."""
    from tests.composing import composed  # Hydra is not loaded where no test runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("configs.schema.composed", composed)
        yield


@pytest.fixture(autouse=True)
def same_threads():
    """A stage that a test calls in its own process leaves no more threads to the next: scipy's BLAS has crashed so."""
    before = {name: os.environ.get(name) for name in POOLS}
    yield
    if {name: os.environ.get(name) for name in POOLS} != before:
        for name, threads in before.items():
            os.environ.pop(name, None) if threads is None else os.environ.update({name: threads})
        import threadpoolctl
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        threadpoolctl.threadpool_limits(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def same_path():
    """Where modules are found is as it was after each test: a score `module:function` adds the folder that it is in.

    A module of a test's own folder is forgotten, since another test may have one of the same name.
    """
    before, loaded, folder = list(sys.path), set(sys.modules), tempfile.gettempdir()
    yield
    sys.path[:] = before
    for name in sys.modules.keys() - loaded:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(folder):
            del sys.modules[name]


@pytest.fixture(scope="module")
def one_thread():
    """Small products wait for each other in several, where sums have other last digits."""
    import torch  # not loaded where no test runs

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def in_process(one_thread):  # as a worker has
    """What commands would spread over processes is done in that of the tests, where patches hold, in a whole module."""
    from tests.pools import Here

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.workers._pool", lambda workers, threads: Here())
        yield


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """A folder with all of soups.made_up, which nobody writes into."""
    from soups.made_up import make

    folder = tmp_path_factory.mktemp("made_up")
    make(folder)
    return folder


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory):
    """A folder with its images and texts alone, networks of transformers; nobody writes into it either."""
    from soups.made_up import make_hugging_face

    folder = tmp_path_factory.mktemp("hugging_face")
    make_hugging_face(folder / "images", folder / "texts")
    return folder


@pytest.fixture(scope="session", autouse=True)
def foreign_runs(tmp_path_factory):
    """Work in a folder whose runs/ has rows of other settings under the name of every experiment.

    A test that forgets paths.runs reads them and fails, as it would after `make demo`; a command that it starts in the
    clone must name its runs; and nothing may be written here.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    from configs.registered import experiments  # Hydra is not loaded where no test runs

    for name in experiments():
        for own in ("", "seed0", "seed1", "seed2"):
            for made in ("ingredients/000", "ingredients/001", "zero_shot"):
                row = folder / "runs" / name / own / made
                row.mkdir(parents=True)
                (row / "done.json").write_text('{"identity": "foreign"}')
    before = sorted(folder.rglob("*"))
    start = subprocess.Popen.__init__

    def checked(process, args, *others, **named):
        assert not reads_the_clones_runs(args, named.get("cwd")), f"without paths.runs it works in the clone's: {args}"
        start(process, args, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(subprocess.Popen, "__init__", checked)
        yield folder / "runs"
    assert sorted(folder.rglob("*")) == before, "a test wrote into the runs/ of its working directory"
