"""How the tests are spread over processes, and what they need of the machine."""

import os
import shutil
import tempfile

import pytest
from xdist.scheduler import LoadFileScheduling

# Two files of tests run side by side, each of which starts processes: with a thread a core in all of them, they would
# wait for each other. Before anything loads torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOM = 6 * 10**9  # bytes; all tests at once have been seen to hold 3.8e9


class OneCluster(LoadFileScheduling):
    """A file to a process, and all of tests/cluster to the same one, since a machine has one Slurm."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)


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
