"""Whether tests catch faults: each line of faults.csv is planted in a copy of the tree, where its test has to fail.

    python -m tests.faults                  all of them, some seconds each
    python -m tests.faults soups/ eval/     those in files whose path begins so

A line has the file, what stands in it exactly once (before), what takes its place (after), what a user could no longer
rely on (claim) and what pytest is to run (test). Every test is run without a fault first: one that fails there proves
nothing. The exit status is 1 where a fault was not caught.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests/faults.csv"
ENDED = re.compile(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", re.MULTILINE)
LIMIT = 1800  # seconds for the tests of one fault, however busy the machine is
FAILED = 1  # pytest's exit status for tests that fail; others are for tests that did not even start


@dataclass(frozen=True)
class Fault:
    """One line of the table."""

    file: str
    before: str
    after: str
    claim: str
    test: str


def faults() -> list[Fault]:
    """All lines of the table."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [Fault(**line) for line in csv.DictReader(file)]


def copy_tree(copy: Path) -> None:
    """Copy the working tree without what git ignores."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # deleted ones are listed too
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)


def planted(fault: Fault) -> str:
    """The text of the file with the fault in it.

    Raises:
        ValueError: what is to be replaced does not stand there exactly once.
    """
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    if text.count(fault.before) != 1:
        raise ValueError(f"{fault.file} has {fault.before!r} {text.count(fault.before)} times")
    return text.replace(fault.before, fault.after)


def run_tests(python: str, copy: Path, tests: Sequence[str], *options: str) -> tuple[int, list[str], str]:
    """pytest's exit status, the ids of the tests that failed, and the end of what it printed."""
    words = [python, "-m", "pytest", *tests, *options, "-o", "addopts=", "-q"]
    try:
        done = subprocess.run(words, cwd=copy, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return -1, [], f"no end within {LIMIT} s"
    return done.returncode, ENDED.findall(done.stdout), (done.stdout + done.stderr)[-2000:]


def main(words: Sequence[str]) -> int:
    """Plant the faults in files that begin with one of some words, or all, and return the exit status."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    from tests.commands import python

    chosen = [fault for fault in faults() if not words or fault.file.startswith(tuple(words))]
    tests = list(dict.fromkeys(fault.test for fault in chosen))
    if not chosen:
        print(f"no fault is in a file whose path begins with {' or '.join(words)}")
        return 1
    caught = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy = Path(folder)
        copy_tree(copy)
        status, broken, text = run_tests(python(), copy, tests)
        if status not in (0, FAILED):
            print(text)
            return 1
        for fault in chosen:
            own = f"{fault.test}::"
            if proves_nothing := [test for test in broken if f"{test.partition('[')[0]}::".startswith(own)]:
                print(f"REFUSED {fault.file}: {proves_nothing[0]} fails without the fault", flush=True)
                continue
            (copy / fault.file).write_text(planted(fault), encoding="utf-8")
            status, failed, text = run_tests(python(), copy, [fault.test], "-x")
            shutil.copy2(ROOT / fault.file, copy / fault.file)  # with its time, by which Python knows what it compiled
            if status == FAILED:
                caught += 1
                print(f"{fault.file}: {fault.claim}: {failed[0]}", flush=True)
            else:
                print(f"NOT CAUGHT {fault.file}: {fault.claim}" + (f"\n{text}" if status else ""), flush=True)
    print(f"{caught} of {len(chosen)} faults were caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
