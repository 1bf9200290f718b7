"""Make the emoji benchmark from the icon packages:  python -m embedded.build [--out DIR] [--cache DIR] [--check]

Reads   twelve pinned npm packages (downloaded once with npm) and photographs inside scikit-image
Writes  DIR/{drawings,v2,r,sketch,objectnet,a}.parquet, DIR/manifest.json, DIR/near_duplicates.csv

The same packages give the same bytes; `--check` builds into a temporary folder and compares with DIR.
"""

import argparse
import csv
import hashlib
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from embedded.concepts import DESIGNS, MIN_DESIGNS, Concept, match, read_concepts, read_sets, read_vocabulary
from embedded.duplicates import confusable, distinct, near
from embedded.icons import CACHE, PACKAGES, IconSet, check_tools, fetch_pinned, render, render_rgba
from embedded.keyed import draw
from embedded.shifts import background, photos, place, ridge_errors
from soups.errors import one_line_errors
from soups.files.atomic import replacing, write_text
from tasks.emoji.load import DATA, DRAWINGS, FILES, FOLDS, SPLITS, read_split

FILTER_LEAVES = 0.25  # of a class's drawings but the first, about this share is unknown to the filter
PLACEMENTS = 3  # pictures of each drawing in the ObjectNet-like split
FLAT, COLOUR, BLACK = "fluent-emoji-flat", "openmoji-color", "openmoji-black"
ENCODERS = ("resvg-py", "scikit-image", "numpy", "pillow", "pyarrow")  # other versions may give other bytes
NEAR_COLUMNS = ("file", "source", "icon", "other_file", "other_source", "other_icon", "same_class", "distance")


@dataclass(frozen=True)
class Picture:
    """One image of a split and where it comes from."""

    pixels: np.ndarray  # (64, 64, 3) uint8
    hexcode: str
    source: str  # set@version
    icon: str  # its name in the set
    licence: str  # SPDX


@dataclass(frozen=True)
class Drawings:
    """The icon sets, and which drawing in them shows which concept."""

    sets: Mapping[str, IconSet]
    names: Mapping[str, Mapping[str, tuple[str, ...]]]  # set -> hexcode -> icon names

    def pictures(self, key: str, hexcode: str) -> list[Picture]:
        """Every drawing of a concept in one set, on white."""
        return [
            self.picture(key, hexcode, name, render(self.sets[key].icons[name]))
            for name in self.names[key].get(hexcode, ())
        ]

    def picture(self, key: str, hexcode: str, name: str, pixels: np.ndarray) -> Picture:
        """A picture made from one drawing, with that drawing's source and licence."""
        package = PACKAGES["openmoji" if key.startswith("openmoji") else key]
        return Picture(pixels, hexcode, f"{key}@{package.version}", name, self.sets[key].licence)


def read_drawings(cache: Path) -> tuple[Drawings, dict[str, Concept]]:
    """All drawings, and the concepts that enough of the five designs show."""
    emojibase = fetch_pinned("emojibase-data", cache)
    sets = read_sets(cache)
    names = match(sets, read_vocabulary(emojibase, sets))
    concepts = {
        hexcode: concept
        for hexcode, concept in read_concepts(emojibase).items()
        if sum(hexcode in names[design] for design in DESIGNS) >= MIN_DESIGNS
    }
    return Drawings(sets, names), concepts


def five_designs(drawings: Drawings, concepts: Mapping[str, Concept]) -> tuple[list[Picture], dict]:
    """The drawings that folds deal to train, held-out and test, and a record of what was dropped.

    They are ordered by class, and within a class by a keyed number. A drawing that is near an earlier one of its class
    is dropped.
    """
    rendered = {
        design: {h: found[0] for h in concepts if (found := drawings.pictures(design, h))}
        for design in track(DESIGNS, "drawing the five designs")
    }
    alike = confusable([{h: p.pixels for h, p in rendered[design].items()} for design in DESIGNS])
    dealt: list[Picture] = []
    repeated = []
    for hexcode in concepts:
        if hexcode in alike:
            continue
        ours = [rendered[design][hexcode] for design in DESIGNS if hexcode in rendered[design]]
        ours.sort(key=lambda picture: draw("test", hexcode, picture.source.split("@")[0]))
        kept = distinct([picture.pixels for picture in ours])
        repeated += [f"{p.source} {p.icon}" for i, p in enumerate(ours) if i not in kept]
        dealt += [ours[i] for i in kept]
    return dealt, {"concepts drawn alike": [concepts[h].name for h in alike], "drawings repeated": repeated}


def drawn_shifts(drawings: Drawings, classes: Iterable[str]) -> dict[str, list[Picture]]:
    """The shifts that other designers drew: v2, r and sketch."""
    sources = {
        "v2": ("fxemoji",),
        "r": ("fluent-emoji", "streamline-emojis"),
        "sketch": ("fluent-emoji-high-contrast", BLACK),
    }
    classes = list(classes)
    return {
        split: [p for key in keys for hexcode in classes for p in drawings.pictures(key, hexcode)]
        for split, keys in track(sources.items(), "drawing the shifts")
    }


def is_placed(hexcode: str) -> bool:
    """Whether fluent's flat drawing of a class is for `objectnet`; if not, it is a candidate for `a`."""
    return draw("flat", hexcode) < 0.5


def placed(drawings: Drawings, classes: Iterable[str]) -> list[Picture]:
    """The ObjectNet-like split: flat drawings turned, moved and laid on photo crops, gradients and plain colours."""
    library, pictures = photos(), []
    for hexcode in track([h for h in classes if is_placed(h)], "placing objects"):
        for name in drawings.names[FLAT].get(hexcode, ()):
            rgba = render_rgba(drawings.sets[FLAT].icons[name], 192)
            for i in range(PLACEMENTS):
                key = ("objectnet", hexcode, i)
                pixels = place(rgba, background(library, 64, *key), *key)
                pictures.append(drawings.picture(FLAT, hexcode, name, pixels))
    return pictures


def hard(drawings: Drawings, classes: list[str], dealt: list[Picture]) -> list[Picture]:
    """The A-like split: openmoji and flat drawings that a ridge baseline fitted on `learned_by_filter` gets wrong."""
    train = learned_by_filter(dealt)
    candidates = [p for h in classes for p in drawings.pictures(COLOUR, h)]
    candidates += [p for h in classes if not is_placed(h) for p in drawings.pictures(FLAT, h)]
    wrong = ridge_errors(
        np.stack([p.pixels for p in train]),
        np.array([classes.index(p.hexcode) for p in train]),
        np.stack([p.pixels for p in candidates]),
        np.array([classes.index(p.hexcode) for p in candidates]),
    )
    return [picture for picture, is_wrong in zip(candidates, wrong, strict=True) if is_wrong]


def learned_by_filter(dealt: list[Picture]) -> list[Picture]:
    """Three drawings in five, whatever the fold: the filter of the A-like split is the same in all of them.

    Of each class these are all but the first, and of the rest those whose keyed number is not in the lowest quarter, or
    at least the last.
    """
    chance = [draw("held_out", picture.hexcode, picture.source.split("@")[0]) for picture in dealt]
    last: dict[str, float] = {}
    first = set()
    for i, picture in enumerate(dealt):
        if picture.hexcode not in last:
            first.add(i)
            last[picture.hexcode] = 0.0
        else:
            last[picture.hexcode] = max(last[picture.hexcode], chance[i])
    return [p for i, p in enumerate(dealt) if i not in first and chance[i] >= min(FILTER_LEAVES, last[p.hexcode])]


def near_duplicates(files: Mapping[str, list[Picture]]) -> tuple[list[dict[str, object]], list[list[int]]]:
    """A row for each near pair of a drawing that folds deal and any picture; and for each drawing, those it is near."""
    stacks = {name: np.stack([p.pixels for p in pictures]) for name, pictures in files.items()}
    ours = files[DRAWINGS]
    rows: list[dict[str, object]] = []
    beside: list[list[int]] = [[] for _ in ours]
    for name in track(FILES, "looking for near-duplicates"):
        for i, j, distance in near(stacks[DRAWINGS], stacks[name]):
            if name == DRAWINGS and i != j:
                beside[i].append(j)
            if name == DRAWINGS and i >= j:
                continue
            first, second = ours[i], files[name][j]
            same_class = int(first.hexcode == second.hexcode)
            row = (DRAWINGS, first.source, first.icon, name, second.source, second.icon, same_class, f"{distance:.2f}")
            rows.append(dict(zip(NEAR_COLUMNS, row, strict=True)))
    return rows, beside


def dealing_columns(pictures: list[Picture], beside: list[list[int]]) -> dict[str, list]:
    """What `tasks.emoji.load.deal` reads: the place of each drawing among those of its class, and what it is near."""
    places: dict[str, int] = {}
    place = []
    for picture in pictures:
        place.append(places.get(picture.hexcode, 0))
        places[picture.hexcode] = place[-1] + 1
    return {"place": place, "near": beside}


def write_file(
    pictures: list[Picture], classes: Mapping[str, Concept], path: Path, dealing: Mapping[str, list] | None = None
) -> None:
    """One parquet file; no timestamps and fixed settings, so that equal pictures give equal bytes."""
    label = {hexcode: i for i, hexcode in enumerate(classes)}
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=[concept.name for concept in classes.values()]),
        **{column: datasets.Value("string") for column in ("name", "hexcode", "source", "icon", "licence")},
        **({"place": datasets.Value("int8"), "near": datasets.List(datasets.Value("int16"))} if dealing else {}),
    )
    columns = {
        "image": [{"bytes": webp(p.pixels), "path": None} for p in pictures],
        "label": [label[p.hexcode] for p in pictures],
        "name": [classes[p.hexcode].name for p in pictures],
        "hexcode": [p.hexcode for p in pictures],
        "source": [p.source for p in pictures],
        "icon": [p.icon for p in pictures],
        "licence": [p.licence for p in pictures],
        **(dealing or {}),
    }
    table = pa.table(columns, schema=features.arrow_schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="none", use_dictionary=False, write_statistics=False)


def webp(pixels: np.ndarray) -> bytes:
    """Lossless WebP; decodes to the same pixels."""
    buffer = io.BytesIO()
    # 2 % larger than the slowest setting, and 20 times as fast
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def build(out: Path, cache: Path = CACHE) -> dict:
    """Make every file of the benchmark in `out`; returns the manifest."""
    drawings, concepts = read_drawings(cache)
    dealt, dropped = five_designs(drawings, concepts)
    classes = {p.hexcode: concepts[p.hexcode] for p in dealt}  # in Unicode's order
    files = {DRAWINGS: dealt, **drawn_shifts(drawings, classes)}
    files["objectnet"] = placed(drawings, classes)
    files["a"] = hard(drawings, list(classes), dealt)
    rows, beside = near_duplicates(files)

    entries = {}
    for name in track(FILES, "writing"):
        path = out / f"{name}.parquet"
        write_file(files[name], classes, path, dealing_columns(dealt, beside) if name == DRAWINGS else None)
        entries[name] = {"count": len(files[name]), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with replacing(out / "near_duplicates.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(NEAR_COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    manifest = {
        "files": entries,
        "near_duplicates": dict(Counter(row["other_file"] for row in rows)),
        "dropped": dropped,
        "built_with": {name: version(name) for name in ENCODERS},
        "sources": {key: {"package": p.name, "version": p.version, "sha256": p.sha256} for key, p in PACKAGES.items()},
        "classes": [vars(concept) for concept in classes.values()],
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def differences(built: Path, committed: Path) -> list[str]:
    """Names of the files that are not byte for byte the same in both folders."""
    names = [f"{name}.parquet" for name in FILES] + ["manifest.json", "near_duplicates.csv"]
    return [
        name
        for name in names
        if not (committed / name).exists() or (built / name).read_bytes() != (committed / name).read_bytes()
    ]


def report(manifest: dict, folder: Path, console: Console) -> None:
    """Print what was written, and how folds deal it."""
    table = Table("file", "pictures", "near-duplicates of drawings", title=str(folder))
    for name, entry in manifest["files"].items():
        table.add_row(name, str(entry["count"]), str(manifest["near_duplicates"].get(name, 0)))
    console.print(table)
    dealt = Table("fold", *SPLITS[:3], "left out", title="drawings by fold")
    for fold in range(FOLDS):
        counts = [read_split(name, folder, fold)[0].num_rows for name in SPLITS[:3]]
        dealt.add_row(str(fold), *map(str, counts), str(manifest["files"][DRAWINGS]["count"] - sum(counts)))
    console.print(dealt)
    for reason, names in manifest["dropped"].items():
        console.print(f"dropped, {reason} ({len(names)}): {', '.join(names)}")


def main() -> None:
    """Build, or compare with what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where npm packages are kept")
    parser.add_argument("--check", action="store_true", help="change nothing, say whether --out is what would be built")
    options = parser.parse_args()
    check_tools("resvg_py", "skimage")
    console = Console()
    if not options.check:
        report(build(options.out, options.cache), options.out, console)
        return
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch), options.cache)
        changed = differences(Path(scratch), options.out)
    if changed:
        used = ", ".join(f"{name} {version(name)}" for name in ENCODERS)
        sys.exit(f"{options.out}: not what the packages give with {used}: {', '.join(changed)}")
    console.print(f"{options.out}: every file is byte for byte what the packages give")


if __name__ == "__main__":
    one_line_errors(main)
