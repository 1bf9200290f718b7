"""The theory on networks whose truth is known: one weight, closed forms, and the slow obvious way."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis.theory import (
    Line,
    Segment,
    central_difference,
    compare,
    curvature,
    ensemble,
    line_at,
    logit_difference,
    logits_at,
    loss,
    on_grid,
    point,
    variance,
)
from configs.errors import UserError
from eval.calibration import fit_beta
from models.classifier import Classifier
from tasks.label_space import LabelSpace

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


def test_a_quadratic_network_has_its_closed_form():
    found = compare(Square(), PAIR, lambda: X.split(2), Y, 0.5)
    w, delta, a = 1.25, 0.5, 0.5
    for each, beta in ((found.plain, 1.0), (found.calibrated, found.calibrated.beta)):
        p = (beta * (X * w**2 - w)).sigmoid()  # of the first class
        slope = 2 * X * w * delta - delta  # of the first logit, relative to the second
        bend = beta * (p - (Y == 0).double()) * 2 * X * delta**2
        spread = beta**2 * p * (1 - p) * slope**2
        moved = (X * (1.5**2 - 1) - 0.5) ** 2 * p * (1 - p)
        assert each.beta == pytest.approx(beta)
        assert each.curvature == pytest.approx((bend + spread).mean().item(), rel=1e-12)
        assert each.variance == pytest.approx(moved.mean().item(), rel=1e-12)
        assert each.convexity_term == pytest.approx(-a * (1 - a) / 2 * (bend + spread).mean().item(), rel=1e-12)
        assert each.variance_term == pytest.approx(a * (1 - a) / 2 * beta**2 * moved.mean().item(), rel=1e-12)
        assert each.approximation == each.convexity_term + each.variance_term
        margin = torch.where(Y == 0, 1, -1) * (X * (1 + 1.5**2) / 2 - 1.25)
        assert each.ensemble_loss == pytest.approx(F.softplus(-beta * margin).mean().item(), rel=1e-12)
        assert each.difference == each.soup_loss - each.ensemble_loss
    assert found.n == 3
    assert found.soup_error == pytest.approx(1 / 3)  # 1.56 > 1.25 and -3.12 < 1.25 are right, 0.78 < 1.25 is not


def test_of_quadratic_logits_the_integral_is_a_constant_times_the_second_derivative():
    segment = Segment(*PAIR)
    for alpha in ALPHAS:
        found = logit_difference(lambda t: line_at(Square(), segment, t, [X]).second, alpha, nodes=1)
        first = alpha * (1 - alpha) / 2 * 2 * X * 0.5**2
        torch.testing.assert_close(found, torch.stack([first, torch.zeros(3).double()], dim=1))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_ensemble_minus_soup_is_the_integral_of_the_second_derivative_to_1e_8(alpha):
    network, pair, inputs, _ = perceptron(nn.GELU())
    segment = Segment(*pair)
    ends = [logits_at(network, weights, [inputs]) for weights in pair]
    true = ensemble(*ends, alpha) - logits_at(network, segment.at(alpha), [inputs])
    found = logit_difference(lambda t: line_at(network, segment, t, [inputs]).second, alpha, nodes=24)
    assert (found - true).abs().max() < 1e-8
    assert alpha in (0, 1) or true.abs().max() > 0.01


def test_networks_with_kinks_have_more_between_their_ends_than_the_derivative_says():
    network, pair, inputs, labels = perceptron(nn.ReLU())
    segment = Segment(*pair)
    ends = [logits_at(network, weights, [inputs]) for weights in pair]
    true = ensemble(*ends, 0.5) - logits_at(network, segment.at(0.5), [inputs])
    found = logit_difference(lambda t: line_at(network, segment, t, [inputs]).second, 0.5, nodes=24)
    assert (found - true).norm() > 0.1 * true.norm()
    # Differences see the kinks that lie within a step, and are the better second derivative here.
    soups = [logits_at(network, segment.at(i / 10), [inputs]) for i in range(11)]
    middle = on_grid(soups, labels)[4].plain
    exact = compare(network, pair, lambda: [inputs], labels, 0.5).plain
    assert abs(middle.approximation - middle.difference) < abs(exact.approximation - exact.difference)


def test_approximation_is_near_the_truth_where_the_models_are_near_each_other():
    network, (start, end), inputs, labels = perceptron(nn.GELU())
    errors = []
    for share in (1.0, 0.25):
        near = {name: start[name] + share * (end[name] - start[name]) for name in start}
        found = compare(network, (start, near), lambda: [inputs], labels, 0.5).calibrated
        errors.append(abs(found.approximation - found.difference) / abs(found.difference))
    assert errors[1] < 0.1
    assert errors[1] < errors[0] / 2


def test_the_calibrated_comparison_is_at_the_beta_that_fits_the_soup():
    network, pair, inputs, labels = perceptron(nn.GELU())
    soup = logits_at(network, Segment(*pair).at(0.25), inputs.split(64))
    found = compare(network, pair, lambda: inputs.split(64), labels, 0.25)
    assert found.calibrated.beta == fit_beta(soup, labels)
    assert found.calibrated.soup_loss < found.plain.soup_loss
    assert found.plain.soup_loss == pytest.approx(F.cross_entropy(soup, labels).item())
    assert found.soup_error == pytest.approx((soup.argmax(1) != labels).double().mean().item())


def test_differences_on_the_grid_are_the_exact_curvature_within_their_own_error():
    network, pair, inputs, labels = perceptron(nn.GELU())
    segment = Segment(*pair)
    points = on_grid([logits_at(network, segment.at(i / 10), [inputs]) for i in range(11)], labels)
    largest = max(abs(each.plain.curvature) for each in points)
    assert [each.alpha for each in points] == pytest.approx([i / 10 for i in range(1, 10)])
    for each in points:
        exact = compare(network, pair, lambda: [inputs], labels, each.alpha)
        for cheap, true in ((each.plain, exact.plain), (each.calibrated, exact.calibrated)):
            assert true.curvature_error is None
            assert 0 < abs(cheap.curvature - true.curvature) < 3 * cheap.curvature_error
            assert cheap.curvature_error < 0.05 * true.beta**2 * largest
            assert cheap.soup_loss == pytest.approx(true.soup_loss)
            assert cheap.variance == pytest.approx(true.variance)


def test_a_central_difference_of_a_quartic_leaves_out_what_it_says():
    losses = [(i / 10) ** 4 for i in range(7)]
    for place in range(1, 6):
        second, error = central_difference(losses, place, 0.1)
        assert second - 12 * (place / 10) ** 2 == pytest.approx(error) == pytest.approx(0.02)
    assert central_difference(losses[:3], 1, 0.1)[1] is None
    with pytest.raises(ValueError, match="neighbour"):
        central_difference(losses, 0, 0.1)


def test_the_parts_of_the_curvature_are_those_of_the_chain_rule():
    f, f1, f2 = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(50) % 4

    def at(t):
        return F.cross_entropy(2.0 * (f + t * f1 + t * t * f2 / 2), labels)

    hessian = torch.func.hessian(at)(torch.zeros(()).double())
    found = curvature(Line(f, f1, f2), labels, 2.0)
    assert found.total == pytest.approx(hessian.item(), rel=1e-12)
    assert curvature(Line(f, f1, torch.zeros_like(f)), labels, 2.0).total == found.spread
    assert found.spread == pytest.approx(4 * variance(f, f1, 2.0))


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
    line = Line(f, torch.randn(11, 3), torch.randn(11, 3))
    whole = loss(f, labels, 1.5), variance(f, line.first, 1.5), curvature(line, labels, 1.5).total
    monkeypatch.setattr("analysis.theory.AT_ONCE", 12)
    parts = loss(f, labels, 1.5), variance(f, line.first, 1.5), curvature(line, labels, 1.5).total
    assert parts == pytest.approx(whole, rel=1e-12)


def test_soups_and_directions_include_statistics_and_leave_counters():
    start = {
        "w": torch.tensor([1.0]),
        "bn.running_mean": torch.tensor([0.0]),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    end = {"w": torch.tensor([2.0]), "bn.running_mean": torch.tensor([4.0]), "bn.num_batches_tracked": torch.tensor(5)}
    segment = Segment(start, end)
    soup = segment.at(0.25)
    assert (soup["w"], soup["bn.running_mean"], soup["bn.num_batches_tracked"]) == (1.25, 1.0, 5)
    assert {name: step.item() for name, step in segment.direction().items()} == {"w": 1.0, "bn.running_mean": 4.0}


def test_a_classifier_in_the_label_space_of_a_split_needs_no_more_than_its_weights():
    def classifier():
        tower = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.GELU())
        return Classifier(tower, 6, 5, torch.zeros(3), torch.ones(3)).double()

    torch.manual_seed(0)
    network, *others = (classifier() for _ in range(3))
    pair = tuple({name: 3 * tensor for name, tensor in other.state_dict().items()} for other in others)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images, labels = torch.randint(0, 256, (20, 3, 2, 2)).double(), torch.arange(20) % 3
    images += 0.5  # float64, so that the classifier keeps it
    space = LabelSpace(((0, 3), (1,), (4, 2)), 5)
    found = compare(network, pair, lambda: images.split(7), labels, 0.5, project=space.project)
    soups = [logits_at(network, Segment(*pair).at(0.5 + i / 1000), [images], space.project) for i in range(-2, 3)]
    second, error = central_difference([loss(soup, labels, 1.0) for soup in soups], 2, 1e-3)
    assert found.plain.curvature == pytest.approx(second, abs=1e-4 * abs(second) + 2 * error)
    ends = [logits_at(network, weights, [images], space.project) for weights in pair]
    again = compare(network, pair, lambda: [images], labels, 0.5, ends=tuple(ends), project=space.project)
    assert again.plain.ensemble_loss == pytest.approx(found.plain.ensemble_loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_what_makes_no_point_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        compare(Square(), PAIR, lambda: [X], Y, 1.5)
    with pytest.raises(UserError, match="tensor 'v' is not in model 0"):
        compare(Square(), (PAIR[0], {"v": torch.zeros(())}), lambda: [X], Y, 0.5, ends=(X[:, None], X[:, None]))
    with pytest.raises(ValueError, match="class ids"):
        point(0.5, (torch.zeros(3, 2), torch.zeros(3, 2)), torch.zeros(3, 2), Y + 1, lambda beta: (0.0, None))
