"""Contrastive pretraining: the loss, the batches, the loop, and what is written at the end."""

import json
import math
import platform
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import open_clip
import rich.progress
import timm
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.emoji_clip.model import MEAN, STD, TEMPLATES, build, encode, load_imagenet, num_ids, tokenize
from soups.files.atomic import replacing, write_text

CHUNK = 64  # images per forward pass of the image tower: what its activations leave of a small machine's cache
# A thread that loses its core to another process holds up the other at each barrier: 30 s a step instead of 0.9 were
# seen, where one thread alone takes 1.3 s. After a step this many times slower than the fastest, one thread goes on.
SLOW, SINGLE_STEPS = 2.0, 20  # times, steps with a single thread
BAR = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
)
PLAIN = 0.5  # how often a caption is shown without a prompt around it
COLOURED = 0.15  # how often the ink's colour is said


class Pairs(Protocol):
    """N pictures and their captions."""

    @property
    def images(self) -> np.ndarray:
        """(N, 64, 64, 3) uint8."""

    @property
    def captions(self) -> Sequence[str]:
        """N names, without a prompt around them."""

    @property
    def inks(self) -> Sequence[str]:
        """N names of colours; empty for a picture of many colours."""

    @property
    def num_copies(self) -> int:
        """How many were left out because the benchmark has them."""

    @property
    def digest(self) -> str:
        """The identity of all the rest."""


@dataclass(frozen=True)
class Settings:
    """All that the weights depend on, beside the data."""

    steps: int = 830
    batch: int = 256  # pairs per step
    lr: float = 1e-3  # peak of AdamW, for what starts from random
    tower_lr: float = 5e-4  # peak, for the image tower, which starts from ImageNet
    weight_decay: float = 0.05  # decoupled; vectors and scalars are exempt
    warmup: int = 50  # steps, linear from 0; then cosine to 0
    min_count: int = 2  # captions in which a piece of a word must occur to get an embedding
    seed: int = 0


def vocabulary_of(captions: Iterable[str], min_count: int) -> tuple[int, ...]:
    """open_clip ids, ascending, that occur in at least `min_count` captions, and all of the templates' and inks'."""
    texts = Counter(captions)
    counts: Counter[int] = Counter()
    for text, times in texts.items():
        for token in set(encode(text)):
            counts[token] += times
    kept = {token for token, count in counts.items() if count >= min_count}
    kept |= {token for template in TEMPLATES for token in encode(template.replace("{}", ""))}
    return tuple(sorted(kept))


def rows_of_step(step: int, counts: np.ndarray, batch: int, seed: int) -> np.ndarray:
    """Which pairs a step shows: (batch,) row numbers, all different, a function of seed and step alone.

    A caption with n drawings is drawn about sqrt(n) times as often as one with a single drawing: arrows and
    calendars would fill the batches otherwise.

    Args:
        counts: (N,) how many rows have the caption of each row.
    """
    weights = counts**-0.5
    return np.random.default_rng([seed, step]).choice(len(counts), batch, replace=False, p=weights / weights.sum())


def say(captions: Sequence[str], inks: Sequence[str], generator: torch.Generator) -> list[str]:
    """Captions as prompts: half of them bare, the rest in a template; now and then with the ink's colour."""
    draws = torch.rand(len(captions), 3, generator=generator).tolist()
    prompts = []
    for caption, ink, (plain, coloured, which) in zip(captions, inks, draws, strict=True):
        text = f"{ink} {caption}" if ink and coloured < COLOURED else caption
        prompts.append(text if plain < PLAIN else TEMPLATES[int(which * len(TEMPLATES))].format(text))
    return prompts


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move, scale and lighten each picture a little, and normalise it.

    No flips, as arrows and hands have a side, and no change of hue, as captions name colours.

    Args:
        images: (B, 3, 64, 64) uint8.

    Returns:
        (B, 3, 64, 64) float32, channels last.
    """
    batch = len(images)
    x = images.float() / 255
    scale = torch.empty(batch).uniform_(0.85, 1.25, generator=generator)  # of the window: above 1 shrinks the icon
    squeeze = torch.empty(batch).uniform_(0.93, 1.07, generator=generator)
    angle = torch.empty(batch).uniform_(-0.15, 0.15, generator=generator)  # radians
    shift = torch.empty(batch, 2).uniform_(-0.12, 0.12, generator=generator)  # of half the side
    theta = torch.stack(
        [
            torch.stack([scale * squeeze * angle.cos(), -scale * angle.sin(), shift[:, 0]], 1),
            torch.stack([scale * angle.sin(), scale / squeeze * angle.cos(), shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    gain = torch.empty(batch, 1, 1, 1).uniform_(0.8, 1.1, generator=generator)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    x = ((x * gain).clamp(0, 1) - mean) / std
    return x.contiguous(memory_format=torch.channels_last)


def contrastive_loss(images: Tensor, texts: Tensor, same: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, in which pairs with the same caption are all right answers for each other.

    Args:
        images, texts: (B, D) of unit length; row i of both belong together.
        same: (B, B) bool, whether captions i and j are equal; its diagonal is true.
        logit_scale: the logarithm of the inverse temperature.

    Source: Radford et al. 2021, figure 3; with equal captions its targets would call right answers wrong.
    """
    logits = logit_scale.exp() * images @ texts.T
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def optimizer_of(clip: CLIP, settings: Settings) -> torch.optim.AdamW:
    """AdamW with a lower rate for the trunk that starts from ImageNet; matrices decay, vectors and scalars do not."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in clip.named_parameters():
        groups.setdefault((name.startswith("visual.trunk."), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": settings.tower_lr if in_tower else settings.lr,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (in_tower, decays), parameters in groups.items()
        ],
        lr=settings.lr,
        betas=(0.9, 0.98),
    )


def rate(step: int, settings: Settings) -> float:
    """The share of the peak learning rate at a step: linear warmup, then a cosine to 0."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return (1 + math.cos(math.pi * (step - settings.warmup) / max(1, settings.steps - settings.warmup))) / 2


def train(pairs: Pairs, settings: Settings, state: Path, state_every: int, quiet: bool = False) -> tuple[CLIP, list]:
    """Train from ImageNet weights, or go on from `state` if it was left by the same settings and pictures.

    Returns:
        The model, and for each step (step, loss, share of the peak rate, temperature's logit scale, seconds).
    """
    torch.manual_seed(settings.seed)
    vocabulary = vocabulary_of(pairs.captions, settings.min_count)
    clip = build(num_ids(vocabulary))
    load_imagenet(clip.visual.trunk)
    clip = clip.to(memory_format=torch.channels_last).train()
    optimizer = optimizer_of(clip, settings)
    identity = {**asdict(settings), "pairs": pairs.digest}
    curve: list[tuple[int, float, float, float, float]] = []
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["identity"] == identity:
            clip.load_state_dict(saved["clip"])
            optimizer.load_state_dict(saved["optimizer"])
            curve = [tuple(row) for row in saved["curve"]]

    totals = Counter(pairs.captions)
    counts = np.array([totals[caption] for caption in pairs.captions], dtype=float)
    threads, single_left, fastest = torch.get_num_threads(), 0, math.inf
    bar = nullcontext() if quiet else rich.progress.Progress(*BAR)
    with bar as progress:
        task = progress.add_task("pretraining", total=settings.steps, completed=len(curve)) if progress else None
        for step in range(len(curve), settings.steps):
            start = time.monotonic()
            torch.set_num_threads(1 if single_left else threads)
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, settings)
            rows = np.sort(rows_of_step(step, counts, settings.batch, settings.seed))  # sorted reads are kind to disks
            captions = [pairs.captions[row] for row in rows]
            tokens = tokenize(say(captions, [pairs.inks[row] for row in rows], generator), vocabulary)
            images = augment(torch.from_numpy(pairs.images[rows]).permute(0, 3, 1, 2), generator)
            same = torch.tensor([[a == b for b in captions] for a in captions])

            mixed = torch.randperm(len(rows), generator=generator)  # sorted rows would fill chunks alike
            features = torch.cat([clip.encode_image(chunk) for chunk in images[mixed].split(CHUNK)])
            texts = clip.encode_text(tokens, normalize=True)
            loss = contrastive_loss(F.normalize(features)[mixed.argsort()], texts, same, clip.logit_scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, math.log(100))  # as in CLIP

            seconds = time.monotonic() - start
            curve.append((step, loss.item(), rate(step, settings), clip.logit_scale.item(), seconds))
            single_left = single_left - 1 if single_left else SINGLE_STEPS * (threads > 1 and seconds > SLOW * fastest)
            fastest = min(fastest, seconds)
            if progress and task is not None:
                progress.update(task, advance=1, description=f"loss {np.mean([row[1] for row in curve[-20:]]):.3f}")
            if (step + 1) % state_every == 0 and step + 1 < settings.steps:
                saved = {"identity": identity, "clip": clip.state_dict(), "optimizer": optimizer.state_dict()}
                with replacing(state) as temporary:
                    torch.save({**saved, "curve": curve}, temporary)
    torch.set_num_threads(threads)
    return clip.eval(), curve


def to_disk(clip: CLIP) -> dict[str, Tensor]:
    """The state in float16, half of the bytes; the temperature and integer counters stay as they are."""
    return {
        name: (value.half() if value.is_floating_point() and name != "logit_scale" else value).contiguous()
        for name, value in clip.state_dict().items()
    }


def export(clip: CLIP, curve: Sequence[tuple], pairs: Pairs, settings: Settings, out: Path) -> Path:
    """Write what is committed: weights with their history as metadata, the vocabulary, the loss curve."""
    versions = {"torch": torch.__version__, "open_clip": open_clip.__version__, "timm": timm.__version__}
    metadata = {
        **{key: str(value) for key, value in asdict(settings).items()},
        **versions,
        "python": platform.python_version(),
        "pairs": pairs.digest,
        "num_pairs": str(len(pairs.captions)),
        "num_copies_left_out": str(pairs.num_copies),
        "final_loss": f"{np.mean([row[1] for row in curve[-20:]]):.4f}",  # mean of the last 20 steps
        "seconds": f"{sum(row[4] for row in curve):.0f}",
    }
    ids = json.dumps({"open_clip_ids": vocabulary_of(pairs.captions, settings.min_count)})
    lines = [f"{s},{loss:.4f},{r:.4f},{scale:.4f},{seconds:.2f}" for s, loss, r, scale, seconds in curve]
    text = "\n".join(["step,loss,rate,logit_scale,seconds", *lines, ""])
    write_text(out / "pretrain.csv", text)
    write_text(out / "vocabulary.json", ids + "\n")
    with replacing(out / "weights.safetensors") as temporary:
        save_file(to_disk(clip), temporary, metadata)
    return out / "weights.safetensors"
