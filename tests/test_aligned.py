"""Classes, tokens and heads of models that do not have them in the same order: brought to the first model's."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import soups
from soups.cli import main
from soups.doctor import examine
from soups.errors import UserError
from soups.files.aligned import tokens
from soups.verify import answer

EMBEDDING = "bert.embeddings.word_embeddings.weight"
BIAS = "final_logits_bias"


@pytest.fixture
def pool(hugging_face, tmp_path, monkeypatch):
    """Two classifiers of texts with two classes, in the current folder."""
    for i in range(2):
        shutil.copytree(hugging_face / f"texts/checkpoint-{i}", tmp_path / f"m{i}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def relabel(folder, names):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {n: i for i, n in enumerate(names)},
    }
    (folder / "config.json").write_text(json.dumps(config))


def reorder(folder):
    """The same model with its classes the other way round."""
    relabel(folder, ["yes", "no"])
    state = weights_of(folder)
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name].flip(0).contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_classes_in_another_order_give_the_soup_of_those_in_the_same_order_and_it_can_be_verified(pool):
    expected = load_file(soups.uniform(["m0", "m1"]).save("expected.safetensors"))
    reorder(pool / "m1")
    soup = soups.uniform(["m0", "m1"])
    found = load_file(soup.save("soup.safetensors"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert soup.weights["classifier.bias"].equal(expected["classifier.bias"])
    assert answer(pool / "soup.safetensors")[0]
    folder = soup.save("soup")
    assert BertForSequenceClassification.from_pretrained(folder).config.id2label == {0: "no", 1: "yes"}
    (pool / "elsewhere").mkdir()
    for i in range(2):
        (pool / f"m{i}").rename(pool / f"elsewhere/m{i}")
    assert answer(folder, pool / "elsewhere")[0]
    whole = (pool / "soup.safetensors").read_bytes()
    main(["make", "soup.safetensors.recipe.yaml", "--folder", "elsewhere", "--force"])
    assert (pool / "soup.safetensors").read_bytes() == whole
    reorder(pool / "elsewhere/m1")
    relabel(pool / "elsewhere/m1", ["yes", "no"])  # rows that are no longer those that were averaged
    assert "was changed" in answer(folder, pool / "elsewhere")[1]


def test_a_soup_with_another_ones_classes_is_the_same_however_paths_are_typed(pool, monkeypatch):
    reorder(pool / "m1")
    expected = soups.uniform(["m0", "m1"]).save("soup.safetensors").read_bytes()
    for typed in (["./m0", pool / "m1"], [pool / "m1/../m0", "m1/"]):
        assert soups.uniform(typed).save("again.safetensors").read_bytes() == expected
    monkeypatch.chdir(pool / "m0")
    assert soups.uniform(["../m0", "../m1"]).save("../again.safetensors").read_bytes() == expected
    assert answer(pool / "soup.safetensors")[0]


def test_greedy_scores_models_in_the_first_ones_order(pool):
    reorder(pool / "m1")
    seen = []
    soups.greedy(["m0", "m1"], lambda w: seen.append(w["classifier.bias"].clone()) or 0.0, "max", quiet=True)
    assert any(torch.equal(bias, weights_of(pool / "m1")["classifier.bias"].flip(0)) for bias in seen)


@pytest.mark.parametrize(
    ("names", "own", "others"),
    [
        (["no", "perhaps"], '["perhaps"]', '["yes"]'),
        (["no", "yes", "perhaps"], '["perhaps"]', "[]"),
        (["yes"], "[]", '["no"]'),
        (["no", "no"], '["no"]', '["yes"]'),
        (["no", "yes", "yes"], '["yes"]', "[]"),
    ],
)
def test_other_classes_are_refused_with_the_difference(names, own, others, pool):
    relabel(pool / "m1", names)
    said = f"have different classes: {own} in the one alone, {others} in the other alone"
    with pytest.raises(UserError, match=re.escape(said)):
        soups.uniform(["m0", "m1"])


def test_classes_without_numbers_are_refused(pool):
    config = json.loads((pool / "m1/config.json").read_text())
    (pool / "m1/config.json").write_text(json.dumps(config | {"id2label": ["no", "yes"]}))
    with pytest.raises(UserError, match=r"m1/config\.json: id2label is not the classes by their numbers"):
        soups.uniform(["m0", "m1"])


def test_the_doctor_compares_models_in_the_same_order_of_classes(pool):
    paths = [Path("m0"), Path("m1")]
    expected = examine(paths)
    reorder(pool / "m1")
    found = examine(paths)
    assert found.findings == expected.findings
    assert found.geometry.distances[1] == expected.geometry.distances[1] > 0


def test_heads_whose_names_are_not_known_are_refused_where_classes_are_in_another_order(pool):
    reorder(pool / "m1")
    for i in range(2):
        state = {name.replace("classifier", "top"): tensor for name, tensor in weights_of(pool / f"m{i}").items()}
        save_file(state, pool / f"m{i}/model.safetensors")
    with pytest.raises(UserError, match="it has no head with a row for each"):
        soups.uniform(["m0", "m1"])
    assert "it has no head with a row for each" in examine([Path("m0"), Path("m1")]).models[1].problem


def give(folder, known, name=EMBEDDING):
    """Give a model these tokens in this order, each with the row that it had, or a random one."""
    path, state = folder / "tokenizer.json", weights_of(folder)
    values, config = json.loads(path.read_text()), json.loads((folder / "config.json").read_text())
    rows = [values["model"]["vocab"].get(token) for token in known]
    values["model"]["vocab"] = {token: i for i, token in enumerate(known)}
    values["added_tokens"] = [each | {"id": known.index(each["content"])} for each in values["added_tokens"]]
    path.write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(known)}))
    new = torch.randn(len(known), state[name].shape[1], generator=torch.Generator().manual_seed(5))
    state[name] = torch.stack([new[i] if row is None else state[name][row] for i, row in enumerate(rows)])
    if BIAS in state:
        state[BIAS] = state[BIAS][:, rows].contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def without_film(folder):
    return [token for token in tokens(folder) if token != "film"]


def turned(folder):
    """The tokens after the special ones in the reverse order."""
    known = list(tokens(folder))
    return [*known[:4], *reversed(known[4:])]


def test_tokens_that_both_have_are_averaged_by_their_names_and_others_are_the_first_models(pool):
    give(pool / "m1", ["zebra", "yak", "quagga", *without_film(pool / "m1")])
    first, other = weights_of(pool / "m0")[EMBEDDING], weights_of(pool / "m1")[EMBEDDING]
    rows, others = tokens(pool / "m0"), tokens(pool / "m1")
    soup = soups.uniform(["m0", "m1"]).save("soup")
    found = weights_of(soup)[EMBEDDING]
    assert found.shape == first.shape
    for token, row in rows.items():
        mean = (first[row].double() + other[others[token]]) / 2 if token in others else first[row].double()
        assert torch.equal(found[row], mean.float()), token
    assert "zebra" not in tokens(soup) and tokens(soup) == rows
    assert answer(soup, pool)[0]
    BertForSequenceClassification.from_pretrained(soup)  # of the size that its config speaks of
    larger = weights_of(soups.uniform(["m1", "m0"]).save("larger"))[EMBEDDING]
    assert torch.equal(larger[others["zebra"]], other[others["zebra"]])
    assert torch.equal(larger[others["good"]], found[rows["good"]])


def test_as_many_tokens_in_other_rows_are_averaged_by_their_names(pool):
    for i in range(2):  # the shape that BART's bias of tokens has
        state = weights_of(pool / f"m{i}")
        state[BIAS] = torch.randn(1, len(state[EMBEDDING]))
        save_file(state, pool / f"m{i}/model.safetensors", {"format": "pt"})
    expected = load_file(soups.uniform(["m0", "m1"]).save("expected.safetensors"))
    give(pool / "m1", turned(pool / "m1"))
    assert tokens(pool / "m0") != tokens(pool / "m1")
    soup = soups.uniform(["m0", "m1"]).save("soup")
    found = weights_of(soup)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert tokens(soup) == tokens(pool / "m0")
    assert answer(soup, pool)[0]


def test_a_tokenizer_written_in_another_form_leaves_rows_where_they_are(pool):
    expected = soups.uniform(["m0", "m1"]).save("expected.safetensors").read_bytes()
    path = pool / "m1/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": None}, indent=7))
    assert soups.uniform(["m0", "m1"]).save("soup.safetensors").read_bytes() == expected


def test_a_token_that_one_of_as_many_lacks_has_the_first_models_row_in_its_place(pool):
    first, other = weights_of(pool / "m0")[EMBEDDING], weights_of(pool / "m1")[EMBEDDING]
    give(pool / "m1", ["zebra", *without_film(pool / "m1")])
    assert len(weights_of(pool / "m1")[EMBEDDING]) == len(first)
    found, rows = weights_of(soups.uniform(["m0", "m1"]).save("soup"))[EMBEDDING], tokens(pool / "m0")
    for token, row in rows.items():
        mean = first[row].double() if token == "film" else (first[row].double() + other[row]) / 2
        assert torch.equal(found[row], mean.float()), token


def test_tokens_in_other_rows_are_refused_where_it_is_not_known_what_to_match(pool):
    for folder in (pool / "m0", pool / "m1"):
        state = weights_of(folder)
        state["my_table"] = state.pop(EMBEDDING)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    soups.uniform(["m0", "m1"])  # the same tokenizer
    give(pool / "m1", turned(pool / "m1"), "my_table")
    with pytest.raises(UserError, match=r"m1.*tokens are not in the rows of .*m0.*'my_table' has as many rows"):
        soups.uniform(["m0", "m1"])


def test_other_tokenizers_that_are_not_read_are_refused_and_equal_ones_are_not(pool):
    for i in range(2):
        (pool / f"m{i}/tokenizer.json").unlink()
        (pool / f"m{i}/tokenizer.model").write_bytes(b"pieces")
    soups.uniform(["m0", "m1"])
    (pool / "m1/added_tokens.json").write_text('{"<|im_start|>": 7}')
    with pytest.raises(UserError, match=r"its tokenizer is not that of .*m0"):
        soups.uniform(["m0", "m1"])
    (pool / "m0/added_tokens.json").write_text('{"<|im_start|>": 7}')
    (pool / "m1/tokenizer.model").write_bytes(b"other pieces")
    with pytest.raises(UserError, match=r"its tokenizer is not that of .*m0.*tokenizer\.json"):
        soups.uniform(["m0", "m1"])


def test_another_vocabulary_without_a_tokenizer_is_refused_and_its_rows_can_be_kept(pool):
    give(pool / "m1", ["zebra", *tokens(pool / "m1")])
    (pool / "m1/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokens are matched where each model has its config\.json and tokenizer"):
        soups.uniform(["m0", "m1"])
    found = weights_of(soups.uniform(["m0", "m1"], exclude="word_embeddings").save("soup"))
    assert torch.equal(found[EMBEDDING], weights_of(pool / "m0")[EMBEDDING])


@pytest.mark.parametrize("inside", [True, False])
def test_a_head_is_kept_from_a_model_of_the_pool_or_another_one(inside, pool, hugging_face):
    shutil.copytree(hugging_face / "texts/checkpoint-2", pool / "other")
    kept = "m1" if inside else "other"
    words = ["uniform", "m0", "m1", "--keep", "^classifier", "--from", kept, "--out", "soup.safetensors"]
    main(words)
    found, mean = load_file("soup.safetensors"), load_file(soups.uniform(["m0", "m1"]).save("mean.safetensors"))
    for name, tensor in found.items():
        expected = weights_of(pool / kept)[name] if name.startswith("classifier") else mean[name]
        assert torch.equal(tensor, expected), name
    assert answer(pool / "soup.safetensors")[0]
    before = (pool / "soup.safetensors").read_bytes()
    main([word.replace("--keep", "--exclude") for word in [*words, "--force"]])
    assert (pool / "soup.safetensors").read_bytes() == before


def test_from_without_keep_and_from_another_model_on_task_vectors_are_refused(pool, hugging_face):
    with pytest.raises(UserError, match="--from FILE needs --keep REGEX"):
        soups.uniform(["m0", "m1"], kept_from="m1")
    start = hugging_face / "texts/checkpoint-2"
    with pytest.raises(UserError, match="of ties it is one of the models or the initialisation"):
        soups.ties(start, ["m0"], exclude="^classifier", kept_from="m1")
    soup = soups.ties(start, ["m0", "m1"], exclude="^classifier", kept_from=start).save("soup.safetensors")
    assert torch.equal(load_file(soup)["classifier.bias"], weights_of(start)["classifier.bias"])
    (pool / "start").symlink_to(start)
    assert answer(soup)[0]


@pytest.mark.parametrize("kind", ["vocab.txt", "vocab.json", "pieces"])
def test_tokens_are_read_from_each_kind_of_tokenizer(kind, tmp_path):
    if kind == "vocab.txt":
        (tmp_path / kind).write_text("a\nb\u2028\n", encoding="utf-8")
    elif kind == "vocab.json":
        (tmp_path / kind).write_text(json.dumps({"a": 0, "b\u2028": 1}))
    else:
        values = {"model": {"vocab": [["a", -1.0], ["b\u2028", -2.0]]}, "added_tokens": [{"id": 2, "content": "c"}]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    if kind != "pieces":
        (tmp_path / "added_tokens.json").write_text(json.dumps({"c": 2}))
    assert tokens(tmp_path) == {"a": 0, "b\u2028": 1, "c": 2}
    assert tokens(tmp_path / "nowhere" / "model.safetensors") == {}
