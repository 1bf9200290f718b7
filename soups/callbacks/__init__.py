"""Averages along one run while it trains: `from soups.callbacks import TrainerAverage, LightningAverage`.

Each is loaded with its library, which this one does not require.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soups.callbacks.lightning import LightningAverage
    from soups.callbacks.transformers import TrainerAverage

__all__ = ["LightningAverage", "TrainerAverage"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'soups.callbacks' has no attribute {name!r}")
    return getattr(import_module(f"soups.callbacks.{'lightning' if name[0] == 'L' else 'transformers'}"), name)
