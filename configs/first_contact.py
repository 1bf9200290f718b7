"""What a new user meets first: another Python, missing packages, no room on the disk. Each is one line with its remedy.

The packages that are commands import this before anything that is not in the standard library, and old versions of
Python read it: nothing here is newer than Python 3.6. Imported by a library or a test it does nothing.
"""

import importlib.util
import os
import shutil
import sys

OLDEST, NEWEST = (3, 10), (3, 13)
# Import names of requirements.txt, without those of tests and of tracking.
NEEDED = (
    *("hydra", "omegaconf", "pydantic", "numpy", "torch", "torchvision", "safetensors", "timm", "open_clip"),
    *("transformers", "datasets", "pandas", "pyarrow", "scipy", "sklearn", "threadpoolctl", "matplotlib", "PIL"),
    *("simplejpeg", "rich", "tabulate", "xxhash", "yaml"),
)
ROOM = 8 * 10**9  # bytes of an environment, of which torch is most


def python_problem(version: "tuple[int, ...]") -> str:
    """Why this version of Python will not do, or an empty string.

    >>> python_problem((3, 9, 18))
    'Python 3.10 to 3.13 is needed, and this is 3.9: try python3.12, or make PYTHON=python3.12 setup'
    """
    if tuple(version[:2]) >= OLDEST:
        return ""
    found = ".".join(map(str, version[:2]))
    wanted = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    return f"Python {wanted} is needed, and this is {found}: try python3.12, or make PYTHON=python3.12 setup"


def missing_packages(needed: "tuple[str, ...]" = NEEDED) -> str:
    """What is not installed and what to do, or an empty string."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return f"{sys.executable} lacks {shown}: `make setup`, then .venv/bin/python; or pip install -r requirements.txt"


def room_problem(folder: str, free: int) -> str:
    """Why an environment does not fit into a folder whose disk has so many bytes left, or an empty string."""
    if free >= ROOM:
        return ""
    return (
        f"an environment takes {ROOM / 1e9:.0f} GB, and the disk of {folder} has {free / 1e9:.1f} GB left: "
        "free some, or name a folder elsewhere with make VENV=FOLDER setup"
    )


def free_bytes(folder: str) -> int:
    """On the disk where a folder is, or will be."""
    path = os.path.abspath(folder)  # noqa: PTH100 - pathlib of 3.6 has no such disk_usage
    while not os.path.exists(path):  # noqa: PTH110
        path = os.path.dirname(path)  # noqa: PTH120
    return shutil.disk_usage(path).free


def refuse(problem: str) -> None:
    """End the process with a line on stderr, where there is a problem."""
    if problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)


def is_command(argv: "list[str]") -> bool:
    """Whether this process was started as one of the project's commands.

    While `python -m PACKAGE` imports the package, sys.argv[0] is "-m".
    """
    return bool(argv) and (argv[0] == "-m" or os.path.basename(argv[0]) == "reproduce.py")  # noqa: PTH119


if __name__ == "__main__":  # the Makefile starts it: python configs/first_contact.py .venv
    refuse(python_problem(tuple(sys.version_info[:3])))
    refuse(room_problem(sys.argv[1], free_bytes(sys.argv[1])))
elif is_command(sys.argv):
    refuse(python_problem(tuple(sys.version_info[:3])))
    refuse(missing_packages())
