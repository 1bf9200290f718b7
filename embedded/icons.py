"""Icon sets: fetch pinned npm packages, read their drawings as SVG text, render them to pixels.

Only the build needs this module (npm, resvg); training and evaluation read the finished parquet files.
"""

import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from configs.errors import UserError

CACHE = Path("~/.cache/model-soups/npm").expanduser()


@dataclass(frozen=True)
class Package:
    """A pinned npm package; `sha256` is that of its tarball."""

    name: str
    version: str
    sha256: str


PACKAGES: dict[str, Package] = {
    "noto": Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": Package(
        "@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
    ),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "emojione-v1": Package(
        "@iconify-json/emojione-v1", "1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"
    ),
    "fluent-emoji": Package(
        "@iconify-json/fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
    ),
    "fluent-emoji-flat": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "fluent-emoji-high-contrast": Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "streamline-emojis": Package(
        "@iconify-json/streamline-emojis", "1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"
    ),
    "openmoji": Package("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
    "emojibase-data": Package(
        "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
    ),
}


class FetchError(UserError):
    """A package could not be had, or is not the pinned one."""


def check_tools(*modules: str) -> None:
    """Check before anything is downloaded that what draws is installed.

    Raises:
        UserError: a module of requirements-build.txt cannot be imported.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} cannot be imported: type pip install -r requirements-build.txt")


@dataclass(frozen=True)
class IconSet:
    """The drawings of one designer."""

    prefix: str
    licence: str  # SPDX
    icons: dict[str, str]  # name -> complete SVG text; aliases are resolved, icons marked hidden are left out
    chars: dict[str, str] = field(default_factory=dict)  # upper-case hexcode -> name; empty in some sets


def fetch(package: str, version: str, cache: Path = CACHE, sha256: str | None = None) -> Path:
    """The unpacked folder of an npm package, downloaded once.

    Args:
        package: npm name, such as "@iconify-json/noto".
        cache: where the tarball and the unpacked folder are kept; made if missing.
        sha256: expected digest of the tarball, checked on every call; None checks nothing.

    Returns:
        The folder that holds package.json.

    Raises:
        FetchError: npm is missing or cannot download the package, or the tarball is not the pinned one.
    """
    stem = f"{package.lstrip('@').replace('/', '-')}-{version}"
    tarball, folder = cache / f"{stem}.tgz", cache / stem
    cache.mkdir(parents=True, exist_ok=True)
    if not tarball.exists():
        _download(f"{package}@{version}", tarball)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if sha256 is not None and digest != sha256:
        raise FetchError(f"{tarball}: sha256 is {digest}, expected {sha256}; delete the file and try again")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            with tarfile.open(tarball) as archive:
                archive.extractall(scratch, filter="data")
            try:
                (Path(scratch) / "package").rename(folder)
            except OSError:
                if not folder.exists():  # another process may have unpacked it first, which is as good
                    raise
    return folder


def _download(spec: str, tarball: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"{spec}: npm is not installed: install Node.js (using the data does not need it)")
    with tempfile.TemporaryDirectory(dir=tarball.parent) as scratch:
        command = [npm, "pack", spec, "--pack-destination", scratch, "--ignore-scripts", "--silent"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        made = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(made) != 1:
            raise FetchError(f"{spec}: npm pack failed (offline?): {' '.join((done.stderr or done.stdout).split())}")
        made[0].replace(tarball)


def fetch_pinned(key: str, cache: Path = CACHE) -> Path:
    """The unpacked folder of `PACKAGES[key]`."""
    package = PACKAGES[key]
    return fetch(package.name, package.version, cache, package.sha256)


def read_iconify(folder: Path) -> IconSet:
    """Read an @iconify-json package: every visible icon and alias as complete SVG text."""
    data = json.loads((folder / "icons.json").read_text("utf-8"))
    info = json.loads((folder / "info.json").read_text("utf-8"))
    chars = folder / "chars.json"
    visible = [name for name, icon in (data["icons"] | data.get("aliases", {})).items() if "hidden" not in icon]
    return IconSet(
        prefix=data["prefix"],
        licence=info["license"]["spdx"],
        icons={name: iconify_svg(data, name) for name in visible},
        chars={k.upper(): v for k, v in json.loads(chars.read_text("utf-8")).items()} if chars.exists() else {},
    )


def read_openmoji(folder: Path, style: str) -> IconSet:
    """Read the openmoji package; `style` is "color" or "black". Icons are named by their hexcode."""
    icons = {path.stem: path.read_text("utf-8") for path in sorted((folder / style / "svg").glob("*.svg"))}
    return IconSet(f"openmoji-{style}", "CC-BY-SA-4.0", icons, {name: name for name in icons})


def iconify_svg(data: Mapping, name: str) -> str:
    """Complete SVG text of an icon or alias of an iconify collection.

    An alias takes its parent's drawing; its own flips toggle the parent's, its quarter turns are added to the
    parent's, and its size and offset replace the parent's.

    Raises:
        KeyError: no such icon, or an alias whose chain of parents ends nowhere.
        ValueError: aliases in a circle.

    Source: the Iconify JSON format, and `mergeIconData` and `iconToSVG` of @iconify/utils.
    """
    chain: list[tuple[str, Mapping]] = []
    seen = name
    while seen not in data["icons"]:
        if seen in {n for n, _ in chain}:
            raise ValueError(f"alias {name!r} is its own ancestor")
        alias = data.get("aliases", {})[seen]
        chain.append((seen, alias))
        seen = alias["parent"]
    layers = [data, data["icons"][seen], *(alias for _, alias in reversed(chain))]  # the collection holds defaults
    left, top, width, height = (_last(layers, key, default) for key, default in BOX.items())
    h_flip = sum(bool(layer.get("hFlip")) for layer in layers) % 2
    v_flip = sum(bool(layer.get("vFlip")) for layer in layers) % 2
    turns = sum(layer.get("rotate", 0) for layer in layers) % 4
    body = data["icons"][seen]["body"]
    if h_flip or v_flip or turns:
        # move the centre to the origin, flip, turn, and move back into a box whose sides may have been swapped
        new_width, new_height = (height, width) if turns % 2 else (width, height)
        transform = (
            f"translate({new_width / 2:g} {new_height / 2:g}) rotate({90 * turns}) "
            f"scale({-1 if h_flip else 1} {-1 if v_flip else 1}) "
            f"translate({-left - width / 2:g} {-top - height / 2:g})"
        )
        body = f'<g transform="{transform}">{body}</g>'
        left, top, width, height = 0, 0, new_width, new_height
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {width:g} {height:g}">{body}</svg>'
    )


BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # the format's defaults


def _last(layers: list[Mapping], key: str, default: float) -> float:
    return next((layer[key] for layer in reversed(layers) if key in layer), default)


def render_rgba(svg: str, size: int = 64, colour: str = "#000") -> np.ndarray:
    """Draw an SVG in the middle of a transparent square, keeping its proportions.

    Args:
        colour: what `currentColor` stands for.

    Returns:
        (size, size, 4) uint8, alpha not premultiplied.

    Raises:
        ValueError: not an SVG that resvg can draw.
    """
    import resvg_py  # noqa: PLC0415  only the build has it

    svg = re.sub("currentColor", colour, svg, flags=re.IGNORECASE)
    # resvg stretches nothing if the outer element says its size and viewBox: the default is "xMidYMid meet"
    head = re.search(r"<svg\b[^>]*>", svg)
    if head is None:
        raise ValueError("no <svg> element")
    sized = re.sub(r"\s(width|height)=(\"[^\"]*\"|'[^']*')", "", head[0])
    sized = sized.replace("<svg", f'<svg width="{size}" height="{size}"', 1)
    png = resvg_py.svg_to_bytes(svg_string=svg.replace(head[0], sized, 1), skip_system_fonts=True)
    image = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    if image.shape != (size, size, 4):
        raise ValueError(f"drew {image.shape}, not {(size, size, 4)}")
    return image


def over(rgba: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Lay (H, W, 4) uint8 over (H, W, 3) or (3,) uint8; returns (H, W, 3) uint8, rounded to nearest."""
    alpha = rgba[..., 3:].astype(np.int32)
    mixed = rgba[..., :3].astype(np.int32) * alpha + background.astype(np.int32) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def render(
    svg: str, size: int = 64, background: tuple[int, int, int] = (255, 255, 255), colour: str = "#000"
) -> np.ndarray:
    """Draw an SVG on a plain background: (size, size, 3) uint8. See `render_rgba`."""
    return over(render_rgba(svg, size, colour), np.array(background, np.uint8))
