"""Soups of LoRA adapters that are exact: the mean of the products B A, which is not the product of the means."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from soups.mixture import check_names, mixture
from store.weights import Weights

_FACTOR = re.compile(r"^(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<rest>\..*)?$")


@dataclass(frozen=True)
class LoraSoup:
    """An adapter in peft's naming whose update is the mean of the ingredients' updates."""

    weights: dict[str, Tensor]
    rank: int  # of the new adapter; its lora_alpha is the same number, so that its scaling is 1
    errors: dict[str, float]  # module -> relative Frobenius error of its update in [0, 1]; 0 without truncation


def scaling_of(config: Mapping[str, Any]) -> float:
    """What B A is multiplied by, from peft's adapter_config.json: alpha / r, or alpha / sqrt(r) for rsLoRA.

    Raises:
        ValueError: a kind of adapter whose update is not one multiple of B A.

    >>> scaling_of({"r": 16, "lora_alpha": 32}), scaling_of({"r": 16, "lora_alpha": 32, "use_rslora": True})
    (2.0, 8.0)
    """
    for option in ("use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(option):
            raise ValueError(f"adapters with {option} cannot be averaged here: {config[option]!r}")
    return config["lora_alpha"] / (sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def soup_lora(
    adapters: Sequence[Weights],
    scalings: Sequence[float],
    *,
    mixing: Sequence[float] | None = None,
    rank: int | None = None,
) -> LoraSoup:
    """The weighted mean of K adapters' updates s_i B_i A_i, as one adapter.

    It is exact by concatenation along the rank: A stacks the A_i, B stands the c_i s_i B_i side by side. That has
    the sum of the ranks; `rank` cuts it to the best approximation of that rank (Eckart and Young 1936), found from
    the factors alone. Averaging A and B each by itself gives cross terms B_i A_j that no ingredient has.

    Args:
        adapters: K adapters with keys `*.lora_A.weight` (r_i, in) and `*.lora_B.weight` (out, r_i), or those of
            embeddings and convolutions; ranks may differ. Other tensors (trained heads) are averaged.
        scalings: K numbers, see `scaling_of`.
        mixing: c, K numbers that sum to 1; equal when None.
        rank: at most the sum of the ranks; None keeps the mean exact.

    Raises:
        ValueError: adapters of different modules or shapes, a DoRA adapter, NaN or infinity, or settings that do not
            fit.
    """
    check_names(adapters)
    shares = list(mixing) if mixing is not None else [1 / len(adapters)] * len(adapters)
    if len(scalings) != len(adapters) or len(shares) != len(adapters) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"need a scaling and a share of 1 for each of {len(adapters)}; got {scalings} and {shares}")
    factors = [name for name in adapters[0] if _FACTOR.match(name)]
    strange = [name for name in adapters[0] if "lora_" in name and name not in factors]
    if strange:
        raise ValueError(f"{strange[0]!r} is no factor of a LoRA update, and adapters that have it cannot be averaged")
    rest = [{name: adapter[name] for name in adapter if name not in factors} for adapter in adapters]
    weights = mixture(rest, lambda name: shares)
    errors, ranks = {}, {}
    for name in factors:
        if _side(name) == "B":
            continue
        other, module = _partner(name), name.split(".lora_")[0]
        if other not in factors:
            raise ValueError(f"{name!r} has no {other!r} beside it")
        a, b = _joined(name, other, adapters, [c * s for c, s in zip(shares, scalings, strict=True)])
        errors[module] = 0.0
        if rank is not None:
            a, b, errors[module] = truncated(a, b, rank)
        ranks[module] = len(a)
        weights[name] = a.to(adapters[0][name].dtype).contiguous()
        weights[other] = b.to(adapters[0][other].dtype).contiguous()
    if len(ranks) * 2 != len(factors) or len(set(ranks.values())) != 1:
        raise ValueError(f"need pairs of factors, of one rank in all modules; got ranks {sorted(set(ranks.values()))}")
    return LoraSoup(weights, next(iter(ranks.values())), errors)


def _side(name: str) -> str:
    found = _FACTOR.match(name)
    return found.group("side") if found else ""


def _partner(name: str) -> str:
    return re.sub(r"\.lora_(embedding_)?A", r".lora_\1B", name)


def _joined(name: str, other: str, adapters: Sequence[Weights], factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(R, in, ...) and (out, R, ...) in float64, of the sum of the ranks R."""
    tops, sides = [], []
    for i, adapter in enumerate(adapters):
        top, side = adapter[name].double(), adapter[other].double()
        if (
            len(top) != side.shape[1]
            or top.shape[1:] != adapters[0][name].shape[1:]
            or len(side) != len(adapters[0][other])
        ):
            raise ValueError(f"adapter {i}, {name!r}: {tuple(top.shape)} and {tuple(side.shape)} do not fit the others")
        if not (torch.isfinite(top).all() and torch.isfinite(side).all()):
            raise ValueError(f"adapter {i}, {name!r} or {other!r} holds NaN or infinity")
        tops.append(top)
        sides.append(side * factors[i])
    return torch.cat(tops), torch.cat(sides, dim=1)


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A of a given rank, without forming B A.

    With A = R_a Q_a and B = Q_b R_b (Q orthonormal), B A = Q_b (R_b R_a) Q_a, and the small matrix in the middle
    has its singular values.

    Args:
        a: (R, in, ...) float64.
        b: (out, R, ...) float64, with 1 x 1 behind R for a convolution.
        rank: at most R. Where B A has a smaller rank, zeros fill up.

    Returns:
        Factors of that rank, which share the singular values evenly, and the relative Frobenius error in [0, 1].

    Raises:
        ValueError: `rank` is not in [1, R].
    """
    if not 1 <= rank <= len(a):
        raise ValueError(
            f"the rank of the soup must be in [1, {len(a)}], the sum of the ingredients' ranks; got {rank}"
        )
    q_a, r_a = torch.linalg.qr(a.flatten(1).T)  # (in, m), (m, R)
    q_b, r_b = torch.linalg.qr(b.flatten(1))  # (out, n), (n, R)
    u, values, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    total, lost = values.norm().item(), values[rank:].norm().item()
    root = values[:rank].sqrt()
    missing = rank - len(root)
    down = F.pad(root[:, None] * (vt[:rank] @ q_a.T), (0, 0, 0, missing))
    up = F.pad((q_b @ u[:, :rank]) * root, (0, missing))
    return down.view(rank, *a.shape[1:]), up.view(len(b), rank, *b.shape[2:]), lost / total if total else 0.0
