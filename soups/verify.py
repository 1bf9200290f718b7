"""Soups from recipes: whether one is what its metadata says, and those of files, written by hand or by mergekit.

    python -m soups.verify soup.safetensors [--folder DIR]

finds the recorded ingredients in a folder (the soup's own, by default) by the digests of their content, makes the soup
again and compares every byte. Prints one line; exit status 0 if equal, 1 if not.
"""

import filecmp
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soups.errors import UserError
from soups.files.adapters import CONFIG
from soups.files.atomic import read_json
from soups.files.checkpoints import PICKLED, Checkpoint, Entry, digest_file, tensor_digests
from soups.files.folders import ADAPTER, HUB, INDEX, from_hub, is_adapter
from soups.files.opening import opened
from soups.files.reading import COUNTERS, Reading
from soups.mean import STATISTICS, FileSoup, Mean, average_files
from soups.merging import Merging, undivided
from soups.record import Record, metadata_beside, metadata_of, read_yaml, record_in
from soups.scoring import Gain
from soups.soup import Decision, Report, Soup, refuse_out
from soups.sources import Pool

if TYPE_CHECKING:
    from soups.lora import LoraSoup

MERGED = ("arithmetic", "ties", "dare")  # recipes on task vectors
# Settings that name a file.
FILES = ("init", "from", "base", "out", "scores", "images", "texts", "perplexity", "choices", "journal")
# Of mergekit's yaml: kinds of numbers, keys, and methods -> the recipe, the parameters of each model, and the method's.
KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
_CHANGES = ("normalize", "lambda", "int8_mask")
METHODS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "linear": ("weighted", ("weight",), ("normalize",)),
    "task_arithmetic": ("arithmetic", ("weight",), _CHANGES),
    "ties": ("ties", ("weight", "density"), _CHANGES),
    "dare_linear": ("dare", ("weight", "density"), (*_CHANGES, "rescale")),
    "slerp": ("slerp", (), ("t",)),
}


def record_of(soup: Path) -> Record:
    """What a soup's metadata says about it; raises UserError where it is missing, damaged or not a soup of ours."""
    metadata = metadata_beside(soup) if soup.suffix in PICKLED else None
    if metadata is None:
        with opened([soup / ADAPTER if is_adapter(soup) else soup]) as (checkpoint,):
            metadata = checkpoint.metadata
    return record_in(metadata)


def _digest(path: Path, record: Record) -> str | None:
    try:
        if "lora" in record.note:
            from soups.lora import digest_of_folder  # noqa: PLC0415  # torch takes seconds

            return digest_of_folder(path)
        with opened([path], record.reading) as (checkpoint,):
            return digest_file(checkpoint)
    except UserError:
        return None  # something else that lies in the folder


def _called(folder: Path, name: str) -> list[Path]:
    """What lies in the folder under a recorded name, of which it may be a folder itself."""
    parts = Path(name).parts
    return [path for i in range(len(parts)) if (path := folder.joinpath(*parts[i:])).exists()]


def find(record: Record, folder: Path, soup: Path) -> tuple[Record, list[Path], list[str]]:
    """The record, whose other models are named from this folder on, its ingredients' files, and what is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    reading = record.reading or Reading()
    if reading.base is not None or reading.like is not None:
        reading = replace(reading, near=str(folder.resolve()))
        record = replace(record, reading=reading)
    files, beside = record.ingredients, sorted(folder.iterdir())
    candidates = [path for each in files for path in _called(folder, each.file)]
    candidates += [path for path in beside if path.suffix in (".safetensors", *PICKLED)]
    candidates += [path for path in beside if path.name == INDEX or path.is_dir()]
    wanted, found, problems = {each.digest for each in files}, dict[str, Path](), []
    for path in dict.fromkeys(candidates):
        if path.resolve() != soup.resolve():
            digest = None if wanted <= found.keys() else _digest(path, record)
            if digest in wanted:
                found.setdefault(digest, path)
    for model, what in ((reading.base, "into which its adapters are merged"), (reading.like, "whose classes it has")):
        if model is not None and not model.startswith(HUB) and not reading.place(model).exists():
            return record, [], [f"the model {what}, {model}, is missing"]
    for each in files:
        is_hub = each.file.startswith(HUB)
        if is_hub and each.digest not in found:
            path = from_hub(each.file)
            found |= {each.digest: path} if _digest(path, record) == each.digest else {}
        if each.digest not in found:
            problems.append(f"{each.file} {'was changed' if is_hub or _called(folder, each.file) else 'is missing'}")
    return record, [found[each.digest] for each in files if each.digest in found], problems


def verify(soup: Path, folder: Path | None = None) -> str:
    """An empty string, or in one line why the soup is not what it says; a UserError where it cannot be read or made."""
    soup = soup.parent if soup.name == ADAPTER else soup
    folder = folder or soup.resolve().parent
    record, paths, problems = find(record_of(soup), folder, soup)
    if problems:
        elsewhere = "; --folder DIR says where they are" if any(each.endswith("missing") for each in problems) else ""
        return f"of its ingredients in {folder}, {', '.join(problems)}{elsewhere}"
    with tempfile.TemporaryDirectory() as temporary:
        is_lora = "lora" in record.note
        again = Path(temporary) / ("soup" if is_lora else "soup.safetensors")
        make_again(record, paths, again)
        if is_lora:
            same = _same(soup / ADAPTER, again / ADAPTER) and read_json(soup / CONFIG) == read_json(again / CONFIG)
        else:
            same = _same(soup, again, renewed=record.note.get("batch_norm") == "recompute")
    if same:
        return ""
    cut = "; factors cut to a rank are equal only on the machine and with the torch that made them"
    is_cut = is_lora and record.note["lora"]["rank"] is not None
    return f"made again from its ingredients, it differs{cut if is_cut else ''}"


def answer(soup: Path, folder: Path | None = None) -> tuple[bool, str]:
    """Whether a soup is what it says, and a line that tells what is known."""
    try:
        problem = verify(soup, folder)
        note = {} if problem else record_of(soup).note
    except UserError as error:
        problem = str(error)
    if problem:
        return False, f"{soup}: {problem}"
    equal = f"{soup}: equal to the byte when made again from its ingredients"
    if note.get("batch_norm") == "recompute":
        equal += ", but for its batch-norm statistics: they were measured on images, and nothing here proves them"
    return True, equal


def make_again(record: Record, paths: Sequence[Path], out: Path) -> "FileSoup | LoraSoup":
    """Write the soup that a record describes: a .safetensors file, or of adapters a folder."""
    names, weights = [ingredient.file for ingredient in record.ingredients], record.weights
    first, note = record.first or 0, record.note
    merging: Callable[[Mean, Sequence[int]], Mean] | None = None
    if "lora" in note:
        from soups.lora import soup_folders  # noqa: PLC0415  # torch takes seconds

        assert not isinstance(weights, dict)  # of an adapter there is one weight
        return soup_folders(paths, out, weights=weights, rank=note["lora"]["rank"], note=note, names=names)
    if note.get("recipe") in MERGED and "scales" in note and not isinstance(weights, dict):
        merging = Merging.of(note)
        order = sorted(range(len(names)), key=lambda i: names[i] != note["init"])  # the initialisation is first
        paths, names, weights = [paths[i] for i in order], [names[i] for i in order], [weights[i] for i in order]
        first = order.index(first)
    elif note.get("normalize") is False:
        merging = undivided
    keeps = [names.index(each.file) for each in record.ingredients if each.keeps_batch_norm]
    return average_files(
        paths,
        out,
        weights=weights,
        dtype=record.dtype,
        keep_from=next(iter(keeps), None),
        note=note,
        names=names,
        reading=record.reading if record.format > 1 else Reading(as_stored=True),
        first=first,
        merging=merging,
        format=record.format,
    )


def _same(soup: Path, again: Path, *, renewed: bool = False) -> bool:
    """Whether two soups are equal to the byte; those of several files or of torch.save by their tensors and record.

    Where the first has `renewed` batch-norm statistics, measured on data, they are left out.
    """
    pickled = soup.suffix in PICKLED
    if soup.is_file() and not pickled and not renewed and soup.name != ADAPTER:
        return filecmp.cmp(soup, again, shallow=False)
    with opened([soup, again], Reading(as_stored=not pickled)) as (one, other):
        metadata = (metadata_beside(soup) if pickled else None) or one.metadata
        same = metadata["soup"] == other.metadata["soup"] and set(one.names) == set(other.names)
        return same and _content(one, renewed=renewed) == _content(other, renewed=renewed)


def _content(checkpoint: Checkpoint, *, renewed: bool) -> dict[str, tuple[Entry, str]]:
    """What is compared of every name."""
    left_out = (*STATISTICS, *COUNTERS) if renewed else ()
    own = {name: checkpoint.own(name) for name in checkpoint.names if not name.endswith(left_out)}
    digests = tensor_digests(checkpoint, set(own.values()))
    return {name: (checkpoint.entries[kept], digests[kept]) for name, kept in own.items()}


def make(
    path: Path, out: Path | None, folder: Path | None, run: Callable[[list[str]], None], *, force: bool, more: list[str]
) -> None:
    """Make the soup of a recipe in a file, and print what it is; a UserError names the file.

    Models are looked for in `folder`, beside the file or beside the soup's folder. `run` runs a command's words, and
    adds the settings `more`, which only a recipe that was written has.
    """
    recipe, beside = read_yaml(path), path.name.removesuffix(".recipe.yaml")
    in_folder = "ingredients" in recipe and beside == path.name
    folder = (folder or (path.resolve().parent if in_folder else path).parent).resolve()
    try:
        if "ingredients" not in recipe:
            return run(typed(recipe, folder) + ([f"--out={out}"] if out else []))
        if more:
            raise UserError(f"it lay beside a soup and has all settings: leave out {more[0]}")
        if in_folder and out is None:
            raise UserError("it lies in a soup's folder: --out DIR names the one that is to be written")
        soup = _soup_again(recipe, folder)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    out = out or path.with_name(beside)
    refuse_out(out, soup.pool.paths, force=force)
    print(soup, soup.save(out), sep="\n")
    return None


def _soup_again(recipe: Mapping[str, Any], folder: Path) -> Soup:
    """The soup that a recipe lay beside, of the models in a folder whose digests it has; the same byte for byte."""
    record, paths, problems = find(record_in(metadata_of(recipe)), folder, folder)
    if problems:
        raise UserError(f"of its ingredients in {folder}, {', '.join(problems)}; --folder DIR says where they are")
    note = record.note
    like = sorted(range(len(paths)), key=lambda i: record.ingredients[i].file != note.get("like"))  # it comes first
    names = [record.ingredients[i].file for i in like]
    pool = Pool([paths[i] for i in like], names, record.reading or Reading(), tempfile.TemporaryDirectory())
    pool.adapters = "lora" in note
    held_out, report = note.get("held_out", {}), note.get("report")

    def gain(values: Mapping[str, Any]) -> dict[str, Any]:
        return {"gain": Gain(**values["gain"]) if values.get("gain") else None}

    return Soup(
        note.get("recipe", "weighted"),
        pool,
        lambda out, _: make_again(record, paths, out),
        {each.file: each.weight for each in record.ingredients},
        decisions=tuple(Decision(**{"alone": None, **each, **gain(each)}) for each in note.get("decisions", ())),
        score=held_out.get("score"),
        metric=held_out.get("metric", ""),
        goal=held_out.get("goal", "max"),
        n=held_out.get("n"),
        **gain(note),
        report=report and Report(**report | gain(report)),
    )


def typed(recipe: Mapping[str, Any], folder: Path) -> list[str]:
    """A recipe written by hand or for mergekit, as words of the command line; files are named from `folder` on.

    >>> typed({"recipe": "ties", "models": ["a.pt", "hf:org/b"], "init": "c.pt", "density": 0.2}, Path("/run"))
    ['ties', '/run/a.pt', 'hf:org/b', '--init=/run/c.pt', '--density=0.2']
    >>> typed({"recipe": "weighted", "models": "*.pt", "weights": [1, 3], "only_common": True}, Path("/run"))
    ['weighted', '/run/*.pt', '--weights=1,3', '--only-common']
    """
    values = _of_mergekit(recipe, folder) if "merge_method" in recipe else dict(recipe)
    name, models = values.pop("recipe", None), values.pop("models", None)
    models = [models] if isinstance(models, str) else models
    if not isinstance(name, str) or not isinstance(models, list) or not all(isinstance(each, str) for each in models):
        raise UserError("a recipe has `recipe: NAME` and `models: [FILE, ...]`, and settings of `soups NAME --help`")

    def place(file: str) -> str:
        return file if file.startswith(HUB) else str(folder / file)

    words = [name.replace("_", "-"), *map(place, models)]
    files = FILES if "score" in values else (*FILES, "report")
    for key, value in values.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (str, int, float)):
            words.append(f"--{flag}={place(str(value)) if key in files else value}")
        elif isinstance(value, list) and not any(isinstance(each, (list, dict, type(None))) for each in value):
            words.append(f"--{flag}={','.join(map(str, value))}")
        else:
            raise UserError(f"{key}: write a number, a word or a list of them, not {value!r}")
    return words


def _of_mergekit(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A yaml of mergekit 0.1.5 as a recipe of ours; raises UserError where it asks for what is not done here."""
    method, base = values["merge_method"], values.get("base_model")
    if method not in METHODS:
        raise UserError(f"merge_method: {method} is not made here; known are {', '.join(METHODS)}")
    _refuse_others(values, KEYS, f"merge_method: {method}")
    recipe, of_models, of_all = METHODS[method]
    models, more = _list_of_models(values.get("models")), values.get("parameters") or {}
    _refuse_others(more, (*of_models, *of_all), f"parameters of {method}")
    for model, own in models.items():
        _refuse_others(own, of_models, f"parameters of {model}")
    if (base is None) != (method == "linear") and not (method == "linear" and base in models):
        need = "needs a base_model" if base is None else f"has no base_model but one of the models, and {base} is none"
        raise UserError(f"merge_method: {method} {need}")
    order = ([base] if method in ("linear", "slerp") and base is not None else []) + [m for m in models if m != base]
    kind = str(values.get("out_dtype") or values.get("dtype") or "").removeprefix("torch.")
    if kind and kind not in KINDS:
        raise UserError(f"dtype: {kind} is not made here; known are {', '.join(KINDS)}")
    found: dict[str, Any] = {"recipe": recipe, "models": [_known(model, folder) for model in order]}
    found |= {"dtype": KINDS[kind]} if kind else {}
    if method == "slerp":
        return found | {"t": _number("t", more.get("t"))}
    weights = [_number(f"weight of {model}", models[model].get("weight", more.get("weight"))) for model in order]
    normalize = _flag("normalize", more.get("normalize", method in ("linear", "ties")))
    if method == "linear":
        if normalize and min(weights) < 0 < fsum(weights):  # as a sum, in which weights may be negative
            weights, normalize = [weight / fsum(weights) for weight in weights], False
        return found | {"weights": weights, "normalize": normalize}
    found["init"], scale = _known(base, folder), _number("lambda", more.get("lambda", 1))
    _flag("int8_mask", more.get("int8_mask", False))  # how masks are held in memory; it changes no number
    densities = [_number(f"density of {m}", models[m].get("density", more.get("density", 1))) for m in order]
    if method == "ties":
        shares = {"weights": weights, "density": densities, "per": "tensor"}
        return found | shares | {"scale": scale, "normalize": normalize}
    total = fsum(weights) if normalize and abs(fsum(weights)) >= 1e-8 else 1.0
    found["scales"] = [scale * weight / total for weight in weights]
    if method == "task_arithmetic":
        return found
    return found | {"density": densities, "rescale": "l1" if _flag("rescale", more.get("rescale", True)) else "none"}


def _list_of_models(listed: Any) -> dict[str, dict[str, Any]]:
    """Each model of mergekit's list and its parameters."""
    if not isinstance(listed, list) or not all(isinstance(each, dict) and "model" in each for each in listed):
        raise UserError("models: write a list of `- model: NAME`, with its parameters below")
    found: dict[str, dict[str, Any]] = {}
    for each in listed:
        _refuse_others(each, ("model", "parameters"), "models")
        if each["model"] in found:
            raise UserError(f"models: {each['model']} is named twice; add its weights instead")
        found[each["model"]] = each.get("parameters") or {}
    return found


def _known(model: Any, folder: Path) -> str:
    """A model of mergekit's yaml as a file, or where there is none as one of the hub."""
    if not isinstance(model, str) or "+" in model:
        raise UserError(f"model: {model} is not a file, a folder or org/name; a LoRA is merged into its model first")
    on_hub = model.count("/") == 1 and model[0] not in "./~" and not (folder / model).exists()
    return f"{HUB}{model}" if on_hub else model


def _refuse_others(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise UserError(f"{where}: {name} is not read here, and would be ignored: leave it out, or use mergekit")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, (str, int, float)):
            return float(value)  # 1e-3 is text to yaml
    except ValueError:
        pass
    layers = "gradients and filters, which differ from layer to layer, are not read: write a number"
    raise UserError(f"{name}: {layers if isinstance(value, (list, dict)) else f'write a number, not {value!r}'}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name}: write true or false, not {value!r}")
    return value


if __name__ == "__main__":
    from soups.cli import main

    main(["verify", *sys.argv[1:]])
