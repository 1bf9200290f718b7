"""Scores by commands, images, texts and language models, beside the slow obvious way."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    LlamaForCausalLM,
)

import soups
from soups.averaging import Averaging
from soups.batch_norm import recompute_batch_norm
from soups.candidates import Candidate
from soups.cli import main
from soups.errors import UserError
from soups.made_up import CLASSES, moved
from soups.scorers.images import class_folders, files_of, labels_of
from soups.scorers.outside import number_in, of_command
from soups.scores import reduced
from soups.sources import pool_of
from soups.verify import answer
from tests.readers import bert_folder


def alone(held_out, paths):
    """The score of each model by itself."""
    pool = pool_of(paths)
    scorer, how = held_out.scorer(pool), Averaging()
    return [scorer.measure(Candidate(pool, {i: 1}, how)).value for i in range(len(pool))]


def pictures(folder):
    return [
        (Image.open(path).convert("RGB"), CLASSES.index(path.parent.name))
        for path in sorted((folder / "held_out").rglob("*.png"))
    ]


@torch.no_grad()
def share_right(made_up, answer):
    found = [int(answer(image).argmax()) == label for image, label in pictures(made_up)]
    return sum(found) / len(found)


def test_a_timm_pool_is_scored_as_timm_does(made_up):
    paths, theirs = sorted((made_up / "timm").glob("run*")), []
    for path in paths:
        network = timm.create_model("test_vit", num_classes=3).eval()
        network.load_state_dict(load_file(path))
        see = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
        theirs.append(share_right(made_up, lambda image, n=network, s=see: n(s(image)[None])))
    assert alone(soups.images(made_up / "held_out", "timm:test_vit"), paths) == theirs
    assert alone(soups.images(made_up / "held_out", "timm:test_vit", workers=2, batch_size=5), paths) == theirs


def test_image_models_of_transformers_are_scored_as_transformers_does_and_by_names_of_classes(made_up, tmp_path):
    paths, theirs = sorted((made_up / "images").iterdir()), []
    for path in paths:
        network = AutoModelForImageClassification.from_pretrained(path).eval()
        reader = AutoImageProcessor.from_pretrained(path)
        theirs.append(share_right(made_up, lambda each, n=network, r=reader: n(**r(each, return_tensors="pt")).logits))
    assert alone(soups.images(made_up / "held_out", "transformers"), paths) == theirs
    shutil.copytree(paths[0], tmp_path / "other")
    order, weights = [2, 0, 1], load_file(paths[0] / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][order].contiguous()
    save_file(weights, tmp_path / "other/model.safetensors", {"format": "pt"})
    config = json.loads((paths[0] / "config.json").read_text())
    config["id2label"] = {str(i): CLASSES[j] for i, j in enumerate(order)}
    config["label2id"] = {CLASSES[j]: i for i, j in enumerate(order)}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert alone(soups.images(made_up / "held_out", "transformers"), [tmp_path / "other"]) == theirs[:1]


def test_an_open_clip_pool_and_a_function_are_scored(made_up):
    clip = soups.images(made_up / "held_out", "open_clip", templates="name")
    assert all(0 <= score <= 1 for score in alone(clip, sorted((made_up / "open_clip").iterdir())))
    plain = soups.images(made_up / "held_out", "function:torchvision.models:squeezenet1_1", image_size=64)
    assert all(0 <= score <= 1 for score in alone(plain, sorted((made_up / "plain").iterdir())))


def test_text_models_are_scored_as_transformers_does_from_every_kind_of_table(made_up, tmp_path):
    paths = sorted((made_up / "texts").iterdir())
    lines = [line.split("\t") for line in (made_up / "held_out.tsv").read_text().splitlines()[1:]]
    theirs = []
    for path in paths:
        network = AutoModelForSequenceClassification.from_pretrained(path).eval()
        words = AutoTokenizer.from_pretrained(path)
        with torch.no_grad():
            found = [int(network(**words(text, return_tensors="pt")).logits.argmax()) for text, _ in lines]
        theirs.append(sum(network.config.id2label[i] == label for i, (_, label) in zip(found, lines, strict=True)) / 8)
    (tmp_path / "t.csv").write_text("text,label\n" + "\n".join(f'"{text}",{label}' for text, label in lines) + "\n")
    rows = [json.dumps({"text": text, "label": label}) for text, label in lines]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    for file in (made_up / "held_out.tsv", tmp_path / "t.csv", tmp_path / "t.jsonl"):
        assert alone(soups.texts(file), paths) == theirs


@torch.no_grad()
def test_perplexity_of_a_causal_model_is_exp_of_its_loss_over_windows(made_up):
    llama = made_up / "language/checkpoint-0"
    network = LlamaForCausalLM.from_pretrained(llama).eval()
    tokens = AutoTokenizer.from_pretrained(llama)((made_up / "held_out.txt").read_text())["input_ids"]
    total = count = 0
    for start in range(0, len(tokens), 8):
        window = torch.tensor([tokens[start : start + 8]])
        if window.shape[1] > 1:
            total += network(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    held_out = soups.perplexity(made_up / "held_out.txt", max_length=8, batch_size=2)
    assert alone(held_out, [llama]) == pytest.approx([np.exp(total / count)], rel=1e-4)


@torch.no_grad()
def test_perplexity_of_a_masked_model_masks_each_token_once(tmp_path):
    bert = bert_folder(tmp_path / "bert")
    network, words = BertForMaskedLM.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "the film is good"}))
    tokens, total = words("the film is good", return_tensors="pt")["input_ids"], 0.0
    for place in range(4):
        masked = tokens.clone()
        masked[0, place] = words.mask_token_id
        total += network(input_ids=masked).logits[0, place].log_softmax(-1)[tokens[0, place]].item()
    held_out = soups.perplexity(tmp_path / "one.jsonl")
    assert alone(held_out, [bert]) == pytest.approx([np.exp(-total / 4)], rel=1e-4)
    with pytest.raises(UserError, match="learned takes causal language models"):
        soups.learned([bert, bert_folder(tmp_path / "other", seed=1)], held_out, allow_unrelated=True)


@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True])
def test_multiple_choice_takes_the_most_likely_text_behind_the_prompt(made_up, tmp_path, per_token):
    llama = made_up / "language/checkpoint-0"
    network, words = LlamaForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    questions = [{"prompt": "a good", "choices": ["film", "day of"], "answer": 0}] * 2
    questions += [{"question": "not", "choices": ["good", "bad", "day"], "answer": "bad"}]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))

    def likelihood(prompt, choice):
        tokens, before = words(f"{prompt} {choice}", return_tensors="pt")["input_ids"], len(words(prompt)["input_ids"])
        seen = network(input_ids=tokens).logits[0].log_softmax(-1)
        found = [seen[i - 1, tokens[0, i]].item() for i in range(before, tokens.shape[1])]
        return sum(found) / (len(found) if per_token else 1)

    first = max(["film", "day of"], key=lambda choice: likelihood("a good", choice)) == "film"
    second = max(["good", "bad", "day"], key=lambda choice: likelihood("not", choice)) == "bad"
    held_out = soups.choices(tmp_path / "questions.jsonl", per_token=per_token)
    assert alone(held_out, [llama]) == [(2 * first + second) / 3]
    assert all(0 <= score <= 1 for score in alone(held_out, [bert_folder(tmp_path / "bert")]))


def test_a_soup_is_learned_on_images_texts_and_a_causal_language_model(made_up):
    for models, held_out, how in (
        ("timm/run*", soups.images(made_up / "held_out", "timm:test_vit"), {"per": "layer"}),
        ("texts/*", soups.texts(made_up / "held_out.tsv"), {}),
        ("language/*", soups.perplexity(made_up / "held_out.txt", batch_size=4, max_length=12), {"lr": 0.5}),
    ):
        soup = soups.learned(sorted(made_up.glob(models)), held_out, epochs=2, **how)
        assert soup.record["last_loss"] < soup.record["first_loss"]
        assert len(soup.shares) == 3 and sum(soup.shares.values()) == pytest.approx(1)


# Labels, and what is wrong with examples.


def folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.png")
    return root


def test_class_folders_that_are_numbers_are_ordered_as_numbers_and_hidden_ones_are_none(tmp_path):
    folders(tmp_path / "a", *map(str, range(12)), ".thumbnails", "__MACOSX")
    assert class_folders(tmp_path / "a") == [str(i) for i in range(12)]
    (tmp_path / "a/3/._0.png").write_bytes(b"x")
    assert len(files_of(tmp_path / "a", ["3"])) == 1
    with pytest.raises(UserError, match="the same number, such as 1 and 01"):
        class_folders(folders(tmp_path / "b", "1", "01"))


def test_wordnet_ids_get_imagenets_names_and_numbers_or_are_refused(tmp_path):
    found = labels_of(folders(tmp_path / "a", "n02123045", "n01440764"), None)
    assert found == (["tench", "tabby"], {"n01440764": 0, "n02123045": 1})
    names, ids = labels_of(tmp_path / "a", 1000)
    assert ids == {"n01440764": 0, "n02123045": 281}
    assert names[281] == "tabby"
    with pytest.raises(UserError, match="n00000001 is a WordNet id that ImageNet's 1,000 classes do not have"):
        labels_of(folders(tmp_path / "b", "n00000001", "n01440764"), None)


def test_a_damaged_picture_is_one_line_with_its_file_before_any_network_runs(made_up, tmp_path, monkeypatch):
    shutil.copytree(made_up / "held_out", tmp_path / "held_out")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "held_out/green/2.png")
    with pytest.raises(UserError, match=r"green/2\.png is damaged or no image \(its pixels have more than 8 bits"):
        alone(soups.images(tmp_path / "held_out", "timm:test_vit", workers=2), sorted((made_up / "timm").glob("run*")))
    (tmp_path / "held_out/green/2.png").write_bytes(b"no picture")
    monkeypatch.setattr("soups.scorers.networks.ImageNetwork.load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"green/2\.png is damaged or no image") as caught:
        alone(soups.images(tmp_path / "held_out", "timm:test_vit", workers=2), sorted((made_up / "timm").glob("run*")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("timm", "--network timm:NAME is needed"),
        ("timm:nothing", "timm:nothing"),
        ("timm:test_resnet", "is not of this network: .* is in the file alone"),
        ("keras:x", "write timm:NAME, open_clip:NAME"),
        ("function:torchvision.models", "write function:module:name"),
        ("function:torchvision.models:nothing", "has no attribute 'nothing'"),
    ],
)
def test_a_network_that_does_not_fit_is_one_line(made_up, network, words):
    with pytest.raises(UserError, match=words) as caught:
        alone(soups.images(made_up / "held_out", network), [made_up / "timm/run0.safetensors"])
    assert "\n" not in str(caught.value)


def test_another_number_of_classes_is_refused_by_shape(made_up, tmp_path):
    shutil.copytree(made_up / "held_out", tmp_path / "held_out")
    folders(tmp_path / "held_out", "white")
    with pytest.raises(UserError, match=r"'head\.weight' is \(3, 64\), the network has \(4, 64\)"):
        alone(soups.images(tmp_path / "held_out", "timm:test_vit"), [made_up / "timm/run0.safetensors"])


@pytest.mark.parametrize(
    ("output", "words"),
    [("", "it printed nothing"), ("0.5\nacc 0.81\n", "its last line is 'acc 0.81', not a number"), ("nan\n", "is NaN")],
)
def test_the_last_line_of_a_command_is_a_number(output, words):
    assert number_in("epoch 1\n 0.25 \n\n", "x") == 0.25
    with pytest.raises(UserError, match=words):
        number_in(output, "x")


@pytest.fixture
def files(tmp_path):
    for i, value in enumerate((1.0, 2.0)):
        torch.save({"ema": {"module.w": torch.tensor([value])}, "epoch": i}, tmp_path / f"a b{i}.pt")
    (tmp_path / "see.py").write_text("import sys, torch\nprint(torch.load(sys.argv[1])['ema']['module.w'].item())\n")
    return pool_of(sorted(tmp_path.glob("*.pt")))


def test_a_command_gets_the_file_itself_or_a_mixture_in_the_form_of_the_files(files, tmp_path):
    scorer = of_command(f"echo {{soup}} > {tmp_path}/seen && echo 0.5", "max")
    single = Candidate(files, {0: 1}, Averaging())
    assert scorer.measure(single).value == 0.5
    seen = Path((tmp_path / "seen").read_text().strip())
    assert seen.resolve() == files.paths[0].resolve() and seen.name == files.paths[0].name
    single.forget()
    assert files.paths[0].is_file()
    mixed = Candidate(files, reduced((0, 1)), Averaging())
    assert torch.load(mixed.file()) == {"ema": {"module.w": torch.tensor([1.5])}}
    mixed.forget()
    assert [path.name for path in files.workplace.iterdir()] == []


def test_a_command_that_fails_is_one_line_with_what_it_said_last(files):
    scorer = of_command("echo 'no module' >&2; exit 3; {soup}", "max")
    with pytest.raises(UserError, match=r"a b0\.pt: the command ended with status 3: no module"):
        scorer.measure(Candidate(files, {0: 1}, Averaging()))


def test_the_key_of_a_command_knows_the_files_that_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("eval.py").write_text("print(1)")
    before = of_command("python eval.py {soup}", "max").key
    assert of_command("python eval.py {soup}", "max").key == before
    assert of_command("python eval.py --fast {soup}", "max").key != before
    Path("eval.py").write_text("print(2)")
    assert of_command("python eval.py {soup}", "max").key != before


def test_the_key_of_texts_knows_how_long_they_may_be_and_that_of_images_every_picture(made_up, tmp_path):
    pool = pool_of(sorted((made_up / "texts").iterdir()))
    keys = {soups.texts(made_up / "held_out.tsv", max_length=n).scorer(pool).key for n in (8, 16, 16)}
    assert len(keys) == 2
    shutil.copytree(made_up / "held_out", tmp_path / "held_out")
    vits = pool_of(sorted((made_up / "timm").glob("run*")))

    def key():
        return soups.images(tmp_path / "held_out", "timm:test_vit").scorer(vits).key

    before = key()
    assert key() == before
    Image.new("RGB", (40, 40)).save(tmp_path / "held_out/red/0.png")
    assert key() != before


def test_statistics_of_batch_norms_are_measured_anew_for_every_mixture_and_saved(made_up, tmp_path):
    torch.manual_seed(0)
    start = timm.create_model("test_resnet", num_classes=3).state_dict()
    for i in range(2):
        save_file(moved(start, i), tmp_path / f"{i}.safetensors")
    held_out, paths = soups.images(made_up / "held_out", "timm:test_resnet"), sorted(tmp_path.glob("*.safetensors"))
    soup = soups.greedy(paths, held_out, batch_norm="recompute", scores={path.name: 0.0 for path in paths}, quiet=True)
    assert len(soup.shares) == 2  # the mixture is no worse than 0
    network = timm.create_model("test_resnet", num_classes=3)
    plain = soups.uniform(paths).weights
    network.load_state_dict(dict(plain))
    see = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    recompute_batch_norm(network, [torch.stack([see(image) for image, _ in pictures(made_up)])])
    saved = load_file(soup.save(tmp_path / "soup/s.safetensors"))
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-6)
    assert not torch.equal(saved["stem.bn.running_mean"] if "stem.bn.running_mean" in saved else
                           saved["bn1.running_mean"], plain["bn1.running_mean"])  # fmt: skip
    network.eval()
    assert soup.score == share_right(made_up, lambda image: network(see(image)[None]))
    with pytest.raises(UserError, match="has no batch norm"):
        vits = sorted((made_up / "timm").glob("run*"))
        soups.greedy(vits, soups.images(made_up / "held_out", "timm:test_vit"), batch_norm="recompute", quiet=True)
    with pytest.raises(UserError, match="batch_norm=recompute measures the statistics on images: type --images DIR"):
        soups.greedy(vits, lambda weights: 0.0, "max", batch_norm="recompute", quiet=True)


@pytest.mark.slow
def test_statistics_are_measured_anew_by_recipes_that_score_nothing_and_verify_says_what_it_cannot_prove(
    made_up, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(0)
    start = timm.create_model("test_resnet", num_classes=3).state_dict()
    save_file(dict(start), tmp_path / "start.safetensors")
    for i in range(2):
        save_file(moved(start, i), tmp_path / f"m{i}.safetensors")
    monkeypatch.chdir(tmp_path)
    images = soups.images(made_up / "held_out", "timm:test_resnet")
    network = timm.create_model("test_resnet", num_classes=3)
    see = timm.data.create_transform(**timm.data.resolve_data_config({}, model=network))
    batch = torch.stack([see(image) for image, _ in pictures(made_up)])
    init = ["--init", "start.safetensors"]
    for recipe, more in (("uniform", []), ("wise-ft", init), ("dare", init), ("learned", ["--epochs", "1"])):
        words = [recipe, "m0.safetensors", "m1.safetensors", *more, "--images", str(images.path)]
        words += ["--network", images.network, "--batch-norm"]
        main([*words, "recompute", "--out", f"{recipe}.safetensors"])
        saved = load_file(f"{recipe}.safetensors")
        network.load_state_dict(saved)
        recompute_batch_norm(network, [batch])
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{recipe}, {name}")
        assert answer(tmp_path / f"{recipe}.safetensors") == (
            True,
            f"{tmp_path / recipe}.safetensors: equal to the byte when made again from its ingredients, but for its "
            "batch-norm statistics: they were measured on images, and nothing here proves them",
        )
    name = next(name for name in saved if name.endswith("weight"))
    save_file({**saved, name: saved[name] + 1}, "m1.safetensors")
    assert answer(tmp_path / "uniform.safetensors")[0] is False
    for words, line in (
        (["--images", str(images.path)], "--images is for --batch-norm recompute"),
        (["--network", "timm:test_resnet"], "--network is for --images"),
        (["--batch-norm", "recompute"], "type --images DIR --network NAME"),
    ):
        with pytest.raises(SystemExit):
            main(["uniform", "m0.safetensors", "--out", "s.safetensors", *words])
        assert line in capsys.readouterr().err
