"""How the models of a pool are averaged, whatever the recipe."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soups.checks import refuse_unsuitable
from soups.conformance import common_layout
from soups.errors import UserError, one_of
from soups.files.adapters import ORIGIN, common_configs
from soups.files.aligned import differ
from soups.files.atomic import replacing
from soups.files.dtypes import FLOATS, OutputDtype
from soups.files.folders import HUB, from_hub, is_adapter, name_beside, pinned, short_names
from soups.files.opening import opened
from soups.files.reading import Reading
from soups.mean import FileSoup, Mean, Mixing, average_files
from soups.ranks import this_rank
from soups.scoring import Scorer
from soups.sources import Pool, Source, pool_of

if TYPE_CHECKING:
    from soups.lora import LoraSoup

Models = Source | Iterable[Source]
# A .safetensors file, or of adapters a folder; and what its metadata is to say beside.
Writer = Callable[[Path, Mapping[str, Any]], "FileSoup | LoraSoup"]


@dataclass(frozen=True)
class Averaging:
    """How models are averaged, whatever the recipe.

    Args:
        dtype: of the floating-point tensors written; "keep" is the ingredients'.
        batch_norm: running means and variances: the average; "keep", those of `init`; or "recompute", measured with
            the soup's weights on the images that the recipe scores by, or that its setting `images` names.
        init: the initialisation that the models were fine-tuned from, for `batch_norm="keep"`.
        kept_from: the model whose tensors stand in for those that are not averaged.
        allow_unrelated: average models that were not fine-tuned from the same checkpoint all the same.
        threads: that read and add; the result does not depend on them.
    """

    dtype: OutputDtype = "keep"
    batch_norm: str = "average"
    init: Path | None = None
    kept_from: Path | None = None
    allow_unrelated: bool = False
    threads: int = 2
    measured_on: "Scorer | None" = None  # of batch_norm="recompute": whose images

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, "keep", *FLOATS)
        one_of("batch_norm", self.batch_norm, "average", "keep", "recompute")
        if (self.batch_norm == "keep") != (self.init is not None):
            raise UserError("batch_norm=keep and the initialisation, init=FILE, belong together")


def open_pool(
    models: Models, settings: Mapping[str, Any], start: Source | None = None, *, score: Any = None
) -> tuple[Pool, Averaging, Pool | None]:
    """The models with how they are read, how they are averaged, and the initialisation as a pool of one.

    Args:
        models: of the pool.
        settings: those of `Averaging`; `images`, on which batch_norm="recompute" measures; and of the reading
            key: where a file has several state dicts, which: "state_dict", "ema", ...
            exclude: a regular expression; tensors with such names are the first model's, or those of `kept_from`.
            only_common: average what all models of the pool have; other tensors are the first model's, or dropped.
            base: file or folder of the model that LoRA adapters change; each is read as that model with it merged.
        start: the initialisation, where the recipe needs one.
        score: what the recipe scores or learns by, if anything; adapters need one.
    """
    values = dict(settings)
    images, base = values.pop("images", None), values.pop("base", None)
    chosen = {name: values.pop(name) for name in ("key", "exclude", "only_common") if name in values}
    pool = pool_of(models, Reading(**chosen))
    named, near = _named(pool, base)
    pool.reading = replace(pool.reading, base=named, near=near)
    first = None if start is None else pool_of(start, pool.reading)
    ends = [] if first is None else first.paths
    if ends and values.get("batch_norm") == "keep":
        values["init"] = ends[0]
    elif values.get("init") is not None:
        values["init"] = _one_beside(pool, [], values["init"], "init")
    if values.get("kept_from") is not None:
        values["kept_from"] = _one_beside(pool, ends, values["kept_from"], "--from")
    how = Averaging(**values)
    if how.kept_from is not None and pool.reading.exclude is None and not pool.reading.only_common:
        raise UserError("--from FILE needs --keep REGEX, the names of the tensors that are FILE's")
    adapters = [path for path in pool.paths if is_adapter(path)]
    if base is not None:
        if not adapters:
            raise UserError(f"--base is for folders of LoRA adapters, and {pool.paths[0]} is none")
        common_configs(adapters, ORIGIN)
    elif score is not None and len(adapters) == len(pool):
        _as_adapters(pool, how, score)
        _with_statistics(how, pool, images, score)
        return pool, how, first
    if len(ends) > 1:
        raise UserError(f"the initialisation is one model, not {len(ends)}: {', '.join(map(str, ends[:3]))}")
    starts = list({path.resolve(): path for path in [*ends, *([how.init] if how.init else [])]}.values())
    twice = [path for path in starts if path.resolve() in [each.resolve() for each in pool.paths]]
    if twice:
        raise UserError(f"{twice[0]} is the initialisation and one of the models too: name it once")
    starts += [how.kept_from] if how.kept_from is not None and how.kept_from not in [*starts, *pool.paths] else []
    if any(differ(path, pool.paths[0]) for path in [*pool.paths[1:], *starts]):
        like, near = _named(pool, pool.paths[0])
        pool.reading = replace(pool.reading, like=like, near=near or pool.reading.near)
    if first is not None:
        pool.beside.append(first)
        first.names = [name_beside(first.names[0], first.paths[0], pool.paths, pool.names)]
    related = how.allow_unrelated or (base is not None and len(adapters) == len(pool))  # of one base model
    layout = refuse_unsuitable([*starts, *pool.paths], allow_unrelated=related, reading=pool.reading)
    if pool.reading.only_common:  # of the whole pool, whichever of its models a soup is of
        aside = {*layout.kept, *layout.dropped}
        aside |= {name for name, stands in layout.ties.items() if stands in aside}
        pool.reading = replace(pool.reading, set_aside=tuple(sorted(aside)))
    return pool, _with_statistics(how, pool, images, score), first


def _named(pool: Pool, model: str | Path | None) -> tuple[str | None, str | None]:
    """A model's path from the folder above all models of a pool, and that folder: what a soup's record says of it
    depends neither on how paths were typed nor on the current folder.
    """
    if model is None:
        return None, None
    of_hub = dict(zip(map(str, pool.paths), pool.names, strict=True)).get(str(model), str(model))
    if of_hub.startswith(HUB):
        return pinned(of_hub, from_hub(of_hub)), None

    def whole(path: Path) -> Path:
        path = Path(os.path.abspath(path))  # noqa: PTH100
        return path.parent.resolve() / path.name  # a link keeps its name

    on_disk = [path for path, name in zip(pool.paths, pool.names, strict=True) if not name.startswith(HUB)]
    near = os.path.commonpath([whole(path).parent for path in on_disk or [Path(model)]])
    return os.path.relpath(whole(Path(model)), near), near


def _one_beside(pool: Pool, ends: Sequence[Path], model: Source, what: str) -> Path:
    """One more model that a setting names, kept as long as the pool is; it may be one of the models or `ends`."""
    found = pool_of(model, pool.reading)
    if len(found) > 1:
        raise UserError(f"{what} is one model, not {len(found)}: {', '.join(found.names[:3])}")
    pool.beside.append(found)
    same = (path for path in [*pool.paths, *ends] if path.resolve() == found.paths[0].resolve())
    return next(same, found.paths[0])


def _with_statistics(how: Averaging, pool: Pool, images: Any, score: Any) -> Averaging:
    """The averaging with what measures batch-norm statistics, where `images` are given for it."""
    if how.batch_norm != "recompute":
        if images is not None:
            raise UserError("--images is for --batch-norm recompute (batch_norm='recompute'), and would be ignored")
        return how
    if getattr(images or score, "kind", None) != "images":
        raise UserError(
            "batch_norm=recompute measures the statistics on images: type --images DIR --network NAME "
            "(images=soups.images(DIR, NAME) in Python), or choose --batch-norm average or keep"
        )
    if this_rank()[1] > 1:
        raise UserError("batch_norm=recompute is for one process, and each would measure on all images: leave torchrun")
    return how if images is None else replace(how, measured_on=images.scorer(pool))


def _as_adapters(pool: Pool, how: Averaging, score: Any) -> None:
    """Take the folders of a pool for LoRA adapters, and refuse settings and scores that are for whole models."""
    from soups.lora import check_folders  # noqa: PLC0415  # torch takes seconds

    usual = vars(Reading()) | vars(Averaging())
    for name, value in (vars(pool.reading) | vars(how)).items():
        if value != usual[name]:
            flag = "from" if name == "kept_from" else name.replace("_", "-")
            raise UserError(f"--{flag} is for whole models, and these are LoRA adapters")
    if hasattr(score, "kind"):
        raise UserError(
            f"--{score.kind} scores whole models, and these are LoRA adapters: write --score 'COMMAND {{soup}}', which "
            "gets a folder for peft, or --base MODEL, with which they are whole models"
        )
    check_folders(pool.paths)
    pool.adapters = True


def writer(
    pool: Pool,
    weights: Mixing,
    how: Averaging,
    *,
    start: Pool | None = None,
    merging: Callable[[Mean, Sequence[int]], Mean] | None = None,
    sync: bool = True,
) -> Writer:
    """The soup of such weights, those of `start` first, as a function that writes it; see `average_files`."""
    if not pool.adapters:
        return partial(_average, pool, weights, how, start=start, merging=merging, sync=sync)
    from soups.lora import soup_folders  # noqa: PLC0415  # torch takes seconds

    assert not isinstance(weights, Mapping)  # recipes of adapters have one weight a model
    used = [i for i, weight in enumerate(weights) if weight]
    folders, names, shares = zip(*((pool.paths[i], pool.names[i], weights[i]) for i in used), strict=True)
    return lambda out, note: soup_folders(folders, out, weights=shares, note=note, names=names)


def _average(
    pool: Pool, weights: Mixing, how: Averaging, out: Path, note: Mapping[str, Any], *, start: Pool | None, **more: Any
) -> FileSoup:
    """Write what `writer` says; `more` is of `average_files`."""
    begin = start or Pool([], [], pool.reading, pool.temporary)
    paths, names = [*begin.paths, *pool.paths], [*begin.names, *pool.names]
    for path in dict.fromkeys(each for each in (how.init, how.kept_from) if each is not None and each not in paths):
        paths, names = [*paths, path], [*names, name_beside(short_names([path])[0], path, paths, names)]
        weights = {n: [*row, 0.0] for n, row in weights.items()} if isinstance(weights, Mapping) else [*weights, 0.0]
    if more["merging"] is None and not isinstance(weights, Mapping):
        used = [i for i, weight in enumerate(weights) if weight or paths[i] in (how.init, how.kept_from)]
        paths, names, weights = [paths[i] for i in used], [names[i] for i in used], [weights[i] for i in used]
    stands_in = [how.kept_from] if how.kept_from is not None else pool.paths  # for what is not averaged
    more |= {"weights": weights, "names": names, "dtype": how.dtype, "threads": how.threads, "reading": pool.reading}
    more["keep_from"] = None if how.init is None else paths.index(how.init)
    more["first"] = next((i for i, path in enumerate(paths) if path in stands_in), 0)
    more["note"] = {"batch_norm": how.batch_norm, **note}
    if how.allow_unrelated:
        more["note"]["unrelated"] = "average"
    if how.measured_on is None or how.measured_on.statistics is None or len(paths) < 2:
        return average_files(paths, out, **more)  # a model by itself keeps its own statistics
    from soups.files.weights import LazyWeights, mapped  # noqa: PLC0415  # torch takes seconds

    with replacing(out) as temporary:
        soup = average_files(paths, temporary, **more)
        fresh, stored = how.measured_on.statistics(LazyWeights(temporary)), mapped(temporary, "r+")
        for name, tensor in fresh.items():  # those that were measured with these weights
            stored[name].copy_(tensor)
    return replace(soup, path=out)


def by_tensor(pool: Pool, more: Sequence[Path], row: Callable[[str], list[float]]) -> dict[str, list[float]]:
    """Weights of the models for every tensor that the soup has."""
    with opened([*more, *pool.paths], pool.reading) as checkpoints:
        return {name: row(name) for name in common_layout(checkpoints, pool.reading, len(more)).entries}
