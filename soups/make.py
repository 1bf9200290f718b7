"""Recipes in files: written by hand, those of mergekit, and the record that lies beside a soup."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any

from soups.errors import UserError
from soups.files.folders import HUB
from soups.files.reading import Reading
from soups.record import metadata_of, read_yaml, record_in
from soups.scoring import Gain
from soups.soup import Decision, Report, Soup, refuse_out
from soups.sources import Pool
from soups.verify import find, located, make_again

# Settings that name a file.
FILES = ("init", "from", "base", "out", "scores", "images", "texts", "perplexity", "choices", "journal")
KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
_CHANGES = ("normalize", "lambda", "int8_mask")
# Methods of mergekit -> the recipe, the parameters of each model, and those of the method.
METHODS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "linear": ("weighted", ("weight",), ("normalize",)),
    "task_arithmetic": ("arithmetic", ("weight",), _CHANGES),
    "ties": ("ties", ("weight", "density"), _CHANGES),
    "dare_linear": ("dare", ("weight", "density"), (*_CHANGES, "rescale")),
    "slerp": ("slerp", (), ("t",)),
}


def make(
    path: Path, out: Path | None, folder: Path | None, run: Callable[[list[str]], None], *, force: bool, more: list[str]
) -> None:
    """Make the soup of a recipe in a file, and print what it is.

    Args:
        path: the file.
        out: in place of what the recipe says.
        folder: where the models are; beside the file, or the folder of the soup that it lies in, if None.
        run: a command's words.
        force: overwrite `out` if it is a file that is there.
        more: settings that `run` adds, which only a recipe that was written has.

    Raises:
        UserError: names the file.
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
        soup = soup_again(recipe, folder)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    out = out or path.with_name(beside)
    refuse_out(out, soup.pool.paths, force=force)
    print(soup, soup.save(out), sep="\n")
    return None


def soup_again(recipe: Mapping[str, Any], folder: Path) -> Soup:
    """The soup that a recipe lay beside, of the models whose digests it has; equal to the byte when it is saved.

    Args:
        recipe: as `soups.record.write_recipe` wrote it.
        folder: where the models are, under whatever names; those of the hub may be missing in it.

    Raises:
        UserError: the recipe was changed, or a model is missing or another one.
    """
    record = located(record_in(metadata_of(recipe)), folder)
    paths, problems = find(record, folder, folder)
    if problems:
        raise UserError(f"of its ingredients in {folder}, {', '.join(problems)}; --folder DIR says where they are")
    note = record.note
    like = sorted(range(len(paths)), key=lambda i: record.ingredients[i].file != note.get("like"))  # it comes first
    names = [record.ingredients[i].file for i in like]
    pool = Pool([paths[i] for i in like], names, record.reading or Reading(), tempfile.TemporaryDirectory())
    pool.adapters = "lora" in note
    held_out, report = note.get("held_out", {}), note.get("report")
    decisions = [dict(each) for each in note.get("decisions", ())]
    return Soup(
        note.get("recipe", "weighted"),
        pool,
        lambda out, _: make_again(record, paths, out),
        {each.file: each.weight for each in record.ingredients},
        decisions=tuple(Decision(alone=None, gain=_gain(each.pop("gain", None)), **each) for each in decisions),
        score=held_out.get("score"),
        metric=held_out.get("metric", ""),
        goal=held_out.get("goal", "max"),
        n=held_out.get("n"),
        gain=_gain(note.get("gain")),
        report=report and Report(**report | {"gain": _gain(report["gain"])}),
    )


def _gain(values: Mapping[str, Any] | None) -> Gain | None:
    return None if values is None else Gain(**values)


def typed(recipe: Mapping[str, Any], folder: Path) -> list[str]:
    """A recipe that was written by hand, or for mergekit, as words of the command line.

    Args:
        recipe: `recipe`, `models`, and settings under the names that they have on the command line.
        folder: where files are that it names.

    Raises:
        UserError: what stands in it is no recipe.

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
    words = [name.replace("_", "-"), *(_place(model, folder) for model in models)]
    files = FILES if "score" in values else (*FILES, "report")
    for key, value in values.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (str, int, float)):
            words.append(f"--{flag}={_place(str(value), folder) if key in files else value}")
        elif isinstance(value, list) and not any(isinstance(each, (list, dict, type(None))) for each in value):
            words.append(f"--{flag}={','.join(map(str, value))}")
        else:
            raise UserError(f"{key}: write a number, a word or a list of them, not {value!r}")
    return words


def _place(name: str, folder: Path) -> str:
    return name if name.startswith(HUB) else str(folder / name)


def _of_mergekit(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A yaml of mergekit as a recipe of ours.

    Raises:
        UserError: it asks for what is not done here.

    Source: mergekit 0.1.5.
    """
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
    if isinstance(value, (list, dict)):
        raise UserError(
            f"{name}: gradients and filters, which differ from layer to layer, are not read: write a number"
        )
    raise UserError(f"{name}: write a number, not {value!r}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name}: write true or false, not {value!r}")
    return value
