"""The table of faults fits the code and the tests that are there; `python -m tests.faults` plants them."""

import pytest

from tests.faults import ROOT, faults


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: f"{fault.file}: {fault.claim}")
def test_a_fault_can_be_planted_and_its_test_exists(fault):
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.before) == 1
    assert fault.after != fault.before
    file, _, name = fault.test.partition("::")
    tests = (ROOT / file).read_text(encoding="utf-8")
    assert not name or f"def {name}(" in tests
