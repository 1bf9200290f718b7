"""Model Stock on changes whose angles are known."""

import pytest
import torch

from soups.errors import UserError
from soups.recipes import mean_of
from soups.stock import BLOCK, model_stock


def loaders(*tensors):
    return [lambda t=t: {"w": torch.tensor(t)} for t in tensors]


@pytest.mark.parametrize(
    ("one", "other", "cosine", "t"),
    [
        ([2.0, 1.0], [1.0, 1.0 + 3**0.5], 0.0, 0.0),  # changes (1, 0) and (0, sqrt 3): the start
        ([2.0, 1.0], [4.0, 1.0], 1.0, 1.0),  # one direction: the mean
        ([2.0, 1.0], [1.5, 1.0 + 3**0.5 / 2], 0.5, 2 / 3),  # 60 degrees: 2 x 0.5 / 1.5
        ([2.0, 1.0], [0.0, 1.0], -1.0, 0.0),  # opposite: the start, not beyond it
    ],
)
def test_two_models_are_weighed_by_their_angle_as_worked_out_by_hand(one, other, cosine, t):
    start, *models = loaders([1.0, 1.0], one, other)
    stock = model_stock(start, models)
    assert stock.cosines["w"] == pytest.approx(cosine, abs=1e-6)
    assert stock.ratios["w"] == pytest.approx(t, abs=1e-6)
    expected = (1 - t) * torch.ones(2) + t * (torch.tensor(one) + torch.tensor(other)) / 2
    torch.testing.assert_close(stock.weights["w"], expected)


def test_three_models_at_one_angle_follow_the_formula_for_three():
    # Unit changes with pairwise cosine 1/2 (edges of a tetrahedron): t = 3 x 0.5 / (2 x 0.5 + 1) = 3/4.
    edges = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]) / 2**0.5
    start, *models = loaders([0.0, 0.0, 0.0], *edges.tolist())
    stock = model_stock(start, models)
    assert stock.ratios["w"] == pytest.approx(0.75, abs=1e-6)
    torch.testing.assert_close(stock.weights["w"], 0.75 * edges.mean(dim=0))


def test_each_tensor_has_its_own_ratio_and_integers_are_kept():
    start = {"a": torch.zeros(2), "b": torch.zeros(2), "n": torch.tensor(7)}
    one = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 0.0]), "n": torch.tensor(7)}
    other = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([3.0, 0.0]), "n": torch.tensor(7)}
    stock = model_stock(lambda: start, [lambda: one, lambda: other])
    assert stock.ratios == {"a": 0.0, "b": pytest.approx(1.0)}
    assert torch.equal(stock.weights["a"], torch.zeros(2))
    torch.testing.assert_close(stock.weights["b"], torch.tensor([2.0, 0.0]))
    assert stock.weights["n"].item() == 7


def test_a_tensor_that_fewer_than_two_models_changed_takes_their_mean():
    start, *models = loaders([1.0, 2.0], [1.0, 2.0], [1.0, 4.0])
    stock = model_stock(start, models)
    assert stock.ratios["w"] == 1.0
    assert torch.equal(stock.weights["w"], mean_of(models)["w"])


def test_the_blockwise_cosine_is_that_of_the_whole_tensor():
    generator = torch.Generator().manual_seed(0)
    start, one, other = (torch.randn(2 * BLOCK + 3, generator=generator) for _ in range(3))
    stock = model_stock(lambda: {"w": start}, [lambda: {"w": one}, lambda: {"w": other}])
    whole = torch.cosine_similarity((one - start).double(), (other - start).double(), dim=0).item()
    assert stock.cosines["w"] == pytest.approx(whole, abs=1e-6)
    assert stock.ratios["w"] == pytest.approx(2 * whole / (whole + 1), abs=1e-6)


def test_one_model_or_models_that_do_not_fit_are_refused():
    start, *models = loaders([1.0], [2.0], [3.0, 4.0])
    with pytest.raises(ValueError, match="at least two fine-tuned models, got 1"):
        model_stock(start, models[:1])
    with pytest.raises(UserError, match=r"model 2: tensor 'w' is F32 \(2,\), but F32 \(1,\) in model 0"):
        model_stock(start, models)
    with pytest.raises(UserError, match=r"tensor 'v' is not in model 0$"):
        model_stock(start, [models[0], lambda: {"v": torch.zeros(1)}])
