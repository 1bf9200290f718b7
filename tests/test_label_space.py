"""Projections of logits, worked out by hand."""

import pytest
import torch

from tasks.label_space import LabelSpace

LOGITS = torch.tensor([[5.0, 1.0, 4.0, 2.0], [0.0, 9.0, 3.0, 8.0]])


def test_a_subset_masks_all_other_classes():
    found = LabelSpace.subset((2, 3), 4).project(LOGITS)
    assert found.tolist() == [[4, 2], [3, 8]]
    assert found.argmax(dim=1).tolist() == [0, 1]  # although classes 0 and 1 have the largest logits


def test_a_class_with_two_ids_takes_the_larger_logit():
    found = LabelSpace(((1, 3), (0,)), 4).project(LOGITS)
    assert found.tolist() == [[2, 5], [9, 0]]


def test_projecting_leaves_the_logits_as_they_were():
    before = LOGITS.clone()
    LabelSpace(((1, 3), (0,)), 4).project(LOGITS)
    assert torch.equal(before, LOGITS)


@pytest.mark.parametrize("ids", [((4,),), ((),), ((-1,),)])
def test_ids_outside_the_models_classes_are_refused(ids):
    with pytest.raises(ValueError, match=r"ids in \[0, 4\)"):
        LabelSpace(ids, 4)


def test_logits_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"need \(N, 5\) logits"):
        LabelSpace.subset((0,), 5).project(LOGITS)
