"""What the embedded model is pretrained on: drawings of openly licensed icon sets, with their names as captions.

Icons of general sets, and emoji that no class of the benchmark can be: faces, people, symbols, flags.

Reads   the npm packages pinned in sources.csv and in embedded/icons.py (downloaded once)
        and the pictures of the benchmark, none of which may be among the pairs
Writes  <cache>/<digest>.npy, (N, 64, 64, 3) uint8, and <cache>/<digest>.csv, one row a picture: source, name,
        caption, ink; <cache>/<digest>.copies.csv, what was left out as a picture of the benchmark. The digest is that
        of every drawing, caption and look and of the benchmark, so an unchanged recipe is drawn once.
"""

import csv
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np

from embedded.concepts import GROUPS, match, plain, read_sets, read_vocabulary
from embedded.duplicates import thumbnails
from embedded.icons import FetchError, fetch, fetch_pinned, read_iconify, render
from soups.chance import bits
from soups.files.atomic import replacing
from tasks.emoji.load import FILES, SIZE, decoded, read_table

CACHE = Path("~/.cache/model-soups/pairs").expanduser()
SOURCES = Path(__file__).parent / "sources.csv"

EMOJI_DESIGNS = ("noto", "noto-v1", "twemoji", "emojione")  # no design that only a shift shows, none share-alike
LIKE = 0.97  # correlation of grey thumbnails from which two pictures count as one drawing in other colours

# endings and beginnings of icon names that say how a thing is drawn and not what it is
STYLE = frozenset(
    re.findall(
        r"\w+",
        "outline outlined outlines filled fill regular bold light thin medium duotone twotone linear line solid sharp "
        "rounded round broken baseline alt color colour stroke micro mini loop transition badged alerted o f "
        "one two three four five ltr rtl icon remix flat",
    )
)
BRAND = frozenset(["logo", "logos", "brand", "brands"])
# a small mark in the corner of another drawing: "account-plus", "wifi-off"
MARK = frozenset(
    re.findall(r"\w+", "off plus minus slash add remove cancel alert sync edit settings cog delete disabled")
)
MAX_WORDS = 4  # longer names tell of user interfaces, not of things
VARIANTS = 2  # drawings of one name in one set, which mostly differ in style alone
PER_CAPTION = 40  # drawings of one name in all sets: nobody needs a thousand arrows
INKS = {
    "black": "#202124",
    "gray": "#7d858c",
    "red": "#d8342b",
    "orange": "#f08c1e",
    "yellow": "#f2c32b",
    "green": "#3a9b46",
    "blue": "#2f6fd0",
    "purple": "#8246af",
    "pink": "#e86aa6",
    "brown": "#80512f",
    "white": "#fbfbfb",
}
PAPERS = {"white": (255, 255, 255), "cream": (247, 240, 224), "sky": (208, 228, 245), "slate": (52, 58, 70)}


@dataclass(frozen=True)
class Source:
    """One pinned icon set."""

    package: str
    version: str
    sha256: str  # of the tarball
    licence: str  # SPDX
    title: str
    author: str


@dataclass(frozen=True)
class Drawing:
    """One picture to be, and its caption."""

    source: str  # prefix of the icon set
    name: str  # in that set
    caption: str
    ink: str  # name of the colour of a one-colour icon; empty for one that brings its own colours
    paper: str  # name of the background
    svg: str


@dataclass(frozen=True)
class Pairs:
    """N pictures and their captions."""

    images: np.ndarray  # (N, 64, 64, 3) uint8, memory-mapped
    captions: tuple[str, ...]
    inks: tuple[str, ...]  # see Drawing.ink
    sources: tuple[str, ...]
    num_copies: int  # drawings left out, as the benchmark has them
    digest: str


def read_sources(path: Path = SOURCES) -> list[Source]:
    """The pinned icon sets, in the order of the file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Source(**row) for row in csv.DictReader(file)]


def caption_of(name: str) -> str:
    """What an icon's name says that it shows; empty where it says nothing that words can.

    >>> caption_of("alarm-clock-outline"), caption_of("baseline-local-pizza"), caption_of("folder-2-24-filled")
    ('alarm clock', 'local pizza', 'folder')
    >>> caption_of("brand-github"), caption_of("123"), caption_of("4k"), caption_of("wifi-off")
    ('', '', '', '')
    """
    words = re.findall(r"[a-z]+|\d+[a-z]*", name.lower())
    if not BRAND.isdisjoint(words):
        return ""
    while words and (words[-1] in STYLE or words[-1].isdigit()):
        words.pop()
    while words and words[0] in STYLE:
        words.pop(0)
    if len(words) > MAX_WORDS or not MARK.isdisjoint(words[1:]):
        return ""
    return " ".join(words) if any(len(word) > 2 and word.isalpha() for word in words) else ""


def colours_of(source: str, name: str, svg: str) -> tuple[str, str]:
    """Ink and paper of an icon, drawn by its name: half on white, the rest on other papers that show the ink."""
    paper = (*["white"] * 4, "cream", "sky", "slate", "slate")[bits(source, name, "paper") % 8]
    if "currentcolor" not in svg.lower():
        return "", paper
    inks = [ink for ink in INKS if ink not in (("black", "brown", "purple") if paper == "slate" else ("white",))]
    # black is what most drawings have, so it has as many chances as three colours
    inks += ["black"] * 2 if paper != "slate" else ["white"] * 2
    return inks[bits(source, name, "ink") % len(inks)], paper


def drawings_of(source: str, icons: dict[str, str]) -> Iterator[Drawing]:
    """An icon set's drawings: at most `VARIANTS` of a caption, the same drawing once per caption."""
    taken: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    for name in sorted(icons, key=lambda name: bits(source, name)):
        caption, svg = caption_of(name), icons[name]
        if caption and taken[caption] < VARIANTS and (caption, svg) not in seen:
            taken[caption] += 1
            seen.add((caption, svg))
            ink, paper = colours_of(source, name, svg)
            yield Drawing(source, name, caption, ink, paper, svg)


def collect(sources: Iterable[Source]) -> list[Drawing]:
    """Every drawing of the icon sets, in an order that depends on names alone.

    Raises:
        FetchError: a package cannot be had, is not the pinned one, or has another licence than sources.csv says.
    """
    found: list[Drawing] = []
    for source in sources:
        icon_set = read_iconify(fetch(source.package, source.version, sha256=source.sha256))
        if icon_set.licence != source.licence:
            raise FetchError(f"{source.package}: licence {icon_set.licence}, sources.csv says {source.licence}")
        found += drawings_of(icon_set.prefix, icon_set.icons)
    return at_most([*found, *other_emoji()], PER_CAPTION)


def other_emoji() -> Iterator[Drawing]:
    """Emoji of the Unicode groups from which the benchmark takes no class, without skin tones.

    Whole groups are taken, and not what the benchmark left over of its own, so that no change of its classes
    can make one of these a class.
    """
    emojibase = fetch_pinned("emojibase-data")
    rows = json.loads((emojibase / "en" / "data.json").read_text("utf-8"))
    labels = {plain(row["hexcode"]): row["label"] for row in rows if "group" in row and row["group"] not in GROUPS}
    sets = read_sets()
    found = match(sets, read_vocabulary(emojibase, sets))
    for design in EMOJI_DESIGNS:
        for hexcode, names in found[design].items():
            if hexcode in labels:
                svg = sets[design].icons[names[0]]
                ink, paper = colours_of(design, names[0], svg)
                yield Drawing(design, names[0], spoken(labels[hexcode]), ink, paper, svg)


def spoken(label: str) -> str:
    """An emoji's label in plain lower-case words.

    >>> spoken("flag: Côte d’Ivoire"), spoken("O button (blood type)")
    ('flag cote d ivoire', 'o button blood type')
    """
    ascii_only = unicodedata.normalize("NFKD", label.replace("’", " ")).encode("ascii", "ignore").decode()
    return " ".join(re.findall(r"[a-z0-9]+", ascii_only.lower()))


def copies(images: Sequence[np.ndarray], benchmark: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """Which pictures are a picture of the benchmark, or one in other colours.

    Args:
        images: N pictures, (64, 64, 3) uint8. benchmark: (M, 64, 64, 3) uint8.

    Returns:
        (N,) bool: its grey 16 x 16 thumbnail and one of the benchmark's correlate by `LIKE` or more, up or down.
    """
    shapes = _standard(thumbnails(benchmark))
    found = []
    for start in range(0, len(images), chunk):
        own = _standard(thumbnails(np.stack(images[start : start + chunk])))
        found.append((np.abs(own @ shapes.T) >= LIKE).any(axis=1))
    return np.concatenate(found)


def _standard(thumbs: np.ndarray) -> np.ndarray:
    grey = thumbs.reshape(len(thumbs), -1, 3).mean(axis=2)
    grey = grey - grey.mean(axis=1, keepdims=True)
    return grey / np.maximum(np.linalg.norm(grey, axis=1, keepdims=True), 1e-6)


def at_most(drawings: Iterable[Drawing], limit: int) -> list[Drawing]:
    """Keep `limit` drawings of each caption, chosen and ordered by a hash of their names."""
    taken: Counter[str] = Counter()
    kept = []
    for drawing in sorted(drawings, key=lambda d: bits(d.source, d.name)):
        taken[drawing.caption] += 1
        if taken[drawing.caption] <= limit:
            kept.append(drawing)
    return kept


def digest_of(drawings: Iterable[Drawing], benchmark: np.ndarray) -> str:
    """Hex name of a list of drawings with their captions and looks, and of the pictures that must not be there."""
    digest = hashlib.sha256(repr((SIZE, INKS, PAPERS, LIKE)).encode())
    digest.update(benchmark.tobytes())
    for d in drawings:
        digest.update("\0".join((d.source, d.name, d.caption, d.ink, d.paper, d.svg, "")).encode())
    return digest.hexdigest()[:16]


def benchmark_images() -> np.ndarray:
    """(M, 64, 64, 3) uint8: every picture of the benchmark."""
    return np.concatenate([decoded(read_table(name)[0]) for name in FILES])


def draw(drawing: Drawing) -> np.ndarray | None:
    """(64, 64, 3) uint8, or None for a drawing that the renderer refuses or that shows nothing."""
    try:
        image = render(drawing.svg, SIZE, PAPERS[drawing.paper], INKS.get(drawing.ink, "#000"))
    except ValueError:
        return None
    return image if np.ptp(image.reshape(-1, 3).astype(int), axis=0).max() > 40 else None


def render_pairs(drawings: Sequence[Drawing], benchmark: np.ndarray, cache: Path = CACHE, processes: int = 2) -> Pairs:
    """Draw each picture once and keep all in `cache`; a later call with the same arguments only opens the files.

    Args:
        benchmark: (M, 64, 64, 3) uint8; a drawing that is a copy of one of these is left out.
    """
    digest = digest_of(drawings, benchmark)
    images, table, left_out = (cache / f"{digest}.{end}" for end in ("npy", "csv", "copies.csv"))
    if not table.exists():  # written last
        cache.mkdir(parents=True, exist_ok=True)
        with Pool(processes) as pool:
            drawn = [
                (drawing, image)
                for drawing, image in zip(drawings, pool.imap(draw, drawings, chunksize=256), strict=True)
                if image is not None
            ]
        is_copy = copies([image for _, image in drawn], benchmark)
        kept = [pair for pair, copy in zip(drawn, is_copy, strict=True) if not copy]
        with replacing(images) as temporary:
            np.save(temporary, np.stack([image for _, image in kept]))
        _save_table(left_out, [drawing for (drawing, _), copy in zip(drawn, is_copy, strict=True) if copy])
        _save_table(table, [drawing for drawing, _ in kept])
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with left_out.open(newline="", encoding="utf-8") as file:
        num_copies = sum(1 for _ in csv.DictReader(file))
    columns = {key: tuple(row[key] for row in rows) for key in ("caption", "ink", "source")}
    pictures = np.load(images, mmap_mode="r")
    return Pairs(pictures, columns["caption"], columns["ink"], columns["source"], num_copies, digest)


def overlap(captions: Sequence[str], class_names: Sequence[str]) -> dict[str, float]:
    """How far the captions speak of the benchmark's classes.

    Returns:
        Counts of pairs and classes, and shares: of classes whose whole name is a caption, of classes all of whose words
        occur in captions, of the different words of class names that occur, and of pairs captioned with a class name.

    >>> found = overlap(["apple", "red car", "car"], ["red apple", "car", "axe"])
    >>> [round(found[key], 2) for key in ("classes_named", "classes_worded", "words", "pairs_named")]
    [0.33, 0.67, 0.75, 0.33]
    """
    distinct, names = set(captions), [spoken(name) for name in class_names]
    known = set(names)
    caption_words = {word for caption in distinct for word in caption.split()}
    words = {word for name in names for word in name.split()}
    return {
        "num_pairs": len(captions),
        "num_captions": len(distinct),
        "num_classes": len(names),
        "classes_named": sum(name in distinct for name in names) / len(names),
        "classes_worded": sum(caption_words.issuperset(name.split()) for name in names) / len(names),
        "words": len(words & caption_words) / len(words),
        "pairs_named": sum(caption in known for caption in captions) / len(captions),
    }


def _save_table(path: Path, drawings: Iterable[Drawing]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["source", "name", "caption", "ink"])
        writer.writerows([d.source, d.name, d.caption, d.ink] for d in drawings)
