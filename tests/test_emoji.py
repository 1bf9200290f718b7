"""The emoji benchmark: what is committed, how it is read, and the parts that made it."""

import hashlib
import json
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from configs.errors import UserError
from embedded import build
from embedded.concepts import match, plain, vocabulary
from embedded.duplicates import confusable, distinct, near
from embedded.icons import PACKAGES, FetchError, IconSet, check_tools, fetch, iconify_svg, over, read_iconify
from embedded.keyed import draw
from soups.errors import one_line_errors
from tasks.emoji.load import (
    DATA,
    DRAWINGS,
    FILES,
    FOLDS,
    SHIFTS,
    SPLITS,
    DataError,
    class_names,
    decoded,
    load_split,
    read_manifest,
    read_split,
    read_table,
)

LICENCES = {"Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0"}
LEARNED = ("train", "held_out", "test")


@pytest.fixture(scope="module")
def rows():
    """Split -> its rows without pictures."""
    columns = ["label", "name", "hexcode", "source", "icon", "licence"]
    return {name: read_split(name)[0].select(columns).to_pylist() for name in SPLITS}


@pytest.fixture(scope="module")
def splits():
    return {name: load_split(name) for name in SPLITS}


def icons(rows):
    return {(row["source"], row["icon"]) for row in rows}


def square(value):
    return np.full((64, 64, 3), value, np.uint8)


# what is committed


def test_every_file_has_the_size_and_digest_of_the_manifest(splits):
    for name, entry in read_manifest()["files"].items():
        table, digest = read_table(name)
        assert (table.num_rows, digest) == (entry["count"], entry["sha256"])
    for split in splits.values():
        assert split.images.shape == (len(split), 3, 64, 64) and split.images.dtype == torch.uint8
        assert split.labels.shape == (len(split),) and split.labels.dtype == torch.int64
    assert set(read_manifest()["files"]) == set(FILES)


@pytest.fixture(scope="module")
def folds():
    """Fold -> split -> its rows without pictures."""
    columns = ["label", "source", "icon", "place"]
    return [
        {name: read_split(name, DATA, fold)[0].select(columns).to_pylist() for name in LEARNED} for fold in range(FOLDS)
    ]


def test_a_fold_gives_each_class_at_most_one_test_and_one_held_out_drawing_and_the_rest_to_train(folds):
    sizes = Counter(read_table(DRAWINGS)[0]["label"].to_pylist())
    for fold, splits in enumerate(folds):
        for name, number in (("test", fold), ("held_out", fold + 1)):
            assert max(Counter(row["label"] for row in splits[name]).values()) == 1
            assert all(row["place"] == number % sizes[row["label"]] for row in splits[name])
        trained = Counter(row["label"] for row in splits["train"])
        assert trained == {label: n - 2 for label, n in sizes.items()}


def test_over_the_folds_every_drawing_is_test_or_too_near_another(folds):
    tested = {(row["source"], row["icon"]) for splits in folds for row in splits["test"]}
    table = read_table(DRAWINGS)[0].select(["source", "icon", "near"]).to_pylist()
    assert len(tested) > 2970 and all((row["source"], row["icon"]) in tested or row["near"] for row in table)


@pytest.mark.slow
def test_no_test_or_held_out_drawing_nearly_repeats_one_of_another_split_in_any_fold(folds):
    pictures = read_table(DRAWINGS)[0]
    pairs = list(near(decoded(pictures), decoded(pictures)))
    listed = {(i, j) for i, others in enumerate(pictures["near"].to_pylist()) for j in others}
    assert listed == {(i, j) for i, j, _ in pairs if i != j} and len(listed) == 42
    icon = [(row["source"], row["icon"]) for row in pictures.select(["source", "icon"]).to_pylist()]
    for fold in range(FOLDS):
        split_of = {pair: name for name in LEARNED for pair in icons(folds[fold][name])}
        found = [{split_of.get(icon[i], ""), split_of.get(icon[j], "")} for i, j in listed]
        assert all(len(splits - {""}) <= 1 for splits in found) and any("" in splits for splits in found)


def test_the_same_split_of_another_fold_has_another_digest_and_a_shift_has_not():
    digests = [{name: read_split(name, DATA, fold)[1] for name in SPLITS} for fold in (0, 1)]
    assert {name for name in SPLITS if digests[0][name] == digests[1][name]} == set(SHIFTS)
    assert len(set(digests[0].values())) == len(SPLITS)


def test_images_of_some_classes_are_those_among_all(splits):
    whole, part = splits["held_out"], load_split("held_out", DATA, range(3, 40))
    among = (whole.labels >= 3) & (whole.labels < 40)
    assert torch.equal(part.images, whole.images[among]) and torch.equal(part.labels, whole.labels[among])
    assert part.digest == whole.digest and 0 < len(part) < len(whole)


CONCEPTS = {"1F34E": "red apple", "1F436": "dog face", "1F680": "rocket"}
CONCEPTS |= {"1F511": "key", "1F5FF": "moai", "1F435": "monkey face"}


@pytest.mark.parametrize("hexcode", CONCEPTS)
def test_a_label_means_the_same_concept_in_every_split(rows, hexcode):
    concept = (class_names().index(CONCEPTS[hexcode]), CONCEPTS[hexcode], hexcode)
    for split in SPLITS:
        found = [(row["label"], row["name"], row["hexcode"]) for row in rows[split]]
        alike = {each for each in found if each[0] == concept[0] or each[2] == hexcode}
        assert alike == {concept} or (not alike and split not in ("train", "v2", "r", "sketch"))


@pytest.mark.parametrize(
    ("name", "channel"), [("red apple", 0), ("green apple", 1), ("frog", 1), ("blue book", 2), ("evergreen tree", 1)]
)
@pytest.mark.parametrize("split", ["train", "test", "v2", "r", "a"])
def test_pictures_have_the_colour_that_their_class_is_named_for(splits, name, channel, split):
    chosen = splits[split].images[splits[split].labels == class_names().index(name)]
    if split != "a":  # the filter may have left none
        assert len(chosen)
    for image in chosen.double():
        ink = image[:, (image < 240).any(dim=0)].mean(dim=1)
        assert ink.argmax() == channel


def test_no_drawing_is_in_two_splits(rows):
    seen = defaultdict(set)
    for split in SPLITS:
        for icon in icons(rows[split]):
            seen[icon].add(split)
    assert {icon: found for icon, found in seen.items() if len(found) > 1} == {}


def test_the_five_designs_make_no_shift_and_a_shift_makes_no_training_data(rows):
    learned, shifted = ({source for s in names for source, _ in icons(rows[s])} for names in (LEARNED, SHIFTS))
    assert learned & shifted == set() and len(learned) == 5


def test_every_picture_names_a_pinned_source_and_a_known_licence(rows):
    versions = {f"{key}@{package.version}" for key, package in PACKAGES.items()}
    versions |= {f"openmoji-{style}@{PACKAGES['openmoji'].version}" for style in ("color", "black")}
    for split in SPLITS:
        assert {row["source"] for row in rows[split]} <= versions
        assert {row["licence"] for row in rows[split]} <= LICENCES
        assert all(row["icon"] for row in rows[split])


def test_no_drawing_of_a_class_nearly_repeats_another():
    table = read_table(DRAWINGS)[0]
    labels = table["label"].to_pylist()
    assert all(labels[i] != labels[j] for i, others in enumerate(table["near"].to_pylist()) for j in others)


def test_the_committed_report_counts_what_its_file_lists():
    lines = (DATA / "near_duplicates.csv").read_text().splitlines()[1:]
    assert Counter(line.split(",")[3] for line in lines) == read_manifest()["near_duplicates"]


# damage


def damaged(folder, manifest=lambda known: None, picture=lambda content: content):
    """Change the manifest and the pictures of one split in a folder that has copies of both."""
    known = json.loads((DATA / "manifest.json").read_text())
    manifest(known)
    (folder / "manifest.json").write_text(json.dumps(known))
    (folder / "v2.parquet").write_bytes(picture((DATA / "v2.parquet").read_bytes()))


NOT_PARQUET = {"sha256": hashlib.sha256(b"not parquet").hexdigest()}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"picture": lambda content: content[: len(content) // 2]}, r"v2\.parquet: sha256 is"),
        ({"picture": lambda content: content[:999] + b"?" + content[1000:]}, r"v2\.parquet: sha256 is"),
        (
            {"picture": lambda _: b"not parquet", "manifest": lambda known: known["files"]["v2"].update(NOT_PARQUET)},
            r"v2\.parquet: cannot be read as parquet",  # although its digest agrees
        ),
        ({"manifest": lambda known: known["files"]["v2"].update(count=1)}, r"has \d+ rows, the manifest says 1"),
        ({"manifest": lambda known: known["classes"].insert(0, known["classes"].pop())}, "row 0 has label"),
    ],
)
def test_damaged_pictures_and_a_manifest_that_does_not_fit_them_are_noticed(tmp_path, damage, words):
    damaged(tmp_path, **damage)
    with pytest.raises(DataError, match=words):
        load_split("v2", tmp_path)


def test_missing_and_unknown_files_are_named_with_the_remedy(tmp_path):
    damaged(tmp_path)
    assert load_split("v2", tmp_path).digest == load_split("v2").digest
    (tmp_path / "v2.parquet").unlink()
    with pytest.raises(DataError, match=r"v2\.parquet.*git checkout -- tasks/emoji/data"):
        load_split("v2", tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read as JSON"):
        load_split("v2", tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json: No such file"):
        class_names(tmp_path)
    with pytest.raises(DataError, match="'val' is not one of train, held_out"):
        load_split("val")


# icons

RED_LEFT = '<path fill="#f00" d="M0 0h2v4h-2z"/>'  # the left half of a 4 x 4 box


def test_an_alias_without_end_is_refused():
    collection = {"icons": {}, "aliases": {"a": {"parent": "b"}, "b": {"parent": "a"}}}
    with pytest.raises(ValueError, match="its own ancestor"):
        iconify_svg(collection, "a")
    with pytest.raises(KeyError):
        iconify_svg(collection, "nothing")


def test_hidden_icons_are_not_read(tmp_path):
    drawn = {"a": {"body": RED_LEFT}, "b": {"body": RED_LEFT, "hidden": True}}
    data = {"prefix": "toy", "width": 4, "height": 4, "aliases": {}, "icons": drawn}
    (tmp_path / "icons.json").write_text(json.dumps(data))
    (tmp_path / "info.json").write_text('{"license": {"spdx": "MIT"}}')
    (tmp_path / "chars.json").write_text('{"1f34e": "a"}')
    icon_set = read_iconify(tmp_path)
    assert list(icon_set.icons) == ["a"] and icon_set.chars == {"1F34E": "a"} and icon_set.licence == "MIT"


def test_half_transparent_black_over_white_is_middle_grey():
    rgba = np.array([[[0, 0, 0, 0], [0, 0, 0, 128], [0, 0, 0, 255]]], np.uint8)
    assert over(rgba, np.array([255, 255, 255], np.uint8))[0, :, 0].tolist() == [255, 127, 0]


def test_a_tarball_that_is_not_the_pinned_one_is_refused(tmp_path):
    (tmp_path / "toy-1.0.0.tgz").write_bytes(b"something else")
    with pytest.raises(FetchError, match=r"toy-1\.0\.0\.tgz: sha256 is .* expected 00ff"):
        fetch("toy", "1.0.0", tmp_path, "00ff")


def test_a_build_without_npm_or_a_package_ends_in_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"^no_such_module cannot be imported: type pip install -r requirements-build"):
        check_tools("json", "no_such_module")
    monkeypatch.setattr(build, "check_tools", lambda *modules: None)
    monkeypatch.setattr("sys.argv", ["build", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        one_line_errors(build.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "npm is not installed: install Node.js" in line
    assert not (tmp_path / "out").exists()


# matching, chance, duplicates


def test_a_more_trusted_layer_settles_a_name_and_an_ambiguous_name_is_nobodys():
    first, second = [("cat", "1F408")], [("cat", "1F431"), ("mouse", "1F401"), ("mouse", "1F42D"), ("fox", "1F98A")]
    assert vocabulary([first, second]) == {"cat": "1F408", "fox": "1F98A"}


def test_numbered_names_match_only_where_numbers_mean_variants():
    words = {"boar": "1F417", "keycap-2": "32-20E3"}
    icon_set = IconSet("toy", "MIT", {"boar-1": "<svg>1</svg>", "boar-2": "<svg>2</svg>", "boar": "<svg>0</svg>"})
    found = match({"streamline-emojis": icon_set, "emojione": icon_set}, words)
    assert found == {"streamline-emojis": {"1F417": ("boar-1", "boar-2", "boar")}, "emojione": {"1F417": ("boar",)}}


def test_presentation_selectors_do_not_make_another_concept():
    assert plain("2744-FE0F") == plain("2744") == "2744"


def test_chance_depends_on_the_key_alone_and_is_spread_evenly():
    drawn = [draw("test", i) for i in range(2000)]
    assert drawn == [draw("test", i) for i in range(2000)] and len(set(drawn)) == 2000
    assert all(0 <= u < 1 for u in drawn) and abs(np.mean(drawn) - 0.5) < 0.03


def test_near_means_closer_than_the_threshold_in_mean_grey_levels():
    first, second = np.stack([square(100)]), np.stack([square(104), square(105), square(96)])
    assert list(near(first, second, threshold=5.0)) == [(0, 0, 4.0), (0, 2, 4.0)]


def test_of_near_pictures_the_first_stays():
    assert distinct([square(100), square(103), square(120), square(99)], threshold=5.0) == [0, 2]


def test_a_concept_is_confusable_if_two_designs_draw_it_like_an_earlier_one_or_its_mirror_image():
    half = square(255)
    half[:, :32] = 0
    other = square(9)
    mirrored = {"waxing": half, "waning": half[:, ::-1], "sun": other}
    assert confusable([mirrored, mirrored]) == ["waning"]
    assert confusable([mirrored, {"waxing": half, "waning": other}]) == []


@pytest.mark.network
def test_the_packages_give_the_committed_bytes(tmp_path):
    pytest.importorskip("resvg_py")
    pytest.importorskip("skimage")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    try:
        build.build(tmp_path)
    except FetchError as error:
        pytest.skip(str(error))
    if json.loads((tmp_path / "manifest.json").read_text())["built_with"] != read_manifest()["built_with"]:
        pytest.skip("other versions of the encoders are installed")
    assert build.differences(tmp_path, DATA) == []
