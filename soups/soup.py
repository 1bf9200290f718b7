"""A soup: which models it is of, how each decision was taken, what it gains, and the file or folder that it becomes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soups.averaging import Writer
from soups.candidates import write_pickled
from soups.errors import UserError
from soups.files.atomic import replacing
from soups.files.checkpoints import PICKLED
from soups.files.folders import ADAPTER
from soups.files.opening import opened
from soups.folder import WEIGHTS, complete
from soups.record import write_recipe
from soups.scoring import Gain
from soups.selection import Goal
from soups.sources import Pool

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Decision:
    """One line of a greedy recipe's table."""

    file: str
    alone: float | None  # its score by itself, where that is known
    score: float  # with it in the soup
    accepted: bool
    gain: Gain | None = None  # over the soup so far, where the answer to each example is known


@dataclass(frozen=True)
class Report:
    """A soup's score on some examples, beside the best single model's where that is known."""

    score: float
    n: int | None
    single: float | None = None
    gain: Gain | None = None


@dataclass(frozen=True)
class Soup:
    """A recipe's answer: nothing is averaged before it is saved or its weights are asked for."""

    recipe: str
    pool: Pool = field(repr=False)
    write: Writer = field(repr=False)
    shares: Mapping[str, float | None]  # name of a model that is in it -> its weight, or None: one for each tensor
    note: Mapping[str, Any] = field(repr=False, default_factory=dict)  # settings of the recipe, for the metadata
    decisions: tuple[Decision, ...] = ()
    alone: Mapping[str, float] = field(default_factory=dict)  # scores of single models
    score: float | None = None
    metric: str = ""
    goal: Goal = "max"
    n: int | None = None  # examples that the score is of
    gain: Gain | None = None  # over the best single model, on the examples that selected it
    report: Report | None = None  # on examples that selected nothing
    remarks: list[str] = field(repr=False, default_factory=list)  # once it is saved: what files hold beside

    @property
    def names(self) -> list[str]:
        """Of all models of the pool."""
        return self.pool.names

    @property
    def best(self) -> str | None:
        """The best single model, where scores are known."""
        choose = max if self.goal == "max" else min
        return choose(self.alone, key=lambda name: self.alone[name]) if self.alone else None

    @property
    def record(self) -> dict[str, Any]:
        """What the metadata of its file says beside ingredients and weights."""
        note: dict[str, Any] = {"recipe": self.recipe, **self.note}
        if self.decisions:
            note["decisions"] = [
                {"file": each.file, "score": each.score, "accepted": each.accepted}
                | ({} if each.gain is None else {"gain": asdict(each.gain)})
                for each in self.decisions
            ]
        if self.score is not None:
            note["held_out"] = {"score": self.score, "n": self.n, "metric": self.metric, "goal": self.goal}
            if self.gain is not None:
                note["gain"] = asdict(self.gain)
        if self.report is not None:
            note["report"] = asdict(self.report)
        return note

    @cached_property
    def weights(self) -> "Mapping[str, Tensor]":
        """Its tensors, each read when it is asked for, from a file that goes when the soup does."""
        from soups.files.weights import LazyWeights  # noqa: PLC0415

        out = self.pool.workplace / ("adapter" if self.pool.adapters else "weights.safetensors")
        self.write(out, self.record)
        return LazyWeights(out / ADAPTER if self.pool.adapters else out)

    def save(self, out: str | Path) -> Path:
        """Write it: a .safetensors file, a file of torch.save (.pt, .pth, .bin, .ckpt), or else a folder.

        A file of torch.save has the names and the outer key of the first model's file; a folder the config, the
        tokenizer and a model card beside the weights, so that its library loads it. Beside a file lies
        <out>.recipe.yaml, which makes it again; in a folder, recipe.yaml.
        """
        path, like = Path(out), self.pool.like
        refuse_out(path, self.pool.paths, force=True)
        if self.pool.adapters and path.suffix in (".safetensors", *PICKLED):
            raise UserError(f"--out {path}: a soup of LoRA adapters is a folder: leave out {path.suffix}")
        if self.pool.adapters:
            self._write(path)  # with its recipe
        elif path.suffix == ".safetensors":
            self._write(path)
            self._write_recipe(path, path)
        elif path.suffix in PICKLED:
            self.pool.workplace.mkdir(exist_ok=True)
            between = self.pool.workplace / "to-pickle.safetensors"
            self._write(between, like=self.pool.names[0])
            write_pickled(between, path, self.pool)
            self._write_recipe(between, path)
            between.unlink()
        else:
            with replacing(path, folder=True) as folder:
                self._write(folder / WEIGHTS, like=self.pool.names[0])
                self._write_recipe(folder / WEIGHTS, folder)
                complete(folder, like, self)
        return path

    def _write(self, weights: Path, **more: str) -> None:
        """Its weights; `like` is the model whose config, key and names it has."""
        self.remarks[:] = self.write(weights, self.record | more).remarks()

    def _write_recipe(self, weights: Path, soup: Path) -> None:
        """What its weights say of how it was made, beside the soup."""
        with opened([weights]) as (made,):
            write_recipe(soup, made.metadata)

    def __str__(self) -> str:
        return "\n".join([*_table(self), *_summary(self)])


def refuse_out(path: Path, models: Sequence[Path], *, force: bool = False) -> None:
    """Before any work: a soup overwrites no model, no folder, and another soup only with `force`; else a UserError, as
    where the name ends as no file of weights does.
    """
    resolved = path.resolve()
    if any(resolved == each.resolve() or resolved in each.resolve().parents for each in models):
        raise UserError(f"--out {path} is one of the models or holds one, and would be overwritten: name another place")
    is_file = path.suffix in (".safetensors", *PICKLED)
    if not is_file and path.suffix[1:2].isalpha():  # a folder may be called llama-3.1-8b
        known = ", ".join((".safetensors", *PICKLED))
        raise UserError(f"--out {path}: a soup is written as {known}, or as a folder, whose name ends in none of these")
    if path.exists() and path.is_dir() and (is_file or any(path.iterdir())):
        raise UserError(f"--out {path} is a folder with files in it: name one that is not there yet, or delete it")
    if path.exists() and not path.is_dir() and not is_file:  # /dev/null too
        raise UserError(f"--out {path} is a file: a soup is a .safetensors, a .pt or a folder")
    if any(parent.is_file() for parent in path.parents):
        raise UserError(f"--out {path} would lie in a file: name a place in a folder")
    if path.is_file() and not force:
        raise UserError(f"--out {path} is there already: name another file, or type --force to overwrite it")


def decimals(values: Iterable[float]) -> int:
    """How many decimals tell these numbers apart and from 0, but for rounding; at least 4, of numbers past 1,000 1.

    >>> decimals([0.5, 0.25]), decimals([0.0001, 0.00012]), decimals([2500.251, 2500.254]), decimals([0.3, 0.1 + 0.2])
    (4, 5, 3, 4)
    """
    different = {float(f"{value:.12g}") for value in values if isfinite(value)} | {0.0}
    usual = 4 if max(map(abs, different)) < 1000 else 1
    enough = (places for places in range(usual, 17) if len({round(v, places) for v in different}) == len(different))
    return next(enough, 17)


def _numbers(soup: Soup) -> Callable[[float | None], str]:
    """How the scores of a soup are printed, all with as many decimals."""
    known = [*soup.alone.values(), *(each.score for each in soup.decisions)]
    places = decimals(known if soup.score is None else [*known, soup.score])
    return lambda value: "" if value is None else f"{value:.{places}f}"


def _table(soup: Soup) -> list[str]:
    """Lines of columns: of every decision, or of every model with its weight."""
    number = _numbers(soup)
    if soup.decisions:
        paired = any(each.gain for each in soup.decisions)
        rows = [["file", "weight", "alone", "with it", *(["gain", "95 % interval", "p"] if paired else []), ""]]
        kept: set[str] = set()
        for each in soup.decisions:
            share = soup.shares.get(each.file) if each.accepted and each.file not in kept else None
            kept |= {each.file} if each.accepted else set()
            numbers = [number(each.alone), number(each.score), *(_columns(each.gain) if paired else [])]
            weight, decision = "" if share is None else f"{share:.4g}", "kept" if each.accepted else "left out"
            rows.append([each.file, weight, *numbers, decision])
    else:
        rows = [["file", "weight", *(["alone"] if soup.alone else [])]]
        for name in dict.fromkeys([*soup.shares, *soup.names]):
            share = soup.shares.get(name, 0.0)
            weight = "by tensor" if share is None else f"{share:.4g}"
            rows.append([name, weight, *([number(soup.alone.get(name))] if soup.alone else [])])
    words = (0, len(rows[0]) - 1 if len(rows[0]) > 3 else 0)  # the columns that are not of numbers
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if i in words else cell.rjust(width) for cell in column])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]


def _columns(gain: Gain | None) -> list[str]:
    """A gain, its interval and p, as three cells."""
    if gain is None:
        return ["", "", ""]
    if _is_nothing(gain):
        return ["0", "", "1"]
    return [*_signed(gain).split(" ", 1), f"{gain.p:.2g}"]


def _is_nothing(gain: Gain) -> bool:
    return gain.mean == gain.low == gain.high == 0


def _signed(gain: Gain) -> str:
    """Mean [low, high] with their signs and as many decimals as they need."""
    assert gain.low is not None and gain.high is not None  # answers are known
    places = decimals([gain.mean, gain.low, gain.high])
    return f"{gain.mean:+.{places}f} [{gain.low:+.{places}f}, {gain.high:+.{places}f}]"


def _summary(soup: Soup) -> list[str]:
    used = [name for name, share in soup.shares.items() if share != 0 and name in soup.names]
    beside = " and the initialisation" if soup.shares.keys() - set(soup.names) else ""
    what = f"{soup.recipe.replace('_', ' ')}: {len(used)} of {len(soup.names)} models{beside}"
    if soup.score is None:
        return [what]
    number = _numbers(soup)
    counted = f", n = {soup.n}" if soup.n else ""
    better = "higher" if soup.goal == "max" else "lower"
    lines = [f"{what}, {soup.metric} {number(soup.score)} ({better} is better{counted})"]
    best, gains = soup.best, [each.gain for each in soup.decisions if each.gain]
    if gains:
        test = "McNemar's exact test" if gains[0].test == "McNemar" else "a permutation test"
        lines.append(f"gain: over the soup so far, in pairs of the same example; p by {test}")
    if best is not None and used == [best]:
        lines.append(f"{soup.recipe} kept only the best single model, {best}: {_why_alone(soup)}")
    elif best is not None and soup.gain is not None:
        lines.append(f"best single model: {best}, {number(soup.alone[best])}; the soup {_gained(soup.gain)}")
        if soup.gain.mean > 0:
            others = "" if soup.report else ": --report measures it on others"
            lines.append(f"the same examples selected the soup, so this gain is optimistic{others}")
    return lines + ([] if soup.report is None else [_reported(soup.report, soup)])


def _reported(report: Report, soup: Soup) -> str:
    """One line of what examples say that selected nothing."""
    places = decimals([report.score] if report.single is None else [report.score, report.single])
    counted = f" (n = {report.n})" if report.n else ""
    line = f"on --report, whose examples selected nothing{counted}: {soup.metric} {report.score:.{places}f}"
    if report.single is None or report.gain is None or list(soup.shares) == [soup.best]:
        return line
    return f"{line}, the best single model {report.single:.{places}f}; the soup {_gained(report.gain)}"


def _gained(gain: Gain) -> str:
    """What is known about the difference to the best single model."""
    if gain.low is None or gain.high is None:
        line = f"gains {gain.mean:+.{decimals([gain.mean])}f}"
        return f"{line} (no interval: it needs the answer to each example, and a score alone is known)"
    if _is_nothing(gain):
        return "gains nothing: both answer every example equally well"
    line = f"gains {_signed(gain)}, p = {gain.p:.2g}"
    return line + (", which is not significantly different from 0" if gain.low <= 0 <= gain.high else "")


def _why_alone(soup: Soup) -> str:
    """What is known about why no other model was added."""
    tried = [each for each in soup.decisions if not each.accepted]
    if not tried:
        return "there is no other model"
    sign = 1 if soup.goal == "max" else -1
    nearest = max(tried, key=lambda each: sign * each.score)
    assert soup.score is not None  # it was tried
    lost = sign * (soup.score - nearest.score)
    by = f"{abs(lost):.{decimals([lost])}f}"
    if lost < 0:
        return f"the nearest, {nearest.file}, gains {by}, which is less than --min-sigma asks for"
    how = f"by {by}" if lost else "left it as it was"
    return (
        f"each of the other {len({each.file for each in tried})} made the score worse (the nearest, {nearest.file}, "
        f"{how}). Usual reasons: they are not fine-tuned from the same checkpoint, went too far (a high learning rate)"
        ", or there are too few examples to tell. `soups doctor FILES` says which; docs/worse.md has what to do"
    )
