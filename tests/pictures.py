"""Small real image files in folders, for tests."""

import numpy as np
from PIL import Image

from configs.data import ImageFolder

CLASSES = ("a b", "n-o_t", "Öl", "ß/inner")  # the last has its images in a folder of its own, as ImageFolder allows


def noise(width, height, seed=0, channels=3):
    """(height, width, channels) smooth enough that JPEG does not turn it to mud."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, channels), dtype=np.uint8)
    bands = [Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(band) for band in bands], axis=2)


def rgb(width, height, seed=0):
    return Image.fromarray(noise(width, height, seed))


def save_kinds(folder):
    """One image of each kind that an image folder may hold."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = rgb(37, 23)
    picture.save(folder / "plain.jpg")
    picture.convert("L").save(folder / "grey.JPEG")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.quantize(17).save(folder / "palette.png")
    Image.fromarray(noise(20, 31, 1, 4)).save(folder / "rgba.PNG")
    picture.convert("1").save(folder / "bits.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    picture.save(folder / "turned.jpg", exif=turned)
    picture.save(folder / "größe 2.webp")
    picture.save(folder / ".hidden.bmp")
    (folder / "notes.txt").write_text("not an image")


def save_tree(root, per_class=3, classes=CLASSES, splits=("train", "test")):
    """<root>/<split>/<class>/<image>, images of many sizes."""
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                rgb(20 + 7 * i + c, 40 - 3 * i, 1000 * s + 10 * c + i).save(folder / f"{i}.jpg")
    return root


def task(root, **settings):
    """The settings of a task over such a tree."""
    values = {"num_classes": 4, "train": "train", "held_out": "held_out", "test": "test", "shifts": ()}
    return ImageFolder(kind="image_folder", folder=root, **(values | settings))
