"""ImageNet and its shifts in the layouts of their archives, with the real 1,000 class folders and few images."""

import json
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from pictures import rgb

from configs.errors import UserError
from configs.schema import load
from tasks.image_folder import objectnet_classes
from tasks.load import load_annotations, load_split
from tasks.split import LabelSpace

PUBLISHED = Path(__file__).resolve().parents[1].parent / "shared/reference/objectnet"
INFO = files("timm.data._info")
WNIDS = (INFO / "imagenet_synsets.txt").read_text().split()


def published(name):
    """timm's list of the classes of ImageNet-R or -A, by folder and by class id."""
    synsets = (INFO / f"imagenet_{name}_synsets.txt").read_text().split()
    return synsets, [int(i) for i in (INFO / f"imagenet_{name}_indices.txt").read_text().split()]


def save_mappings(folder):
    """A mapping of three labels: class id i is line (i + 355) mod 1,000, which is called `name <line>`."""
    folder.mkdir(parents=True)
    labels = {"alarm_clock": "Alarm clock", "chair": "Chair", "ant": "Ant", "squeegee": "Squeegee"}
    imagenet = {"Chair": "name 355", "Alarm clock": "name 764; name 885", "Ant": "name 354"}
    (folder / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    (folder / "objectnet_to_imagenet_1k.json").write_text(json.dumps(imagenet))
    (folder / "imagenet_to_label_2012_v2").write_text("".join(f"name {i}\n" for i in range(1000)))
    ids = {str(i): (i + 355) % 1000 for i in range(1000)}
    (folder / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(ids))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All eight splits; the images of a split are links to one file."""
    root = tmp_path_factory.mktemp("imagenet")
    rgb(24, 20).save(root / "one.jpg")
    rgb(24, 20).save(root / "one.png")

    def save(split, classes, names, kind="jpg"):
        for folder in classes:
            (root / split / folder).mkdir(parents=True)
            for name in names:
                (root / split / folder / name).hardlink_to(root / f"one.{kind}")

    save("train", WNIDS, ["1.JPEG", "2.JPEG"])
    for i, wnid in enumerate(WNIDS):
        save("val", [wnid], [f"ILSVRC2012_val_{1000 - i:08d}.JPEG"])
    save("sketch", WNIDS, ["sketch_0.JPEG"])
    save("imagenetv2-matched-frequency-format-val", [str(i) for i in range(1000)], ["a.jpeg"])
    save("imagenet-r", published("r")[0], ["art_0.jpg"])
    save("imagenet-a", published("a")[0], ["0.jpg", "1.jpg"])
    save("objectnet-1.0/images", ["chair", "alarm_clock", "ant", "squeegee"], ["a.png", "b.png"], "png")
    save_mappings(root / "objectnet-1.0/mappings")
    return root


def settings(root, *typed, subsets="task.subsets.objectnet=3"):
    """The task of Table 3 over this miniature."""
    small = ["task.counts=null", "task.held_out_per_class=1", f"paths.runs={root.parent / (root.name + '-runs')}"]
    return load("table3_clip_b32", f"task.folder={root}", *small, subsets, *typed).task


@pytest.mark.parametrize(("split", "images"), [("r", 200), ("a", 400)])
def test_classes_of_a_subset_are_those_that_timm_publishes(whole, split, images):
    found = load_split(settings(whole), split)
    assert found.space == LabelSpace.subset(published(split)[1], 1000)
    assert len(found) == images
    for row in (0, 57, images - 1):
        assert found.stored.path(row).parent.name == WNIDS[found.space.ids[found.labels[row]][0]]


@pytest.mark.parametrize("name", ["train", "held_out", "test", "sketch", "v2"])
def test_every_other_split_is_over_all_classes_and_the_folders_of_v2_are_ids_and_not_sorted_as_text(whole, name):
    found = load_split(settings(whole), name)
    assert found.space is None
    assert found.labels.tolist() == list(range(1000))
    assert found.stored.path(10).parent.name == ("10" if name == "v2" else WNIDS[10])


def test_objectnet_has_the_images_of_the_overlap_and_joins_the_ids_of_a_class(whole):
    found = load_split(settings(whole), "objectnet")
    # name 764 is class id 409 and name 885 is 530, name 354 is 999 and name 355 is 0
    assert found.space.ids == ((409, 530), (999,), (0,))
    assert [found.stored.path(row).parent.name for row in (0, 2, 4)] == ["alarm_clock", "ant", "chair"]
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    logits = torch.zeros(1, 1000)
    logits[0, [530, 999, 0, 1]] = torch.tensor([3.0, 2.0, 1.0, 9.0])
    assert found.space.project(logits).tolist() == [[3.0, 2.0, 1.0]]


def test_the_border_of_objectnet_is_cut_only_where_the_settings_say_so(whole):
    plain = load_split(settings(whole), "objectnet")
    cut = load_split(settings(whole, "task.objectnet_border=true"), "objectnet")
    assert plain.pil(0).size == (24, 20)
    assert cut.pil(0).size == (20, 16)
    assert cut.pil(0).getpixel((0, 0)) == plain.pil(0).getpixel((2, 2))
    assert cut.digest != plain.digest, "decoded images are kept by digest"
    assert load_split(settings(whole, "task.objectnet_border=true"), "r").pil(0).size == (24, 20)


def test_a_network_of_some_classes_is_evaluated_on_theirs(whole):
    few = settings(whole, "task.classes=6")
    assert load_split(few, "r").space.ids == ((1,), (2,), (4,))
    assert load_split(few, "r").stored.path(2).parent.name == WNIDS[4]
    chairs = load_split(few, "objectnet")
    assert chairs.space.ids == ((0,),)
    assert [chairs.stored.path(row).parent.name for row in range(len(chairs))] == ["chair", "chair"]
    with pytest.raises(UserError, match="leave a split without any class"):
        load_split(few, "a")


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published mapping is not here")
def test_the_published_mapping_has_113_classes_over_125_ids():
    found, others = objectnet_classes(PUBLISHED, 1000)
    assert len(others) == 200
    assert len(found) == 113
    ids = [i for several in found.values() for i in several]
    assert len(ids) == len(set(ids)) == 125
    assert found["alarm_clock"] == (409, 530)
    assert set(found["chair"]) == {423, 559, 765}
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("split", "typed", "words"),
    [
        ("r", "task.subsets.r=199", "imagenet-r is of 200 classes, but task.subsets.r=199"),
        ("objectnet", "task.subsets.objectnet=113", "images is of 3 classes, but task.subsets.objectnet=113"),
        ("r", "~task.subsets.r", "'n01440764' is missing; training has it; of a split with fewer classes, task.subs"),
        ("v2", "task.numbered=[]", "class folder '0' is unknown; training does not have it"),
        ("test", "task.numbered=[test]", "'0' is missing; a numbering of 1000 classes from 0 has it"),
        ("objectnet", "task.objectnet=null", "class folder 'alarm_clock' is unknown"),
        ("r", "task.counts={r: 30000}", r"imagenet-r has 200 images, but split 'r' has 30,000: .*task.counts=null"),
        ("held_out", "task.counts={train: 3}", r"train has 2,000 images, but split 'train' has 3"),
    ],
)
def test_what_the_settings_do_not_say_of_a_split_is_an_error(whole, split, typed, words):
    with pytest.raises(UserError, match=words):
        load_split(settings(whole, typed), split)


def test_a_strange_class_folder_is_an_error_in_a_subset_and_in_objectnet(tmp_path, whole):
    root = shutil.copytree(whole, tmp_path / "copy", copy_function=lambda a, b: Path(b).hardlink_to(a))
    (root / "imagenet-r/n99999999").mkdir()
    (root / "objectnet-1.0/images/zebra").mkdir()
    with pytest.raises(UserError, match="'n99999999' is unknown; training does not have it"):
        load_split(settings(root), "r")
    with pytest.raises(UserError, match="'zebra' is unknown; its mapping does not have it"):
        load_split(settings(root), "objectnet")
    (root / "objectnet-1.0/images/zebra").rmdir()
    shutil.rmtree(root / "objectnet-1.0/images/chair")
    with pytest.raises(UserError, match="'chair' is missing; its mapping has it"):
        load_split(settings(root, "task.objectnet_border=true"), "objectnet")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("objectnet_to_imagenet_1k.json", None, "objectnet_to_imagenet_1k.json cannot be read as JSON"),
        ("objectnet_to_imagenet_1k.json", '{"Chair": ', "objectnet_to_imagenet_1k.json cannot be read as JSON"),
        (
            "imagenet_to_label_2012_v2",
            "".join(f"name {i}\n" for i in range(800)),
            "'name 885' of 'Alarm clock' stands 0 times in .*imagenet_to_label_2012_v2",
        ),
        ("folder_to_objectnet_label.json", '{"chair": "Chair"}', "label.json has no entry 'Alarm clock'"),
        ("pytorch_to_imagenet_2012_id.json", '{"0": 355}', "2012_id.json does not number 1,000 classes"),
    ],
)
def test_a_mapping_that_does_not_fit_is_named(tmp_path, file, text, words):
    folder = tmp_path / "mappings"
    save_mappings(folder)
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(UserError, match=words):
        objectnet_classes(folder, 1000)


def test_objectnet_is_for_networks_over_imagenet(tmp_path):
    with pytest.raises(UserError, match=r"onto ImageNet's 1,000 classes, but task.num_classes=620"):
        objectnet_classes(tmp_path, 620)


def annotated(root, answers):
    """The annotations of the test split, whose image number 1 is of the last class."""
    path = root / "answers.json"
    path.write_text(answers if isinstance(answers, str) else json.dumps(answers))
    return load_annotations(replace(settings(root), annotations={"real": path}))["real"]


def test_answers_in_a_list_follow_the_numbers_of_the_files_and_not_their_order(whole):
    answers = [[i, (i + 1) % 1000] if i % 2 else [] for i in range(1000)]
    right = annotated(whole, answers)
    assert right.shape == (1000, 1000)
    assert right[0].nonzero().flatten().tolist() == [0, 999]  # file 1000, of the first class
    assert right[2].nonzero().flatten().tolist() == [997, 998]
    assert not right[999].any(), "image number 1 was left out"
    few = replace(settings(whole, "task.classes=3"), annotations={"real": whole / "answers.json"})
    assert torch.equal(load_annotations(few)["real"], right[:3, :3])


def test_answers_by_file_name_may_leave_images_out(whole):
    name = "ILSVRC2012_val_{:08d}.JPEG"
    right = annotated(whole, {name.format(1000): [5, 8]})
    assert right[0].nonzero().flatten().tolist() == [5, 8]
    assert int(right.any(dim=1).sum()) == 1


def multilabel(source="imagenet2012_multilabel:2.0.0", **more):
    fields = {"correct_multi_labels": [4], "unclear_multi_labels": [6], "wrong_multi_labels": [7]} | more
    return {"source": source, "answers": {"ILSVRC2012_val_00000998.JPEG": fields}}


def test_unclear_labels_count_as_right_and_problematic_images_do_not_count(whole):
    right = annotated(whole, multilabel(is_problematic=False))
    assert right[2].nonzero().flatten().tolist() == [4, 6]
    assert int(right.any(dim=1).sum()) == 1
    assert not annotated(whole, multilabel(is_problematic=True)).any()


def test_labels_that_were_corrected_after_the_paper_are_refused(whole):
    for answers in (multilabel("imagenet2012_multilabel:3.0.0", is_problematic=False), multilabel()["answers"]):
        with pytest.raises(UserError, match=r"not those of imagenet2012_multilabel:2\.0\.0"):
            annotated(whole, answers)
    with pytest.raises(UserError, match=r"whether ILSVRC2012_val_00000998\.JPEG is problematic"):
        annotated(whole, multilabel())
    published_answers = json.loads((INFO / "imagenet_real_labels.json").read_text())
    published_answers[0] = [*published_answers[0], 1]
    with pytest.raises(UserError, match=r"57,554 labels of 46,838 images, and ReaL's real\.json of 2020 has 57,553"):
        annotated(whole, published_answers)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([[1]] * 999, "answers for 999 images, but the split has 1,000"),
        ({"ILSVRC2012_val_00001001.JPEG": [1]}, "ILSVRC2012_val_00001001.JPEG, which is not in the split"),
        ({}, "answers for no image"),
        ([[1000]] * 1000, r"has \[1000\], not a list of ids in \[0, 1000\)"),
        ([["n01440764"]] * 1000, "not a list of ids"),
        ("7", "neither a list nor an object"),
        ("[[1], [2", "cannot be read as JSON"),
    ],
)
def test_answers_of_other_images_or_classes_are_refused(whole, answers, words):
    with pytest.raises(UserError, match=words):
        annotated(whole, answers)


def test_the_published_reassessed_labels_fit_the_files_of_imagenet(whole):
    published_answers = json.loads((INFO / "imagenet_real_labels.json").read_text())
    assert len(published_answers) == 50_000
    right = annotated(whole, published_answers[:1000])
    assert [row.nonzero().flatten().tolist() for row in right[:3]] == [
        sorted(published_answers[number - 1]) for number in (1000, 999, 998)
    ]
