"""The running average in memory keeps to the policy of soups.mean."""

from collections.abc import Mapping

import pytest
import torch

from soups.average import Average, mixture, rounded
from soups.errors import UserError
from soups.recipes import mean_of


def mean(*states):
    return mean_of([lambda state=state: state for state in states])


def test_tied_tensors_are_summed_once_and_stay_tied():
    def tied(value):
        w = torch.full((2,), value)
        return {"head": w, "embedding": w, "other": w.clone()}

    average = Average().plus(tied(1.0)).plus(tied(4.0))
    assert len({id(total) for total in average.sums.values()}) == 2
    assert list(average.sums) == ["head", "embedding", "other"]
    weights = average.weights()
    assert weights["head"].data_ptr() == weights["embedding"].data_ptr() != weights["other"].data_ptr()
    assert weights["head"].tolist() == [2.5, 2.5]


def test_a_file_that_holds_both_names_fits_to_a_tied_model_while_they_are_equal():
    w = torch.ones(2)
    loaded = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert mean({"a": w, "b": w}, loaded)["b"].tolist() == [0.5, 0.5]


def test_sixteen_bits_are_rounded_to_once():
    # Above the middle of 1 and the next bfloat16 by less than float32 can tell.
    values = torch.tensor([1 + 2**-8 + 2**-40, 1 + 2**-8], dtype=torch.float64)
    assert rounded(values, torch.bfloat16).tolist() == [1 + 2**-7, 1.0]
    assert rounded(values[0], torch.bfloat16).shape == ()
    assert rounded(torch.tensor(1 + 2**-11 + 2**-40, dtype=torch.float64), torch.float16).item() == 1 + 2**-10


class ReadWhenAsked(Mapping):
    """Weights whose tensors are made at each access, as `LazyWeights` reads them."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __getitem__(self, name):
        return torch.full((64,), self.numbers[name])

    def __iter__(self):
        return iter(self.numbers)

    def __len__(self):
        return len(self.numbers)


def test_tensors_that_are_read_when_asked_for_are_not_taken_for_tied():
    one, other = ({f"w{i}": float(i + shift) for i in range(20)} for shift in (0, 2))
    mean = Average().plus(ReadWhenAsked(one)).plus(ReadWhenAsked(other)).weights()
    assert [mean[f"w{i}"][0].item() for i in range(20)] == [i + 1.0 for i in range(20)]


def test_several_kinds_become_the_narrowest_that_holds_all_and_infinities_of_all_are_kept():
    mask = torch.tensor([0.0, -torch.inf])
    half = {"w": torch.tensor([1.0]).half(), "n": torch.tensor([1.0]), "mask": mask}
    brain = {"w": torch.tensor([1 + 2.0**-7]).bfloat16(), "n": torch.tensor([2.0]), "mask": mask}
    for found in (mean(half, brain), mixture([half, brain], lambda name: (0.5, 0.5))):
        assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(half, torch.float32)
        assert (found["w"].item(), found["n"].item()) == (1 + 2.0**-8, 1.5)
        assert torch.equal(found["mask"], mask)
    with pytest.raises(UserError, match="model 1: tensor 'mask' holds NaN or infinity"):
        mean(half | {"mask": torch.zeros(2)}, brain)
