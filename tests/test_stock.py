"""Model Stock on changes whose angles are known."""

import pytest
import torch

import soups
from soups.errors import UserError
from soups.stock import BLOCK, ratio, stock_cosines


def models(*tensors):
    return [{"w": torch.tensor(values)} for values in tensors]


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
    start, *ends = models([1.0, 1.0], one, other)
    assert stock_cosines(start, ends)["w"] == pytest.approx(cosine, abs=1e-6)
    soup = soups.model_stock(start, ends)
    assert soup.note["mean_ratio"] == pytest.approx(t, abs=1e-6)
    expected = (1 - t) * torch.ones(2) + t * (torch.tensor(one) + torch.tensor(other)) / 2
    torch.testing.assert_close(soup.weights["w"], expected)


def test_three_models_at_one_angle_follow_the_formula_for_three():
    # Unit changes with pairwise cosine 1/2 (edges of a tetrahedron): t = 3 x 0.5 / (2 x 0.5 + 1) = 3/4.
    edges = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]) / 2**0.5
    soup = soups.model_stock(*models([0.0, 0.0, 0.0]), models(*edges.tolist()))
    assert soup.note["mean_ratio"] == pytest.approx(0.75, abs=1e-6)
    torch.testing.assert_close(soup.weights["w"], 0.75 * edges.mean(dim=0))


def test_each_tensor_has_its_own_ratio_and_integers_are_kept():
    start = {"a": torch.zeros(2), "b": torch.zeros(2), "n": torch.tensor(7)}
    one = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 0.0]), "n": torch.tensor(7)}
    other = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([3.0, 0.0]), "n": torch.tensor(7)}
    assert stock_cosines(start, [one, other]) == {"a": 0.0, "b": pytest.approx(1.0)}
    weights = soups.model_stock(start, [one, other]).weights
    assert torch.equal(weights["a"], torch.zeros(2))
    torch.testing.assert_close(weights["b"], torch.tensor([2.0, 0.0]))
    assert weights["n"].item() == 7


def test_a_tensor_that_fewer_than_two_models_changed_takes_their_mean():
    start, *ends = models([1.0, 2.0], [1.0, 2.0], [1.0, 4.0])
    assert torch.equal(soups.model_stock(start, ends).weights["w"], torch.tensor([1.0, 3.0]))


def test_the_blockwise_cosine_is_that_of_the_whole_tensor():
    generator = torch.Generator().manual_seed(0)
    start, one, other = (torch.randn(2 * BLOCK + 3, generator=generator) for _ in range(3))
    cosines = stock_cosines({"w": start}, [{"w": one}, {"w": other}])
    whole = torch.cosine_similarity((one - start).double(), (other - start).double(), dim=0).item()
    assert cosines["w"] == pytest.approx(whole, abs=1e-6)
    assert ratio(cosines["w"], 2) == pytest.approx(2 * whole / (whole + 1), abs=1e-6)


def test_models_that_do_not_fit_are_refused():
    start, one, other = models([1.0], [2.0], [3.0, 4.0])
    with pytest.raises(UserError, match=r"model 2: tensor 'w' is F32 \(2,\), but F32 \(1,\) in model 0"):
        stock_cosines(start, [one, other])
    with pytest.raises(UserError, match=r"tensor 'v' is not in model 0$"):
        stock_cosines(start, [one, {"v": torch.zeros(1)}])
