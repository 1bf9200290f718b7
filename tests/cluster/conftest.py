"""The cluster of these tests: started once, when the first of them asks for it."""

import pytest
from real_slurm import obstacle, running


@pytest.fixture(scope="session")
def cluster():
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    with running() as started:
        yield started
