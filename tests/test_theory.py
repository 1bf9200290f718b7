"""The theory on networks whose truth is known: one weight, closed forms, and the slow obvious way."""

import math

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from analysis.theory.equation import (
    along,
    central_difference,
    compare,
    curvature,
    direction,
    line_at,
    loss,
    on_grid,
    soup_at,
    variance,
)
from configs.errors import UserError
from eval.calibration import fit_beta
from models.classifier import Classifier
from models.emoji_clip import model as emoji_clip
from models.hub import HubTower, SentenceTower
from models.prompts import MaskedPrompt, Seq2SeqPrompt
from tasks.split import LabelSpace

ALPHAS = [0.0, 0.25, 0.5, 0.75, 1.0]


class Square(nn.Module):
    """Logits (x w^2, w): quadratic in the only weight."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return torch.stack([x * self.w**2, self.w.expand_as(x)], dim=1)


X, Y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([0, 1, 0])
PAIR = {"w": torch.tensor(1.0).double()}, {"w": torch.tensor(1.5).double()}


def perceptron(activation):
    torch.manual_seed(0)
    layers = nn.Linear(4, 16), activation, nn.Linear(16, 16), activation, nn.Linear(16, 3)
    network = nn.Sequential(*layers).double().eval()
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    end = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in start.items()}
    return network, (start, end), torch.randn(200, 4).double(), torch.randint(0, 3, (200,))


def logits_at(network, weights, batches, project=lambda logits: logits):
    with torch.no_grad():
        found = [torch.func.functional_call(network, weights, (batch,)) for batch in batches]
    return torch.cat([project(each) for each in found])


def exact(network, pair, batches, labels, alpha, *, project=lambda logits: logits):
    """What Figure K.1 shows of one pair and alpha, with the exact curvature."""
    ends = tuple(logits_at(network, weights, batches, project) for weights in pair)
    line = line_at(network, pair, alpha, batches, project)
    return compare(alpha, ends, line[0], labels, lambda beta: (curvature(line, labels, beta), None))


def approximation(terms):
    return terms["convexity_term"] + terms["variance_term"]


def difference(terms):
    return terms["soup_loss"] - terms["ensemble_loss"]


def logit_difference(second, alpha, nodes):
    """Ensemble minus soup: the integral of min((1 - alpha) t, alpha (1 - t)) f''(t) over [0, 1] (Appendix K.2)."""
    places, shares = np.polynomial.legendre.leggauss(nodes)
    total = 0
    for low, high in ((0.0, alpha), (alpha, 1.0)):
        for place, share in zip(places, shares, strict=True):
            t = low + (high - low) * (1 + place) / 2
            total = total + (high - low) / 2 * share * min((1 - alpha) * t, alpha * (1 - t)) * second(t).double()
    return total


def test_a_quadratic_network_has_its_closed_form():
    found = exact(Square(), PAIR, X.split(2), Y, 0.5)
    w, delta, a = 1.25, 0.5, 0.5
    for each, beta in ((found["plain"], 1.0), (found["calibrated"], found["calibrated"]["beta"])):
        p = (beta * (X * w**2 - w)).sigmoid()  # of the first class
        slope = 2 * X * w * delta - delta  # of the first logit, relative to the second
        bend = beta * (p - (Y == 0).double()) * 2 * X * delta**2
        spread = beta**2 * p * (1 - p) * slope**2
        moved = (X * (1.5**2 - 1) - 0.5) ** 2 * p * (1 - p)
        assert each["beta"] == pytest.approx(beta)
        assert each["curvature"] == pytest.approx((bend + spread).mean().item(), rel=1e-12)
        assert each["convexity_term"] == pytest.approx(-a * (1 - a) / 2 * (bend + spread).mean().item(), rel=1e-12)
        assert each["variance_term"] == pytest.approx(a * (1 - a) / 2 * beta**2 * moved.mean().item(), rel=1e-12)
        margin = torch.where(Y == 0, 1, -1) * (X * (1 + 1.5**2) / 2 - 1.25)
        assert each["ensemble_loss"] == pytest.approx(F.softplus(-beta * margin).mean().item(), rel=1e-12)
    assert found["n"] == 3
    assert found["soup_error"] == pytest.approx(1 / 3)  # 1.56 > 1.25 and -3.12 < 1.25 are right, 0.78 < 1.25 is not


@pytest.mark.parametrize("alpha", ALPHAS)
def test_ensemble_minus_soup_is_the_integral_of_the_second_derivative_to_1e_8(alpha):
    network, pair, inputs, _ = perceptron(nn.GELU())
    one, other = (logits_at(network, weights, [inputs]) for weights in pair)
    true = (1 - alpha) * one + alpha * other - logits_at(network, soup_at(pair, alpha), [inputs])
    found = logit_difference(lambda t: line_at(network, pair, t, [inputs])[2], alpha, nodes=24)
    assert (found - true).abs().max() < 1e-8
    assert alpha in (0, 1) or true.abs().max() > 0.01


def test_networks_with_kinks_have_more_between_their_ends_than_the_derivative_says():
    network, pair, inputs, labels = perceptron(nn.ReLU())
    one, other = (logits_at(network, weights, [inputs]) for weights in pair)
    true = 0.5 * one + 0.5 * other - logits_at(network, soup_at(pair, 0.5), [inputs])
    found = logit_difference(lambda t: line_at(network, pair, t, [inputs])[2], 0.5, nodes=24)
    assert (found - true).norm() > 0.1 * true.norm()
    # Differences see the kinks that lie within a step, and are the better second derivative here.
    soups = [logits_at(network, soup_at(pair, i / 10), [inputs]) for i in range(11)]
    cheap, by_derivative = on_grid(soups, labels)[4]["plain"], exact(network, pair, [inputs], labels, 0.5)["plain"]
    assert abs(approximation(cheap) - difference(cheap)) < abs(approximation(by_derivative) - difference(cheap))


def test_approximation_is_near_the_truth_where_the_models_are_near_each_other():
    network, (start, end), inputs, labels = perceptron(nn.GELU())
    errors = []
    for share in (1.0, 0.25):
        near = {name: start[name] + share * (end[name] - start[name]) for name in start}
        found = exact(network, (start, near), [inputs], labels, 0.5)["calibrated"]
        errors.append(abs(approximation(found) - difference(found)) / abs(difference(found)))
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 2


def test_the_calibrated_comparison_is_at_the_beta_that_fits_the_soup():
    network, pair, inputs, labels = perceptron(nn.GELU())
    soup = logits_at(network, soup_at(pair, 0.25), inputs.split(64))
    found = exact(network, pair, inputs.split(64), labels, 0.25)
    assert found["calibrated"]["beta"] == fit_beta(soup, labels)
    assert found["calibrated"]["soup_loss"] < found["plain"]["soup_loss"]
    assert found["plain"]["soup_loss"] == pytest.approx(F.cross_entropy(soup, labels).item())
    assert found["soup_error"] == pytest.approx((soup.argmax(1) != labels).double().mean().item())


def test_differences_on_the_grid_are_the_exact_curvature_within_their_own_error():
    network, pair, inputs, labels = perceptron(nn.GELU())
    points = on_grid([logits_at(network, soup_at(pair, i / 10), [inputs]) for i in range(11)], labels)
    largest = max(abs(each["plain"]["curvature"]) for each in points)
    assert [each["alpha"] for each in points] == pytest.approx([i / 10 for i in range(1, 10)])
    for each in points:
        by_derivative = exact(network, pair, [inputs], labels, each["alpha"])
        for cheap, true in ((each[what], by_derivative[what]) for what in ("plain", "calibrated")):
            assert true["curvature_error"] is None
            assert 0 < abs(cheap["curvature"] - true["curvature"]) < 3 * cheap["curvature_error"]
            assert cheap["curvature_error"] < 0.05 * true["beta"] ** 2 * largest
            assert cheap["soup_loss"] == pytest.approx(true["soup_loss"])
            assert cheap["variance_term"] == pytest.approx(true["variance_term"])


def test_a_central_difference_of_a_quartic_leaves_out_what_it_says():
    losses = [(i / 10) ** 4 for i in range(7)]
    for place in range(1, 6):
        second, error = central_difference(losses, place, 0.1)
        assert second - 12 * (place / 10) ** 2 == pytest.approx(error) == pytest.approx(0.02)
    assert central_difference(losses[:3], 1, 0.1)[1] is None


def test_the_parts_of_the_curvature_are_those_of_the_chain_rule():
    f, f1, f2 = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(50) % 4

    def at(t):
        return F.cross_entropy(2.0 * (f + t * f1 + t * t * f2 / 2), labels)

    hessian = torch.func.hessian(at)(torch.zeros(()).double())
    assert curvature((f, f1, f2), labels, 2.0) == pytest.approx(hessian.item(), rel=1e-12)
    straight = curvature((f, f1, torch.zeros_like(f)), labels, 2.0)
    assert straight == pytest.approx(4 * variance(f, f1, 2.0))


def test_a_variance_by_hand_and_a_loss_by_hand():
    logits, values = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[1.0, 5.0]])
    assert variance(logits, values, 1.0) == pytest.approx(0.75 * 0.25 * 16)
    assert loss(logits, torch.tensor([0]), 1.0) == pytest.approx(math.log(4 / 3))
    assert loss(logits, torch.tensor([1]), 2.0) == pytest.approx(math.log(10))
    # What is common to all classes is no variance, however large.
    assert variance(logits.double(), values.double() + 1e9, 1.0) == pytest.approx(3.0)


def test_large_splits_are_widened_in_parts(monkeypatch):
    torch.manual_seed(0)
    f, labels = torch.randn(11, 3), torch.randint(0, 3, (11,))
    line = f, torch.randn(11, 3), torch.randn(11, 3)
    whole = loss(f, labels, 1.5), variance(f, line[1], 1.5), curvature(line, labels, 1.5)
    monkeypatch.setattr("analysis.theory.equation.AT_ONCE", 12)
    parts = loss(f, labels, 1.5), variance(f, line[1], 1.5), curvature(line, labels, 1.5)
    assert parts == pytest.approx(whole, rel=1e-12)


def test_soups_and_directions_include_statistics_and_leave_counters():
    start = {
        "w": torch.tensor([1.0]),
        "bn.running_mean": torch.tensor([0.0]),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    end = {"w": torch.tensor([2.0]), "bn.running_mean": torch.tensor([4.0]), "bn.num_batches_tracked": torch.tensor(5)}
    soup = soup_at((start, end), 0.25)
    assert (soup["w"], soup["bn.running_mean"], soup["bn.num_batches_tracked"]) == (1.25, 1.0, 5)
    assert {name: step.item() for name, step in direction((start, end)).items()} == {"w": 1.0, "bn.running_mean": 4.0}


def test_a_classifier_in_the_label_space_of_a_split_needs_no_more_than_its_weights():
    def classifier():
        tower = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.GELU())
        return Classifier(tower, 6, 5, torch.zeros(3), torch.ones(3)).double()

    torch.manual_seed(0)
    network, *others = (classifier() for _ in range(3))
    pair = tuple({name: 3 * tensor for name, tensor in other.state_dict().items()} for other in others)
    images, labels = torch.randint(0, 256, (20, 3, 2, 2)).double(), torch.arange(20) % 3
    images += 0.5  # float64, so that the classifier keeps it
    space = LabelSpace(((0, 3), (1,), (4, 2)), 5)
    found = exact(network, pair, images.split(7), labels, 0.5, project=space.project)
    soups = [logits_at(network, soup_at(pair, 0.5 + i / 1000), [images], space.project) for i in range(-2, 3)]
    second, error = central_difference([loss(soup, labels, 1.0) for soup in soups], 2, 1e-3)
    assert found["plain"]["curvature"] == pytest.approx(second, abs=1e-4 * abs(second) + 2 * error)


def test_what_makes_no_point_is_refused():
    logits = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="class ids"):
        compare(0.5, (logits, logits), logits, Y + 1, lambda beta: (0.0, None))
    with pytest.raises(UserError, match="tensor 'v' is not in model 0"):
        line_at(Square(), (PAIR[0], {"v": torch.zeros(())}), 0.5, [X])


# ---- derivatives through every family of networks

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = SIZES | {"image_size": 32, "patch_size": 8}
OPTIONS = torch.tensor([[3, 4], [5, 1], [6, 7]])  # answers of a prompt


def images(tower, width):
    return Classifier(tower, width, 3, torch.zeros(3), torch.ones(3))


def by_timm(name, size, **changes):
    tower = timm.create_model(name, num_classes=0, **changes)
    return images(tower, tower.num_features), torch.rand(3, 3, size, size)


def by_open_clip(activation):
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(16, vision, text, quick_gelu=activation == "quickgelu")
    return images(clip.visual, 16), torch.rand(3, 3, 32, 32)


def by_hub(network, config, **changes):
    sizes = PATCHES | {"intermediate_size": 32} | changes
    return images(HubTower(network(config(**sizes))), 16), torch.rand(3, 3, 32, 32)


def texts():
    return torch.tensor([[2, 5, 6, 7, 8, 3, 3, 1], [2, 9, 8, 3, 3, 1, 0, 0], [2, 4, 3, 3, 1, 0, 0, 0]])


def bert():
    sizes = SIZES | {"intermediate_size": 32, "vocab_size": 12}
    return MaskedPrompt(BertForMaskedLM(BertConfig(**sizes)), OPTIONS, 0), texts()


def encoder():
    network = BertModel(BertConfig(**SIZES, intermediate_size=32, vocab_size=12))
    return Classifier(SentenceTower(network, 0), 16, 3, None, None), texts()


def t5(feed_forward, *, tied):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 12}
    config = T5Config(
        **sizes, feed_forward_proj=feed_forward, tie_word_embeddings=tied, pad_token_id=0, decoder_start_token_id=0
    )
    return Seq2SeqPrompt(T5ForConditionalGeneration(config), OPTIONS, 0), texts()


def embedded():
    return images(emoji_clip.build(50).visual, emoji_clip.EMBED_DIM), torch.rand(3, 3, 64, 64)


SWIN = {"img_size": 32, "window_size": 2, "depths": (2,), "embed_dim": 24, "num_heads": (2,)}
SMOOTH = {
    "open_clip, gelu": lambda: by_open_clip("gelu"),
    "open_clip, quickgelu": lambda: by_open_clip("quickgelu"),
    "timm ViT": lambda: by_timm("test_vit", 32, img_size=32),
    "timm EfficientNet, silu and gates": lambda: by_timm("test_efficientnet", 32),
    "timm ConvNeXt": lambda: by_timm("test_convnext", 32),
    "timm Swin": lambda: by_timm("swin_tiny_patch4_window7_224", 32, **SWIN),
    "SigLIP": lambda: by_hub(SiglipVisionModel, SiglipVisionConfig),
    "transformers CLIP": lambda: by_hub(CLIPVisionModel, CLIPVisionConfig),
    "transformers ViT": lambda: by_hub(ViTModel, ViTConfig),
    "DINOv2": lambda: by_hub(Dinov2Model, Dinov2Config),
    "BERT prompt": bert,
    "T5 1.1 prompt, gated gelu": lambda: t5("gated-gelu", tied=False),
    "MiniLM": encoder,
}
KINKED = {
    "EfficientNet-Lite0, relu6": embedded,
    "ResNet": lambda: by_timm("test_resnet", 32),
    "T5 prompt, relu": lambda: t5("relu", tied=True),
}


class Wide(TorchFunctionMode):
    """Language models compute norms and softmaxes in float32 whatever they are in; here they stay in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float or (func is torch.Tensor.to and args[1:] == (torch.float32,)):
            return args[0]
        kwargs = {name: value for name, value in (kwargs or {}).items() if value is not torch.float32}
        return func(*args, **kwargs)


def made(build):
    """A network in float64, evaluation mode, whose norms are not the identity; its inputs; a direction of all of it."""
    torch.manual_seed(0)
    network, inputs = build()
    network = network.double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    floating = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    # Statistics move upwards, since a variance is positive.
    direction = {n: 0.1 * (torch.rand_like(t) if "running" in n else torch.randn_like(t)) for n, t in floating.items()}
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return network, inputs, weights, direction


def differences(network, inputs, weights, direction, step=2e-3):
    """First and second derivatives by five points, wrong by step^4."""

    def evaluate(t):
        moved = {name: tensor + t * direction.get(name, 0) for name, tensor in weights.items()}
        return torch.func.functional_call(network, moved, (inputs,), strict=False)

    with torch.no_grad():
        a, b, c, d, e = (evaluate(i * step) for i in (-2, -1, 0, 1, 2))
    return (a - 8 * b + 8 * d - e) / (12 * step), (-a + 16 * b - 30 * c + 16 * d - e) / (12 * step**2)


def double_backward(network, inputs, labels, direction):
    """delta^T H delta of the loss by autograd twice, through the network as it is."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(network(inputs), labels)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        along_it = sum((direction[name] * part).sum() for name, part in zip(names, gradient, strict=True))
        product = torch.autograd.grad(along_it, parameters, materialize_grads=True)
    return sum((direction[name] * part).sum().item() for name, part in zip(names, product, strict=True))


# A network without buffers, one of batch norms, and a language model; of the others double backward knows as much.
@pytest.mark.parametrize("family", ["timm ViT", "timm EfficientNet, silu and gates", "BERT prompt"])
def test_derivatives_along_all_weights_and_buffers_are_those_of_differences(family):
    with Wide():
        network, inputs, weights, direction = made(SMOOTH[family])
        value, first, second = along(network, weights, direction, inputs)
        slope, curve = differences(network, inputs, weights, direction)
        torch.testing.assert_close(value, network(inputs), atol=1e-9, rtol=1e-9)
    assert slope.norm() > 1e-3
    assert curve.norm() > 1e-3
    torch.testing.assert_close(first, slope, atol=1e-6 * slope.norm().item(), rtol=0)
    torch.testing.assert_close(second, curve, atol=1e-5 * curve.norm().item(), rtol=0)


@pytest.mark.parametrize("family", [*SMOOTH, *(pytest.param(each, marks=pytest.mark.slow) for each in KINKED)])
def test_curvature_of_the_loss_is_that_of_double_backward(family):
    with Wide():
        network, inputs, weights, moves = made((SMOOTH | KINKED)[family])
        labels = torch.tensor([0, 2, 1])
        moves = {name: moves[name] for name, _ in network.named_parameters()}
        line = along(network, weights, moves, inputs)
        expected = double_backward(network, inputs, labels, moves)
    assert abs(expected) > 1e-4
    assert curvature(line, labels, 1.0) == pytest.approx(expected, rel=1e-8)


class Pooled(nn.Module):
    """A layer between a linear one and the mean over what came out of it."""

    def __init__(self, layer):
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(4, 6), layer, nn.Linear(6, 3)

    def forward(self, x):
        found = self.layer(self.before(x))
        return self.after(found[0] if isinstance(found, tuple) else found).mean(1)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.LayerNorm(6),
        lambda: nn.LayerNorm((5, 6)),
        lambda: nn.RMSNorm(6),
        lambda: nn.GroupNorm(5, 5),
        lambda: nn.BatchNorm1d(5),
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        lambda: nn.GRU(6, 6, batch_first=True),
        nn.Softplus,
        nn.Mish,
    ],
)
def test_layers_that_no_family_has_are_right_too(layer):
    torch.manual_seed(0)
    network, inputs, labels = Pooled(layer()).double().eval(), torch.randn(3, 5, 4).double(), torch.tensor([0, 2, 1])
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    moves = {name: torch.randn_like(p).detach() for name, p in network.named_parameters()}
    found = curvature(along(network, weights, moves, inputs), labels, 1.0)
    assert found == pytest.approx(double_backward(network, inputs, labels, moves), rel=1e-8)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.InstanceNorm1d(5), "instance norm"),
        (nn.BatchNorm1d(5, track_running_stats=False), "statistics of a batch"),
        (nn.Sequential(nn.Linear(6, 12), nn.GLU()), "glu"),
    ],
)
def test_an_operation_without_a_second_derivative_is_refused_by_name(layer, name):
    network = Pooled(layer).eval()
    with pytest.raises(UserError, match=rf"no second derivative of .*{name}.*: take analysis\.theory\.curvature"):
        along(network, network.state_dict(), dict(network.named_parameters()), torch.randn(3, 5, 4))


def test_what_is_written_into_a_sum_is_not_written_into_its_parts():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x):
            moving = (x * self.w).exp()
            return F.relu(moving + torch.tensor([-100.0, 0.0]), inplace=True) + moving

    ones, step = {"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0])}
    _, first, second = along(Residual().eval(), ones, step, torch.ones(1, 2))
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(first, torch.stack([e, 2 * 2 * e]).unsqueeze(0))
    torch.testing.assert_close(second, torch.stack([e, 2 * 4 * e]).unsqueeze(0))


def test_derivatives_in_float32_are_as_good_as_float32_gets():
    network, inputs, weights, direction = made(SMOOTH["timm ViT"])
    wide = along(network, weights, direction, inputs)
    small, step = ({name: tensor.float() for name, tensor in each.items()} for each in (weights, direction))
    narrow = along(network.float(), small, step, inputs.float())
    for found, expected in zip(narrow, wide, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_weights_of_another_network_are_refused():
    network, inputs = nn.Linear(2, 2), torch.ones(1, 2)
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    shorter, longer = {"weight": torch.ones(2, 2)}, weights | {"gain": torch.ones(2)}
    for wrong, name in ((shorter, '"bias"'), (longer, '"gain"')):
        with pytest.raises(RuntimeError, match=name):
            line_at(network, (wrong, wrong), 0.5, [inputs])
