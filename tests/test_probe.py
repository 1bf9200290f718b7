"""The linear probe ends at scikit-learn's optimum, wherever it was interrupted, in float32 as in float64."""

import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from configs.errors import InterruptedBySignalError, UserError
from models import probe as probes
from models.probe import linear_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def features_of(n: int, width: int, classes: int, *, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit-norm features around a centre of each class, on top of a mean that all share, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    scale = torch.arange(1, width + 1) ** -0.5
    centres = torch.randn(classes, width, generator=generator) * scale
    noise = torch.randn(n, width, generator=generator) * scale
    return normalize(centres[labels] + spread * noise + 2 * scale, dim=1), labels


def objective(weight: Tensor, bias: Tensor, data: tuple[Tensor, Tensor], c: float) -> float:
    """scikit-learn's, over n: mean cross-entropy and half the squares of what it calls coef_ over C n."""
    features, labels = data[0].double(), data[1]
    squares = weight.double().square().sum() / features.shape[1]
    if len(weight) == 2:  # coef_ is the difference of the two
        squares = (weight[1] - weight[0]).double().square().sum() / features.shape[1]
    loss = cross_entropy(features @ weight.double().T + bias.double(), labels)
    return (loss + squares / (2 * c * len(labels))).item()


def scikit_learn(data: tuple[Tensor, Tensor], c: float) -> float:
    """The objective where scikit-learn ends when it is not hurried."""
    scaled = data[0].shape[1] ** 0.5 * data[0].double().numpy()
    fit = LogisticRegression(C=c, max_iter=10_000, tol=1e-7).fit(scaled, data[1].numpy())
    weight, bias = torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return objective(data[0].shape[1] ** 0.5 * weight, bias, data, c)


@pytest.mark.parametrize(
    ("shape", "c"),
    [
        ((300, 12, 6), 1e-4),
        ((300, 12, 6), 1.0),
        ((300, 12, 6), 1e3),
        ((200, 8, 2), 0.1),
        ((200, 8, 2), 100.0),
        ((120, 5, 30), 1.0),  # more classes than features
        ((40, 60, 4), 1.0),  # more features than examples
    ],
)
@pytest.mark.parametrize("small", [True, False])
def test_the_optimum_is_scikit_learn_s(tmp_path, monkeypatch, shape, c, small):
    monkeypatch.setattr(probes, "SMALL", probes.SMALL if small else 0)
    data = features_of(*shape)
    probe = linear_probe(data, data, shape[2], [c], tmp_path)
    ours, theirs = objective(probe.weight, probe.bias, data, c), scikit_learn(data, c)
    assert ours == pytest.approx(theirs, rel=1e-6 if small else 1e-4)


def test_binary_cross_entropy_is_scikit_learn_s_one_against_the_rest(tmp_path):
    data = features_of(200, 8, 5)
    probe = linear_probe(data, data, 5, [1], tmp_path, loss="bce")
    scaled = 8**0.5 * data[0].double().numpy()
    for number in range(5):
        fit = LogisticRegression(C=1, max_iter=10_000, tol=1e-9).fit(scaled, data[1].numpy() == number)
        np.testing.assert_allclose(probe.weight[number].numpy(), 8**0.5 * fit.coef_[0], atol=2e-4, rtol=2e-4)
        np.testing.assert_allclose(probe.bias[number].item(), fit.intercept_[0], atol=2e-4, rtol=2e-4)
    assert not torch.equal(linear_probe(data, data, 5, [1], tmp_path).weight, probe.weight)  # each has its own files


def test_chunks_and_the_values_of_c_before_change_nothing(tmp_path, monkeypatch):
    data = features_of(200, 8, 5)
    alone = linear_probe(data, data, 5, [10], tmp_path / "alone")
    monkeypatch.setattr(probes, "CHUNK", 8 * 7)  # seven examples
    after = linear_probe(data, data, 5, [10, 0.01, 0.1], tmp_path / "after")
    assert [c for c, _ in after.tried] == [0.01, 0.1, 10] and after.c == 10
    torch.testing.assert_close((after.weight, after.bias), (alone.weight, alone.bias), atol=1e-4, rtol=1e-4)


def passes(monkeypatch) -> list[float]:
    """Filled with the penalty's inverse at each pass over the features."""
    seen: list[float] = []
    original = probes.Problem.__call__

    def counted(self, point, penalty, dtype):
        seen.append(round(1 / (penalty[0].item() * self.n * self.width), 6))
        return original(self, point, penalty, dtype)

    monkeypatch.setattr(probes.Problem, "__call__", counted)
    return seen


@pytest.mark.parametrize("small", [True, False])
def test_a_signal_ends_the_fit_within_a_chunk_and_it_continues_bit_for_bit(tmp_path, monkeypatch, small):
    monkeypatch.setattr(probes, "SMALL", probes.SMALL if small else 0)
    data, values = features_of(200, 8, 5), [0.1, 10]
    seen = passes(monkeypatch)
    whole = linear_probe(data, data, 5, values, tmp_path / "whole")
    needed = list(seen)
    seen.clear()

    def check():
        if len(seen) == stop:
            raise InterruptedBySignalError(15)

    first = needed.count(0.1)
    for stop in (first // 2, first + 12):  # in the first fit, and in the second
        seen.clear() if stop < first else None
        with pytest.raises(InterruptedBySignalError):
            linear_probe(data, data, 5, values, tmp_path / "killed", check=check)
    stop = -1
    seen.clear()
    killed = linear_probe(data, data, 5, values, tmp_path / "killed", check=check)
    assert 0 < len(seen) < needed.count(10) and 0.1 not in seen  # the first value of C is not fitted again
    assert torch.equal(killed.weight, whole.weight) and torch.equal(killed.bias, whole.bias)
    seen.clear()
    linear_probe(data, data, 5, values, tmp_path / "killed")
    assert not seen
    assert len(list((tmp_path / "killed").iterdir())) == 2  # a head of each C, and no state


def test_a_fit_that_lasts_is_kept_now_and_then_and_a_damaged_file_of_it_is_named(tmp_path, monkeypatch, capsys):
    data, seen = features_of(200, 8, 5), passes(monkeypatch)
    monkeypatch.setattr(probes, "KEEP_SECONDS", 0)

    def check():
        if len(seen) == 10:
            raise KeyboardInterrupt  # as a kill: nothing is saved by it

    with pytest.raises(KeyboardInterrupt):
        linear_probe(data, data, 5, [1], tmp_path, check=check)
    (state,) = tmp_path.glob("*.pt")
    assert torch.load(state, weights_only=True)["taken"] > 3
    state.write_bytes(state.read_bytes()[:-100])
    whole = linear_probe(data, data, 5, [1], tmp_path)
    assert re.search(r"\.pt is damaged \(\w+\): this part of the linear probe begins anew", capsys.readouterr().out)
    (head,) = tmp_path.glob("*.npy")
    np.save(head, np.load(head)[::-1])  # not what was written
    assert torch.equal(linear_probe(data, data, 5, [1], tmp_path).weight, whole.weight)
    assert f"{head} is damaged" in capsys.readouterr().out


def test_what_float32_leaves_is_mended_in_float64(tmp_path, monkeypatch):
    """Features whose mean hides their differences from float32: 7 digits, of which the mean has 5."""
    monkeypatch.setattr(probes, "SMALL", 0)
    features, labels = features_of(200, 8, 5)
    far = (features + 3000, labels)
    probe = linear_probe(far, far, 5, [1], tmp_path)
    assert objective(probe.weight, probe.bias, far, 1) < 1.001 * scikit_learn((far[0].double() - 3000, labels), 1)


def test_it_says_so_where_it_does_not_converge(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "MAX_STEPS", 3)
    data = features_of(200, 8, 5)
    with pytest.raises(UserError, match=r"with C = 10 does not converge in 3 steps: leave 10 out of model.probe_c"):
        linear_probe(data, data, 5, [10], tmp_path)


def test_it_separates_what_is_separable_and_chooses_on_held_out(tmp_path):
    labels = torch.arange(5).repeat(20)
    features = torch.eye(5)[labels] + 0.1 * torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    probe = linear_probe((features, labels), (features, labels), 5, [1e-6, 10], tmp_path)
    assert ((features @ probe.weight.T + probe.bias).argmax(dim=1) == labels).float().mean() > 0.95
    assert {c for c, _ in probe.tried} == {1e-6, 10}
    opposite = linear_probe((features, labels), (features, labels.roll(1)), 5, [1e-6, 10], tmp_path)
    assert dict(opposite.tried) != dict(probe.tried)
    equals = linear_probe((features, labels), (features, labels), 5, [10, 1], tmp_path)
    assert equals.tried[0][1] == equals.tried[1][1]
    assert equals.c == 1  # the smallest


def test_a_class_without_examples_is_refused(tmp_path):
    data = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"classes \[2\] have no training example"):
        linear_probe(data, data, 3, [1], tmp_path)
