"""The two shifts that are made rather than drawn: objects placed on grounds, and a filtered set of hard drawings."""

import numpy as np
from PIL import Image

from embedded.icons import over
from embedded.keyed import draw

# photographs that ship inside the scikit-image wheel and are free of rights (see DATA_LICENSES.md)
PHOTOS = ("astronaut", "brick", "chelsea", "coffee", "grass", "hubble_deep_field", "retina", "rocket")
COARSE = 2  # a crop is this many times larger than the image and is shrunk, so that its grain is that of a photo


def photos() -> dict[str, np.ndarray]:
    """Name -> (H, W, 3) uint8, from the files of the installed scikit-image; nothing is downloaded."""
    from skimage import color, data  # noqa: PLC0415  only the build has it

    found = {}
    for name in PHOTOS:
        image = getattr(data, name)()
        found[name] = (image if image.ndim == 3 else color.gray2rgb(image))[..., :3].astype(np.uint8)
    return found


def background(library: dict[str, np.ndarray], size: int, *key: object) -> np.ndarray:
    """A (size, size, 3) uint8 ground: a photo crop (half of the time), a two-colour gradient or a plain colour."""
    kind = draw(*key, "kind")
    if kind < 0.5:
        name = sorted(library)[int(draw(*key, "photo") * len(library))]
        photo, side = library[name], COARSE * size
        top = int(draw(*key, "top") * (photo.shape[0] - side + 1))
        left = int(draw(*key, "left") * (photo.shape[1] - side + 1))
        crop = photo[top : top + side, left : left + side].astype(np.float64)
        return np.rint(crop.reshape(size, COARSE, size, COARSE, 3).mean(axis=(1, 3))).astype(np.uint8)
    first = np.array([draw(*key, "first", c) for c in "rgb"]) * 255
    if kind >= 0.75:
        return np.broadcast_to(np.rint(first).astype(np.uint8), (size, size, 3)).copy()
    second = np.array([draw(*key, "second", c) for c in "rgb"]) * 255
    angle = 2 * np.pi * draw(*key, "angle")
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    along = np.clip((np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2) + 0.5, 0, 1)[..., None]
    return np.rint(first * (1 - along) + second * along).astype(np.uint8)


def place(rgba: np.ndarray, ground: np.ndarray, *key: object) -> np.ndarray:
    """Lay a drawing, turned, shrunk and moved, over a ground.

    Args:
        rgba: (S, S, 4) uint8, drawn larger than the result so that turning costs no sharpness.
        ground: (H, H, 3) uint8 with H <= S.

    Returns:
        (H, H, 3) uint8. The drawing's box is 60 to 95 % of the side, turned by any angle, and its centre is at most
        15 % of the side away from the middle, so that what is cut off is little.
    """
    size = len(ground)
    scale = (0.60 + 0.35 * draw(*key, "scale")) * size / len(rgba)
    angle = 2 * np.pi * draw(*key, "turn")
    centre = size / 2 + (np.array([draw(*key, "x"), draw(*key, "y")]) - 0.5) * 0.30 * size
    # inverse map: target pixel -> source pixel, as PIL wants it
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    half = len(rgba) / 2
    matrix = (
        cos,
        sin,
        half - cos * centre[0] - sin * centre[1],
        -sin,
        cos,
        half + sin * centre[0] - cos * centre[1],
    )
    alpha = rgba[..., 3:].astype(np.float64) / 255
    premultiplied = np.concatenate([rgba[..., :3] * alpha, rgba[..., 3:]], axis=-1)  # or edges bleed black
    planes = [
        np.asarray(
            Image.fromarray(premultiplied[..., c].astype(np.float32)).transform(
                (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
            ),
            np.float64,
        ).clip(0, 255)
        for c in range(4)
    ]
    moved = np.stack(planes, axis=-1)
    colour = moved[..., :3] * 255 / np.maximum(moved[..., 3:], 1)
    return over(np.rint(np.concatenate([colour, moved[..., 3:]], axis=-1).clip(0, 255)).astype(np.uint8), ground)


def features(images: np.ndarray) -> np.ndarray:
    """HOG (8-pixel cells, 9 directions) and an 8 x 8 colour thumbnail: (N, 64, 64, 3) uint8 -> (N, D) float64."""
    from skimage.feature import hog  # noqa: PLC0415  only the build has it

    rows = []
    for image in images:
        shape = hog(
            image, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=-1, feature_vector=True
        )
        colour = image.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)).ravel() / 255
        rows.append(np.concatenate([shape, colour]))
    return np.stack(rows)


def ridge_errors(
    train: np.ndarray, labels: np.ndarray, candidates: np.ndarray, truth: np.ndarray, penalty: float = 10.0
) -> np.ndarray:
    """Which candidates a ridge classifier on HOG and colour gets wrong: (M,) bool.

    Args:
        train, candidates: (N, 64, 64, 3) and (M, 64, 64, 3) uint8.
        labels, truth: (N,) and (M,) integer class ids.
        penalty: added to the Gram matrix of the centred, standardised features.

    Source: Hendrycks et al. 2021 (ImageNet-A) keep what a ResNet-50 gets wrong; here the filter is a model that
    shares nothing with the networks under study.
    """
    known, asked = features(train), features(candidates)
    mean, scale = known.mean(axis=0), known.std(axis=0) + 1e-8
    known, asked = (known - mean) / scale, (asked - mean) / scale
    targets = np.eye(labels.max() + 1)[labels] - 1 / (labels.max() + 1)
    # the dual form: N training drawings are about as many as features, and the Gram matrix is well conditioned
    weights = np.linalg.solve(known @ known.T + penalty * np.eye(len(known)), targets)
    scores = asked @ known.T @ weights
    return scores.argmax(axis=1) != truth
