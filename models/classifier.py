"""The networks that are fine-tuned, souped and evaluated: a tower with a linear head, or a prompted language model."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
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


FEW_PAIRS = 4096  # of output and input pixels: 8 x 8 with 8 x 8, beyond which oneDNN is faster


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution whose weights' gradient on small images is a product of matrices.

    oneDNN has no fast kernel for it where a kernel is larger than 3 x 3 or than the image: these took a third of a step
    of the embedded model. For 5 x 5 weights on 64 images of 4 x 4 pixels and 672 channels it takes 9 ms, where the
    product takes 2 (docs/log.md).
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kernel, stride = weight.shape[-1], self.stride[0]
        pixels = math.prod(input.shape[-2:]) * math.prod(-(-size // stride) for size in input.shape[-2:])
        is_slow = max(input.shape[-2:]) < kernel or (kernel > 3 and pixels <= FEW_PAIRS)
        if is_slow and input.dtype == weight.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu"):
            return _SmallDepthwise.apply(input, weight, bias, stride)
        return super()._conv_forward(input, weight, bias)


class _SmallDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        return F.conv2d(images, weight, bias, stride, weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (images, weight), stride = ctx.saved_tensors, ctx.stride
        of_images = None
        if ctx.needs_input_grad[0]:
            of_images = conv2d_input(images.shape, weight, gradient, stride, weight.shape[-1] // 2, groups=len(weight))
        # For each channel the products of all pixels of the gradient with all of the image, summed over N images:
        # (C, P, N) x (C, N, Q). Each pair of pixels then belongs to one number of the kernel, or to none.
        # The copy, a transposition of a matrix, takes less than the product of what is not laid out for it.
        flat = (tensor.permute(0, 2, 3, 1).flatten(1).t().contiguous() for tensor in (gradient, images))
        outputs, inputs = (matrix.view(-1, len(weight), len(images)).transpose(0, 1) for matrix in flat)
        pairs = torch.bmm(outputs, inputs.transpose(1, 2)).flatten(1)
        kernel = _kernel_of_pairs(tuple(images.shape[-2:]), weight.shape[-1], stride).to(pairs)
        return (
            of_images,
            (pairs @ kernel).view_as(weight),
            gradient.sum((0, 2, 3)) if ctx.has_bias else None,
            None,
            None,
        )


@lru_cache
def _kernel_of_pairs(size: tuple[int, int], kernel: int, stride: int) -> Tensor:
    """(P Q, K) of 0 and 1: which number of a kernel connects each of P output pixels with each of Q of an image."""
    numbers = torch.arange(1.0, math.prod(size) + 1).view(1, 1, *size)  # 0 is the padding
    seen = F.unfold(numbers, kernel, padding=kernel // 2, stride=stride)[0].long()  # (K, P): the pixel, by its number
    return F.one_hot(seen, math.prod(size) + 1)[..., 1:].flatten(1).T.float()


def speed_up_depthwise(model: nn.Module) -> None:
    """Let depthwise convolutions be `DepthwiseConv2d`, in place; up to rounding, results stay as they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups == module.in_channels == module.out_channels > 1:
            kernel, stride = module.kernel_size, module.stride
            if kernel[0] % 2 and stride[0] == stride[1] and module.padding_mode == "zeros":
                sizes = kernel, module.padding, module.dilation
                if sizes == ((kernel[0],) * 2, (kernel[0] // 2,) * 2, (1, 1)):
                    module.__class__ = DepthwiseConv2d


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
