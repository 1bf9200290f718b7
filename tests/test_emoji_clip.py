"""The embedded CLIP: its weights, its tokens, its pairs, and whether it knows anything."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from embedded import training
from embedded.concepts import GROUPS
from embedded.pairs import Drawing, at_most, colours_of, copies, drawings_of, read_sources, spoken
from models.emoji_clip.model import (
    CONTEXT,
    MEAN,
    PACKAGE,
    STD,
    TEMPLATES,
    WEIGHTS,
    WeightsError,
    build,
    encode,
    imagenet_file,
    load,
    load_imagenet,
    num_ids,
    read_vocabulary,
    rename_in_order,
    text_features,
    tokenize,
)
from soups.files.atomic import replacing
from tasks.emoji.load import class_names, load_split


@pytest.fixture(scope="module")
def clip():
    return load()


# the model


def test_features_are_256_float32_numbers_of_unit_length_and_the_file_is_half_of_it_but_for_the_temperature(clip):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = clip.encode_image(images, normalize=True)
    texts = text_features(clip, ["a red apple", "a dog"])
    assert features.shape == (3, 256) and texts.shape == (2, 256)
    torch.testing.assert_close(torch.cat([features, texts]).norm(dim=1), torch.ones(5))
    assert all(value.dtype == torch.float32 for value in clip.parameters())
    stored, again = load_file(WEIGHTS), training.to_disk(clip)
    assert stored["visual.trunk.conv_stem.weight"].dtype == torch.float16
    assert torch.equal(clip.logit_scale.data, stored["logit_scale"])
    assert WEIGHTS.stat().st_size < 12e6
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)


def test_weights_that_are_missing_cut_short_or_of_another_model_are_one_clear_error_with_the_remedy(tmp_path):
    path, content, state = tmp_path / "some.safetensors", WEIGHTS.read_bytes(), load_file(WEIGHTS)
    with pytest.raises(WeightsError, match=r"some\.safetensors is missing; .*python -m embedded\.pretrain"):
        load(path)
    for share in (0.0, 0.001, 0.5, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(WeightsError, match=r"cannot be read .*`git checkout -- models/emoji_clip`"):
            load(path)
    save_file(state | {"text_projection": state["text_projection"][:, :128].contiguous()}, path)
    with pytest.raises(WeightsError, match=r"1 tensors differ, first text_projection: \(128, 128\), not \(128, 256\)"):
        load(path)
    with pytest.raises(WeightsError, match=r"vocabulary\.json cannot be read"):
        read_vocabulary(tmp_path / "vocabulary.json")


# ImageNet


def test_the_image_tower_takes_every_imagenet_tensor_but_the_head():
    pytest.importorskip(PACKAGE)
    theirs = torch.load(imagenet_file(), map_location="cpu", weights_only=True)
    trunk = build(100).visual.trunk
    load_imagenet(trunk)
    ours = trunk.state_dict()
    assert len(theirs) == 296 and len(ours) == 294
    assert torch.equal(ours["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(ours["blocks.3.2.bn1.running_var"], theirs["_blocks.7._bn0.running_var"])
    assert torch.equal(ours["bn2.bias"], theirs["_bn1.bias"])


def test_tensors_are_named_in_order_and_a_shape_that_differs_is_said():
    theirs = {"_conv.weight": torch.ones(2, 3), "_conv.bias": torch.zeros(2)}
    ours = {"stem.weight": torch.empty(2, 3), "stem.bias": torch.empty(2)}
    assert list(rename_in_order(theirs, ours)) == ["stem.weight", "stem.bias"]
    with pytest.raises(UserError, match=r"_conv\.bias \(2,\) is not stem\.bias \(4,\)"):
        rename_in_order(theirs, {**ours, "stem.bias": torch.empty(4)})
    with pytest.raises(UserError, match="2 tensors cannot be named as 1"):
        rename_in_order(theirs, {"stem.weight": torch.empty(2, 3)})


# the text side


def test_tokens_are_start_words_end_and_padding():
    red, apple = encode("red apple")
    vocabulary = tuple(sorted([red, apple]))
    ids = tokenize(["red apple"], vocabulary)
    place = {old: new for new, old in enumerate(vocabulary, start=1)}
    assert ids.dtype == torch.int64 and ids.shape == (1, CONTEXT)
    assert ids[0].tolist() == [3, place[red], place[apple], 4] + [0] * (CONTEXT - 4)
    assert num_ids(vocabulary) == 5


def test_words_that_pretraining_never_saw_are_dropped_and_long_texts_lose_their_tail():
    vocabulary = tuple(sorted(set(encode("red apple"))))
    assert torch.equal(tokenize(["red zygote apple"], vocabulary), tokenize(["Red  apple"], vocabulary))
    assert tokenize(["", "zygote"], vocabulary)[:, :3].tolist() == [[3, 4, 0]] * 2
    long = tokenize(["apple " * 40], vocabulary)
    assert long.shape == (1, CONTEXT) and long[0, -1] == 4 and long[0, 0] == 3


def test_the_same_text_has_the_same_features_whatever_stands_beside_it(clip):
    alone = text_features(clip, ["a sleepy owl"])
    beside = text_features(clip, ["an emoji of a very large and colourful rainbow", "a sleepy owl"])
    torch.testing.assert_close(alone[0], beside[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(alone, text_features(clip, ["a sleepy owl"]))


# what it is trained on


def test_every_source_is_pinned_and_openly_licensed():
    open_licences = {"MIT", "ISC", "Apache-2.0", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "OFL-1.1", "Unlicense"}
    sources = read_sources()
    assert len(sources) > 50 and len({source.package for source in sources}) == len(sources)
    for source in sources:
        assert source.licence in open_licences, source
        assert len(source.sha256) == 64 and source.version, source
        assert not any(word in source.package for word in ("emoji", "logos", "brands", "simple-icons")), source


def test_a_set_gives_two_drawings_of_a_name_and_one_caption_only_once_per_drawing():
    icons = {"axe": "<a/>", "axe-fill": "<b/>", "axe-outline": "<c/>", "saw": "<d/>", "saw-bold": "<d/>", "12": "<e/>"}
    found = list(drawings_of("set", icons))
    assert sorted(d.caption for d in found) == ["axe", "axe", "saw"]
    assert found == list(drawings_of("set", dict(reversed(icons.items()))))


def test_at_most_keeps_a_limit_per_caption_and_does_not_depend_on_order():
    drawings = [Drawing("set", f"axe-{i}", "axe", "", "white", "") for i in range(9)]
    drawings.append(Drawing("set", "saw", "saw", "", "white", ""))
    kept = at_most(drawings, 4)
    assert sorted(d.caption for d in kept) == ["axe"] * 4 + ["saw"]
    assert kept == at_most(drawings[::-1], 4)


def test_ink_is_for_one_colour_icons_and_can_be_seen_on_its_paper():
    colours = [colours_of("set", str(i), 'fill="currentColor"') for i in range(400)]
    assert {ink for ink, paper in colours if paper == "slate"}.isdisjoint({"black", "brown", "purple"})
    assert all(ink != "white" for ink, paper in colours if paper != "slate")
    assert {colours_of("set", str(i), 'fill="#f00"')[0] for i in range(50)} == {""}


def test_a_copy_is_found_in_other_colours_and_another_drawing_is_not():
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    one, two, three = blocks.repeat(8, axis=1).repeat(8, axis=2)
    inverted = 255 - one
    assert copies([one, inverted, two], np.stack([one, three]), chunk=2).tolist() == [True, True, False]


def test_no_caption_of_an_emoji_among_the_pairs_can_be_a_class():
    assert set(GROUPS).isdisjoint({0, 1, 2, 8, 9})  # the groups that other_emoji() takes
    assert "grinning face" not in {spoken(name) for name in class_names()}


# pretraining


def test_the_loss_is_clips_when_captions_differ_and_spreads_over_equal_ones():
    x = F.normalize(torch.tensor([[1.0, 0.2], [0.1, 1.0]]), dim=1)
    y = F.normalize(torch.tensor([[1.0, 0.0], [0.4, 1.0]]), dim=1)
    scale, labels, alike = torch.tensor(1.0), torch.arange(2), torch.ones(2, 2, dtype=torch.bool)
    logits = scale.exp() * x @ y.T
    by_hand = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(training.contrastive_loss(x, y, torch.eye(2, dtype=torch.bool), scale), by_hand)
    both = -(logits.log_softmax(1).mean() + logits.T.log_softmax(1).mean()) / 2
    torch.testing.assert_close(training.contrastive_loss(x, y, alike, scale), both)


def test_a_step_shows_rows_that_depend_on_seed_and_step_alone_and_rare_captions_more():
    counts = np.array([100.0] * 100 + [1.0] * 100)
    rows = training.rows_of_step(3, counts, 20, seed=1)
    assert len(set(rows.tolist())) == 20
    assert rows.tolist() == training.rows_of_step(3, counts, 20, seed=1).tolist()
    assert rows.tolist() != training.rows_of_step(4, counts, 20, seed=1).tolist()
    drawn = np.concatenate([training.rows_of_step(step, counts, 20, seed=0) for step in range(50)])
    assert (drawn >= 100).mean() > 0.8  # ten to one by weight


def test_augmenting_keeps_shape_and_range_and_follows_its_generator():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, again, other = (training.augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == images.shape and torch.equal(one, again) and not torch.equal(one, other)
    low, high = -MEAN[0] / STD[0], (1 - MEAN[0]) / STD[0]
    assert one.min() >= low and one.max() <= high


class FewPairs:
    """Eight plain squares with names."""

    images = np.repeat(np.arange(0, 256, 32, dtype=np.uint8), 64 * 64 * 3).reshape(8, 64, 64, 3)
    captions = ("axe", "saw", "axe", "owl", "cat", "dog", "sun", "car")
    inks = ("red", "") * 4
    num_copies = 0
    digest = "few"


def test_pretraining_stopped_and_continued_ends_where_it_would_have_ended(tmp_path, monkeypatch, one_thread):
    pytest.importorskip(PACKAGE)
    settings = training.Settings(steps=2, batch=4, warmup=1, min_count=1)
    whole, curve = training.train(FewPairs(), settings, tmp_path / "none.pt", state_every=99, quiet=True)

    class StoppedError(Exception):
        pass

    @contextmanager
    def save_and_stop(path):
        with replacing(path) as temporary:
            yield temporary
        raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(training, "replacing", save_and_stop)
        training.train(FewPairs(), settings, tmp_path / "state.pt", state_every=1, quiet=True)
    resumed, again = training.train(FewPairs(), settings, tmp_path / "state.pt", state_every=99, quiet=True)
    assert [row[1] for row in again] == pytest.approx([row[1] for row in curve])
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], msg=name)

    made = Path(training.export(whole, curve, FewPairs(), settings, tmp_path / "out")).parent.iterdir()
    assert sorted(path.name for path in made) == ["pretrain.csv", "vocabulary.json", "weights.safetensors"]


# what it knows


@pytest.mark.slow
def test_zero_shot_is_far_above_chance_and_above_shuffled_names(clip, one_thread):
    test, names = load_split("test"), class_names()
    texts = [template.format(name) for name in names for template in TEMPLATES]
    heads = F.normalize(text_features(clip, texts).view(len(names), len(TEMPLATES), -1).mean(1), dim=1)
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:300]
    images = (test.images[rows].float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        features = clip.encode_image(images.contiguous(memory_format=torch.channels_last), normalize=True)
    predicted, labels = (features @ heads.T).argmax(1), test.labels[rows]
    others = torch.randperm(len(names), generator=torch.Generator().manual_seed(1))
    right, shuffled = ((each == labels).double().mean().item() for each in (predicted, others[predicted]))
    assert right > 5 / len(names) and right > 5 * shuffled
