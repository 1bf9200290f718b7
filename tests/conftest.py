"""How the tests are spread over processes."""

import pytest
from xdist.scheduler import LoadFileScheduling


class OneCluster(LoadFileScheduling):
    """A file to a process, and all of tests/cluster to the same one, since a machine has one Slurm."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_make_scheduler(config, log):
    return OneCluster(config, log) if config.getvalue("dist") == "loadfile" else None
