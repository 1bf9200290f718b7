"""How files are to be read: which weights of a file, which tensors of it, and names without those of wrappers."""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from soups.files.folders import HUB

COUNTERS = ("num_batches_tracked", "n_averaged")  # names end so
_COMPILED = re.compile(r"(^|(?<=\.))_orig_mod\.")
_EMA = re.compile(r"(^|_)ema($|_)|^shadow|^averaged?($|_)")


@dataclass(frozen=True)
class Reading:
    """What to take of each file."""

    key: str | None = None  # where a file holds several sets of weights: its key, or "ema" for the averaged ones
    exclude: str | None = None  # a pattern; tensors whose names it finds are not averaged
    only_common: bool = False  # tensors that some file lacks, or has in another shape, are not averaged
    as_stored: bool = False  # names with those of wrappers, as soups of format 1 were made
    set_aside: tuple[str, ...] = ()  # of only_common: what is not averaged, as a larger pool than these files decides
    like: str | None = None  # the model in whose order classes and tokens are read, as `place` finds it
    base: str | None = None  # the model with which a folder of a LoRA adapter is read, merged into it; the same
    near: str | None = None  # the folder from which `like` and `base` are named; no record has it

    def place(self, model: str) -> Path:
        """Where the model is that `like` or `base` names: from the folder `near`; from the current one, as records of
        earlier versions name it; or in `near`, if it was moved there.
        """
        if model.startswith(HUB) or self.near is None:
            return Path(model)
        named = Path(os.path.normpath(Path(self.near, model)))
        moved = Path(self.near, Path(model).name)
        return next((path for path in (named, Path(model), moved) if path.exists()), named)


def is_ema(path: str) -> bool:
    """Whether a key names weights averaged over training.

    >>> [is_ema(key) for key in ("ema", "state_dict_ema", "model_ema", "state.ema_model", "model", "schema")]
    [True, True, True, True, False, False]
    """
    return any(_EMA.search(part) for part in path.split("."))


def without_wrappers(names: Collection[str], *, inside: bool) -> dict[str, str]:
    """Names that a wrapper changed -> what they are in the network itself.

    torch.compile puts `_orig_mod.` into names, DistributedDataParallel and AveragedModel put `module.` before all of
    them, a LightningModule mostly `model.`. A network of transformers may itself have `model.` before all names, but
    not where the state dict stood `inside` a training script's checkpoint, under a key.

    >>> without_wrappers(["module._orig_mod.a", "module._orig_mod.b", "n_averaged"], inside=False)
    {'module._orig_mod.a': 'a', 'module._orig_mod.b': 'b'}
    >>> without_wrappers(["model.a", "model.b"], inside=False), without_wrappers(["module.a", "b"], inside=False)
    ({}, {})
    """
    new = {name: _COMPILED.sub("", name) for name in names}
    counters = {name for name in names if new[name] in COUNTERS}
    kept = ""
    while prefix := next((p for p in ("module.", "model.") if _all_begin(new, counters, p)), None):
        if prefix == "model." and not inside:
            kept = prefix
        new = {name: text if name in counters else text.removeprefix(prefix) for name, text in new.items()}
    new = {name: text if name in counters else kept + text for name, text in new.items()}
    if len(set(new.values())) < len(new):
        return {}  # two names would become one
    return {name: text for name, text in new.items() if text != name}


def _all_begin(new: Mapping[str, str], counters: Collection[str], prefix: str) -> bool:
    others = [text for name, text in new.items() if name not in counters]
    return bool(others) and all(text.startswith(prefix) and text != prefix for text in others)


def only_here(pool: Collection[Collection[str]]) -> list[dict[str, str]]:
    """For each of a pool's files, the names to change because `model.` stands before all of its names alone.

    >>> only_here([["model.a", "model.b"], ["a", "b"]])
    [{'model.a': 'a', 'model.b': 'b'}, {}]
    """
    wrapped = [_all_begin({name: name for name in names}, (), "model.") for names in pool]
    others = {name for names, is_wrapped in zip(pool, wrapped, strict=True) for name in names if not is_wrapped}
    changes: list[dict[str, str]] = []
    for names, is_wrapped in zip(pool, wrapped, strict=True):
        short = {name: name.removeprefix("model.") for name in names}
        fits = is_wrapped and not others.intersection(names) and bool(others.intersection(short.values()))
        changes.append(short if fits else {})
    return changes
