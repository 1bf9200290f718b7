"""Soups of LoRA adapters that are exact: the mean of the products B A, which is not the product of the means."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from soups.average import mixture
from soups.checks import sound_digest
from soups.errors import UserError
from soups.files.adapters import CONFIG, common_configs, factors, in_model, read_config, scaling_of, weights_file
from soups.files.atomic import digest_of, replacing, write_json
from soups.files.folders import ADAPTER, short_names
from soups.files.opening import opened
from soups.files.reading import Reading
from soups.files.weights import LazyWeights, Weights
from soups.folder import Card, copy_companions
from soups.record import FORMAT, Ingredient, Record, versions, write_recipe


@dataclass(frozen=True)
class LoraSoup:
    """An adapter in peft's naming whose update is the mean of the ingredients' updates."""

    weights: dict[str, Tensor]
    ranks: dict[str, int]  # module -> rank of the new adapter, whose lora_alpha is the same, so that its scaling is 1
    errors: dict[str, float]  # module -> relative Frobenius error of its update in [0, 1]; 0 without truncation
    path: Path = Path()  # the folder, once it is written

    @property
    def rank(self) -> int:
        """That of most modules."""
        return Counter(self.ranks.values()).most_common(1)[0][0]

    @property
    def largest_error(self) -> float:
        """Of all modules."""
        return max(self.errors.values())

    def remarks(self) -> list[str]:
        """What a reader would not guess, a line each."""
        error = self.largest_error
        return [f"rank {self.rank}, {f'largest relative error of a module {error:.2%}' if error else 'exact'}"]


def soup_lora(
    adapters: Sequence[Weights],
    scalings: Sequence[float | Callable[[str], float]],
    *,
    mixing: Sequence[float] | None = None,
    rank: int | None = None,
) -> LoraSoup:
    """The weighted mean of K adapters' updates s_i B_i A_i, as one adapter.

    It is exact by concatenation along the rank: A stacks the A_i, B stands the c_i s_i B_i side by side. That has
    the sum of the ranks; `rank` cuts it to the best approximation of that rank (Eckart and Young 1936), found from
    the factors alone. Averaging A and B each by itself gives cross terms B_i A_j that no ingredient has.

    Args:
        adapters: of the same keys, `*.lora_A.weight` (r_i, in) and `*.lora_B.weight` (out, r_i), or those of embeddings
            and convolutions; ranks may differ. Other tensors (trained heads and biases) are averaged.
        scalings: s, numbers or functions of a module's name; see `scaling_of`. `*.lora_B.bias` is scaled as B is.
        mixing: c, K numbers that sum to 1; equal when None.

    Raises:
        ValueError: adapters of different shapes, a DoRA adapter, NaN or infinity, or a rank that does not fit.
    """
    shares = list(mixing) if mixing is not None else [1 / len(adapters)] * len(adapters)
    pairs = factors(adapters[0])
    dora = next((name for name in adapters[0] if name.endswith("lora_magnitude_vector")), None)
    if dora:
        raise ValueError(f"{dora!r} is of DoRA, and the mean of its updates is no adapter")
    multiples = {
        module: [c * (s(module) if callable(s) else s) for c, s in zip(shares, scalings, strict=True)]
        for module in pairs
    }
    biases = {f"{module}.lora_B.bias": factors for module, factors in multiples.items()}
    both = {name for pair in pairs.values() for name in pair}
    weights = mixture([_without(adapter, both) for adapter in adapters], lambda name: biases.get(name, shares))
    joined = {module: _joined(*pair, adapters, multiples[module]) for module, pair in pairs.items()}
    longest = max(len(a) for a, _ in joined.values())
    if rank is not None and not 1 <= rank <= longest:
        raise ValueError(f"rank must be in [1, {longest}], the largest sum of the ingredients' ranks; got {rank}")
    errors, ranks = {}, {}
    for module, (name, other) in pairs.items():
        a, b = joined.pop(module)
        top, side, errors[module] = truncated(a, b, rank) if rank is not None and rank < len(a) else (a, b, 0.0)
        ranks[module] = len(top)
        for factor, values in ((name, top), (other, side)):  # of several kinds of numbers the one that holds all
            kind = reduce(torch.promote_types, (adapter[factor].dtype for adapter in adapters))
            weights[factor] = values.to(kind).contiguous()
    return LoraSoup(weights, ranks, errors)


def _without(adapter: Weights, names: set[str]) -> Weights:
    """The other tensors of an adapter; those of a file stay there until they are asked for."""
    if not isinstance(adapter, LazyWeights):
        return {name: adapter[name] for name in adapter if name not in names}
    entries = {name: entry for name, entry in adapter.checkpoint.entries.items() if name not in names}
    return LazyWeights(replace(adapter.checkpoint, entries=entries))


def _joined(name: str, other: str, adapters: Sequence[Weights], factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(R, in, ...) and (out, R, ...) in float64, of the sum of the ranks R."""
    tops, sides = [], []
    for i, adapter in enumerate(adapters):
        top, side = adapter[name].double(), adapter[other].double()
        fits = min(top.ndim, side.ndim) > 1 and len(top) == side.shape[1] and len(side) == len(adapters[0][other])
        if not fits or top.shape[1:] != adapters[0][name].shape[1:]:
            raise ValueError(f"adapter {i}, {name!r}: {tuple(top.shape)} and {tuple(side.shape)} do not fit the others")
        if not (torch.isfinite(top).all() and torch.isfinite(side).all()):
            raise ValueError(f"adapter {i}, {name!r} or {other!r} holds NaN or infinity")
        tops.append(top)
        sides.append(side * factors[i])
    return torch.cat(tops), torch.cat(sides, dim=1)


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A of a rank, without forming B A, and its relative Frobenius error in [0, 1].

    With A = R_a Q_a and B = Q_b R_b (Q orthonormal), B A = Q_b (R_b R_a) Q_a, and the small matrix in the middle has
    its singular values, which both factors share evenly. Where B A has a smaller rank, zeros fill up.

    Args:
        a: (R, in, ...) float64.
        b: (out, R, ...) float64, with 1 x 1 behind R for a convolution.
        rank: in [1, R].
    """
    q_a, r_a = torch.linalg.qr(a.flatten(1).T)  # (in, m), (m, R)
    q_b, r_b = torch.linalg.qr(b.flatten(1))  # (out, n), (n, R)
    u, values, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    total, lost = values.norm().item(), values[rank:].norm().item()
    root = values[:rank].sqrt()
    missing = rank - len(root)
    down = F.pad(root[:, None] * (vt[:rank] @ q_a.T), (0, 0, 0, missing))
    up = F.pad((q_b @ u[:, :rank]) * root, (0, missing))
    return down.view(rank, *a.shape[1:]), up.view(len(b), rank, *b.shape[2:]), lost / total if total else 0.0


def soup_folders(
    folders: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    note: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> LoraSoup:
    """Write the weighted mean of the updates of peft's folders as a folder that peft loads; else a UserError.

    Weights are at least 0, in any scale, and equal when None; the record has `note`, and `names`, by default as
    `short_names`.
    """
    shares = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    if not folders or len(shares) != len(folders) or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise UserError(f"weights: need one of at least 0 for each of {len(folders)} adapters, got {shares}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: name another folder, or delete it")
    configs, mixing = check_folders(folders), [share / sum(shares) for share in shares]
    try:
        adapters = [LazyWeights(weights_file(folder)) for folder in folders]
        soup = soup_lora(adapters, [partial(scaling_of, each) for each in configs], mixing=mixing, rank=rank)
    except ValueError as error:
        raise UserError(f"adapters {', '.join(map(str, folders[:3]))}: {error}") from None
    usual = soup.rank
    other = {f"^{re.escape(in_model(module))}": r for module, r in soup.ranks.items() if r != usual}
    config = configs[0] | {"r": usual, "lora_alpha": usual, "use_rslora": False, "inference_mode": True}
    config |= {"rank_pattern": other, "alpha_pattern": other, "init_lora_weights": True}
    names = short_names(folders) if names is None else names
    known = versions() | {"torch": torch.__version__}
    facts: dict[str, Any] = {"recipe": "lora", "lora": {"rank": rank}, "versions": known, **(note or {})}
    digests = map(digest_of_folder, folders)
    metadata = Record(FORMAT, tuple(map(Ingredient, names, digests, mixing)), shares, "keep", {}, facts).metadata()
    with replacing(out, folder=True) as folder:
        save_file(soup.weights, folder / ADAPTER, metadata)
        write_json(folder / CONFIG, config)
        copy_companions(folders[0], folder)
        _card(config, facts["recipe"], names, mixing, soup).write(folder)
        write_recipe(folder, metadata)
    return replace(soup, path=out)


def check_folders(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The configs of adapters whose updates have a mean as far as these and names of tensors tell; else a UserError."""
    configs = common_configs(folders)
    first, *others = [LazyWeights(weights_file(folder)) for folder in folders]
    for folder, config, adapter in zip(folders, configs, (first, *others), strict=True):
        if config.get("use_dora"):
            raise UserError(
                f"{folder / CONFIG}: use_dora is set, and a mean of DoRA updates is no adapter: type --base MODEL, a "
                f"folder or file of {config.get('base_model_name_or_path')!r}, for a soup that is the whole model"
            )
        only = sorted(first.keys() ^ adapter.keys())
        if only:
            raise UserError(f"{folder}: tensor {only[0]!r} is in this adapter or in {folders[0]}, and not in both")
    return configs


def digest_of_folder(folder: Path) -> str:
    """A name for an adapter's tensors and config; raises UserError where it is none, or a tensor is not finite."""
    with opened([weights_file(folder)], Reading(as_stored=True)) as (checkpoint,):
        return digest_of([sound_digest(checkpoint), read_config(folder)])


def _card(
    config: Mapping[str, Any], recipe: str, names: Sequence[str], mixing: Sequence[float], soup: LoraSoup
) -> Card:
    base = config.get("base_model_name_or_path") or ""
    table = [f"| {name} | {share:.4g} |" for name, share in zip(names, mixing, strict=True)]
    return Card(
        title=f"LoRA soup of {len(names)} adapters",
        library="peft",
        recipe=recipe,
        about="The update of this adapter is the mean of theirs; it is joined along the rank, not averaged by factor.",
        use=f'from peft import AutoPeftModel\n\nmodel = AutoPeftModel.from_pretrained("FOLDER")  # on {base}',
        sections={
            "Ingredients": ["| adapter | share |", "|---|---|", *table],
            "Rank": [f"{soup.rank}; largest relative error of a module: {soup.largest_error:.2%}."],
        },
        more={"base_model": base} if base and not Path(base).is_absolute() else {},
    )
