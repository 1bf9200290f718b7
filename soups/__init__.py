"""Model soups: averages of fine-tuned models that are better than the best of them, of files of any library.

>>> import soups
>>> soup = soups.greedy("run/*.ckpt", score=wer, goal="min")  # doctest: +SKIP
>>> print(soup)  # doctest: +SKIP
>>> soup.save("soup/")  # doctest: +SKIP

The functions are in soups/api.py; each module is loaded when it is needed, so that files are averaged without torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soups.api import (
        choices,
        greedy,
        images,
        load,
        model_stock,
        perplexity,
        random_order,
        slerp,
        texts,
        uniform,
        weighted,
        wise_ft,
        with_replacement,
    )
    from soups.coefficients import learned, user_loss
    from soups.errors import UserError
    from soups.soup import Soup
    from soups.task_vectors import arithmetic, dare, ties

__all__ = [
    "Soup",
    "UserError",
    "arithmetic",
    "choices",
    "dare",
    "greedy",
    "images",
    "learned",
    "load",
    "model_stock",
    "perplexity",
    "random_order",
    "slerp",
    "texts",
    "ties",
    "uniform",
    "user_loss",
    "weighted",
    "wise_ft",
    "with_replacement",
]
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
    if name not in __all__:
        now = ": it is called user_loss now" if name == "own_loss" else ""
        raise AttributeError(f"module 'soups' has no attribute {name!r}{now}")
    elsewhere = {"Soup": "soup", "UserError": "errors", "learned": "coefficients", "user_loss": "coefficients"}
    elsewhere |= dict.fromkeys(("arithmetic", "dare", "ties"), "task_vectors")
    module = f"soups.{elsewhere.get(name, 'api')}"
    return getattr(import_module(module), name)
