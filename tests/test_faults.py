"""The table of faults fits the code and the tests that are there; `python -m tests.faults` plants them."""

import pytest

from tests.faults import ROOT, faults, planted


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: f"{fault.file}: {fault.claim}")
def test_a_fault_can_be_planted_and_its_test_exists(fault):
    assert planted(fault) != (ROOT / fault.file).read_text(encoding="utf-8")
    file, _, name = fault.test.partition("::")
    tests = (ROOT / file).read_text(encoding="utf-8")
    assert not name or f"def {name}(" in tests
