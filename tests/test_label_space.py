"""A split reports the classes that it has, from logits over all of the network's."""

import pytest
import torch

from configs.errors import UserError
from tasks.split import ImageSplit, LabelSpace, Pixels, project

LOGITS = torch.tensor([[5.0, 1.0, 2.0, 0.0], [0.0, 3.0, 2.0, 4.0]])


def test_a_reported_class_has_the_highest_of_its_logits():
    # classes 1 and 2 are one: their logits 1 and 2 give 2, 3 and 2 give 3. Class 0, the highest of the first image,
    # is reported nowhere, so that its image counts for the class of 1 and 2.
    space = LabelSpace(((1, 2), (3,)), 4)
    torch.testing.assert_close(space.project(LOGITS), torch.tensor([[2.0, 0.0], [3.0, 4.0]]))
    assert space.project(LOGITS).argmax(dim=1).tolist() == [0, 1]


def test_a_subset_keeps_its_own_order_and_the_logits_as_they_are():
    space = LabelSpace.subset([3, 0], 4)
    assert torch.equal(space.project(LOGITS), LOGITS[:, [3, 0]])
    assert len(space) == 2


def test_without_a_space_the_networks_classes_are_reported():
    assert project(None, LOGITS) is LOGITS
    assert project(LabelSpace.subset([1], 4), LOGITS).tolist() == [[1.0], [3.0]]


def test_negative_logits_do_not_meet_a_padding_of_zeros():
    space = LabelSpace(((0,), (1, 2, 3)), 4)
    assert space.project(-1 - LOGITS).tolist() == [[-6.0, -1.0], [-1.0, -3.0]]


def test_logits_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"need \(N, 3\) logits, got \(2, 4\)"):
        LabelSpace.subset([0], 3).project(LOGITS)


def test_a_network_of_some_classes_reports_what_is_left_of_each():
    # of a network with classes 1 and 3 only: the first reported class keeps 1, the second goes, the third is 3.
    space = LabelSpace(((1, 2), (0,), (3,)), 4)
    left, kept = space.of_classes([3, 1])
    assert (left, kept) == (LabelSpace(((1,), (0,)), 2), (0, 2))
    # of classes 2, 1 and 0 the first keeps both of its ids, in its own order
    assert space.of_classes([2, 1, 0]) == (LabelSpace(((1, 0), (2,)), 3), (0, 1))
    assert space.of_classes([2])[0].ids == ((0,),)
    with pytest.raises(UserError, match="leave a split without any class"):
        LabelSpace.subset([0], 4).of_classes([1, 2])


def test_images_follow_the_reported_classes_that_are_left():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    space = LabelSpace(((1, 2), (0,), (3,)), 4)
    whole = ImageSplit(
        "r", Pixels(images), torch.tensor([2, 1, 0, 2, 1]), "d", space, torch.tensor([0, 1, 0, 1, -1]), ("a", "b")
    )
    part = whole.of_classes([1, 3], "e")
    assert part.images[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert part.labels.tolist() == [1, 0, 1]
    assert part.space == LabelSpace(((0,), (1,)), 2)
    assert part.groups.tolist() == [0, 0, 1]
    assert part.group_names == ("a", "b")
