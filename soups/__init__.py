"""Model soups: averages of fine-tuned models that are better than the best of them, of files of any library.

>>> import soups
>>> soup = soups.greedy("run/*.ckpt", score=wer, goal="min")  # doctest: +SKIP
>>> print(soup)  # doctest: +SKIP
>>> soup.save("soup/")  # doctest: +SKIP

The functions are in soups/api.py, which is loaded when one of them is asked for.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soups.api import *  # noqa: F403

NEEDED = ("numpy", "torch", "safetensors", "xxhash", "yaml")

if sys.argv[:1] == ["-m"]:  # while `python -m soups...` imports the package: say in one line what is not installed
    _problem = ", ".join(name for name in NEEDED if find_spec(name) is None)
    if sys.version_info < (3, 10):  # noqa: UP036
        _problem = f"Python 3.10 to 3.13 is needed, and this is 3.{sys.version_info[1]}"
    elif _problem:
        _remedy = "`make setup`, then .venv/bin/python; or pip install -r requirements.txt"
        _problem = f"{sys.executable} lacks {_problem}: {_remedy}"
    if _problem:
        sys.stderr.write(f"error: {_problem}\n")
        sys.exit(2)


def __getattr__(name: str) -> Any:
    api = import_module("soups.api")
    if name not in api.__all__:
        raise AttributeError(f"module 'soups' has no attribute {name!r}")
    return getattr(api, name)
