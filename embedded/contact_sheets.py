"""Draw a sheet of pictures of each split:  python -m embedded.contact_sheets [--data DIR] [--out DIR]

Writes  DIR/{split}.png: 96 pictures, the same ones each time, with their class names
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from embedded.keyed import draw
from soups.errors import one_line_errors
from tasks.emoji.load import DATA, SIZE, SPLITS, class_names, load_split
from tasks.split import ImageSplit

OUT = Path(__file__).resolve().parents[1] / "docs" / "emoji"
COLUMNS, ROWS, GAP, LINE = 12, 8, 4, 11  # pictures, pictures, pixels, pixels


def sheet(split: ImageSplit, names: tuple[str, ...]) -> Image.Image:
    """96 pictures with their class names, cut to what fits under them."""
    chosen = sorted(range(len(split)), key=lambda i: draw("sheet", split.name, i))[: COLUMNS * ROWS]
    width, height = SIZE + GAP, SIZE + GAP + LINE
    canvas = Image.new("RGB", (COLUMNS * width + GAP, ROWS * height + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for place, i in enumerate(sorted(chosen, key=lambda i: int(split.labels[i]))):
        x, y = GAP + place % COLUMNS * width, GAP + place // COLUMNS * height
        canvas.paste(Image.fromarray(np.ascontiguousarray(split.images[i].permute(1, 2, 0).numpy())), (x, y))
        pen.text((x, y + SIZE), names[split.labels[i]].encode("ascii", "ignore").decode()[:12], fill="black")
    return canvas


def main() -> None:
    """Draw the sheet of every split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    names = class_names(options.data)
    for name in SPLITS:
        path = options.out / f"{name}.png"
        # 128 colours keep the page small; the pictures themselves are in the parquet files
        sheet(load_split(name, options.data), names).quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    one_line_errors(main)
