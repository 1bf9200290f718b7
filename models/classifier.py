"""The networks that are fine-tuned, souped and evaluated: a tower with a linear head, or a prompted language model."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from configs.errors import UserError
from configs.training import Model
from models.backbones import backbone_of
from models.emoji_clip.model import TEMPLATES
from models.hub import Backbone, prompted
from models.prompts import Prompted
from soups.chance import seed
from tasks.image_folder import WNID


class Classifier(nn.Module):
    """Logits = head(features of the tower); in the authors' wrapper around CLIP features have unit norm.

    Images are (N, 3, H, W) in 0..255, uint8 or float; they are normalised here, so that no caller can forget to.
    Texts are (N, L) token ids.
    """

    subtracted: tuple[float, ...] = ()  # the mean as numbers, RGB in [0, 1]; texts have none
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        tower: nn.Module,
        width: int,
        classes: int,
        mean: Tensor | None,
        std: Tensor | None,
        *,
        normalize: bool = True,
        frozen_batch_norm: bool = True,
    ):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(width, classes)
        self.normalize = normalize
        self.frozen_batch_norm = frozen_batch_norm
        self.memory_format = torch.contiguous_format
        # Not part of the weights: averaging models must not average constants.
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if value is None else 255 * value.view(1, 3, 1, 1), persistent=False)

    @property
    def num_classes(self) -> int:
        """How many logits an example has."""
        return self.head.out_features

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self.head.weight.device

    def features(self, inputs: Tensor) -> Tensor:
        """Images in 0..255 or token ids to (N, width), with unit norm where `normalize` is set."""
        inputs = inputs.to(self.device)
        if self.mean is not None and self.std is not None:
            inputs = (inputs.float() - self.mean) / self.std
            inputs = inputs.contiguous(memory_format=self.memory_format)
        features = self.tower(inputs)
        return F.normalize(features, dim=-1) if self.normalize else features

    def forward(self, inputs: Tensor) -> Tensor:
        """Images in 0..255 or token ids to (N, classes) logits."""
        return self.head(self.features(inputs))

    def train(self, mode: bool = True) -> "Classifier":
        """Training mode, except that frozen batch norms keep the pretrained statistics."""
        super().train(mode)
        if self.frozen_batch_norm:
            for module in batch_norms(self):
                module.eval()
        return self

    def channels_last(self, on: bool) -> "Classifier":
        """Keep convolutions and images in this memory format, which changes speed and the last bits."""
        self.memory_format = torch.channels_last if on else torch.contiguous_format
        return self.to(memory_format=self.memory_format)


Network = Classifier | Prompted


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The layers that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


class PaddedConv2d(nn.Conv2d):
    """A depthwise convolution that pads images smaller than its kernel itself, and leaves out what meets only zeros.

    oneDNN has no fast kernel for the gradient of such weights, which took a third of a step of the embedded model: for
    5 x 5 weights on 64 images of 2 x 2 pixels and 1,152 channels 44 ms, where these 3 x 3 take 2 (docs/log.md).
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        height, width = input.shape[-2:]
        if max(height, width) >= weight.shape[-1]:
            return super()._conv_forward(input, weight, bias)
        radius = weight.shape[-1] // 2
        reach = min(radius, max(height, width) - 1)  # pixels from the middle of the kernel to the farthest of the image
        used = slice(radius - reach, radius + reach + 1)
        padded = F.pad(input, [reach] * 4)
        return F.conv2d(padded, weight[..., used, used], bias, self.stride, groups=self.groups)


def pad_small_images(model: nn.Module) -> None:
    """Let depthwise convolutions pad small images themselves, in place; up to rounding, results stay as they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == module.in_channels > 1:
            radius = module.kernel_size[0] // 2
            sizes = module.kernel_size, module.padding, module.dilation, module.padding_mode
            if sizes == ((2 * radius + 1,) * 2, (radius,) * 2, (1, 1), "zeros"):
                module.__class__ = PaddedConv2d


def zero_shot_head(class_embeddings: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The head that classifies by similarity to text: weight (C, width) = scale x unit embeddings, bias (C,) = 0.

    Args:
        class_embeddings: (C, T, width) unit-norm text features of C class names in T templates.
        scale: CLIP's exp(logit_scale).

    Source: Radford et al. 2021, Section 3.1.4: mean over templates, then normalised.
    """
    weight = scale * F.normalize(class_embeddings.mean(dim=1), dim=-1)
    return weight, torch.zeros(len(weight))


PROMPTS: dict[str, Sequence[Callable[[str], str]]] = {
    "openai": OPENAI_IMAGENET_TEMPLATES,
    "emoji": [template.format for template in TEMPLATES],
    "name": [str],
    "sentiment": ["This is {}.".format, "I feel {} about it.".format, "a {} review".format, "a {} comment".format],
}


def architecture(model: Model, num_classes: int, answers: tuple[str, ...] = ()) -> Network:
    """The network that weights are loaded into; it starts with random ones, or none under torch.device("meta").

    Args:
        model: which.
        num_classes: logits of an example.
        answers: for a prompted language model, `Task.answers`.

    Raises:
        UserError: the library does not know the model.
    """
    if model.head == "prompt":
        return prompted(model, answers, weights=False)
    backbone, _ = backbone_of(model, torch.device("cpu"), weights=False)
    return _classifier(model, backbone, num_classes)


def pretrained_network(model: Model, class_names: tuple[str, ...], answers: tuple[str, ...] = ()) -> Network:
    """The network that every fine-tuned model starts from: `pretrained`, or a language model that answers prompts."""
    if model.head == "prompt":
        return prompted(model, answers, weights=True)
    return pretrained(model, class_names)


def pretrained(model: Model, class_names: tuple[str, ...]) -> Classifier:
    """The pretrained tower with its zero-shot head for these classes, or a random head without `model.templates`.

    Raises:
        UserError: the pretrained weights are missing or damaged; templates for a network without a text tower.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, text = backbone_of(model, device, weights=True)
    classifier = _classifier(model, backbone, len(class_names))
    if model.templates is None:
        set_head(classifier, *random_head(len(class_names), backbone.width))
        return classifier.cpu()
    if text is None:
        raise UserError(f"{model.kind} model {model.name} has no text tower: set model.templates=null")
    if all(WNID.fullmatch(name) for name in class_names):
        raise UserError(
            f"classes are called {class_names[0]}, ..., WordNet ids and no words to a zero-shot head: "
            "task.names=imagenet has ImageNet's 1,000 names; else rename the folders or set model.templates=null"
        )
    prompts = PROMPTS[model.templates]
    texts = [prompt(name) for name in class_names for prompt in prompts]
    embeddings = text.embed(texts).cpu().view(len(class_names), len(prompts), -1)
    set_head(classifier, *zero_shot_head(embeddings, text.scale))
    return classifier.cpu()  # a tower that embeds texts has moved to the device with its other half


def _classifier(model: Model, backbone: Backbone, num_classes: int) -> Classifier:
    mean, std = (None if value is None else torch.tensor(value) for value in (backbone.mean, backbone.std))
    modes = {"normalize": model.normalize, "frozen_batch_norm": model.frozen_batch_norm}
    classifier = Classifier(backbone.tower, backbone.width, num_classes, mean, std, **modes)
    freeze_stages(classifier, model.frozen_stages)
    classifier.head.requires_grad_(model.train_head)
    classifier.subtracted = tuple(backbone.mean or ())
    return classifier


def random_head(classes: int, width: int) -> tuple[Tensor, Tensor]:
    """Weight (C, width), normal with standard deviation 0.02, and bias (C,) = 0; the same for the same sizes."""
    generator = torch.Generator().manual_seed(seed("head", classes, width))
    return 0.02 * torch.randn(classes, width, generator=generator), torch.zeros(classes)


def set_head(classifier: Classifier, weight: Tensor, bias: Tensor) -> None:
    """Copy weight (C, width) and bias (C,) into the head."""
    with torch.no_grad():
        classifier.head.weight.copy_(weight)
        classifier.head.bias.copy_(bias)


def freeze_stages(classifier: Classifier, stages: int) -> None:
    """Stop training the stem and the first `stages` stages of the tower; 0 freezes nothing."""
    if stages == 0:
        return
    trunk = classifier.tower.get_submodule("trunk")
    for name in ("conv_stem", "bn1", *(f"blocks.{stage}" for stage in range(stages))):
        trunk.get_submodule(name).requires_grad_(False)
