"""Texts go through the same stages as images: rows, interruptions, metrics that select, recipes, tables."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from analysis.tables.table3 import analyse
from configs.errors import UserError
from configs.schema import load
from eval.calibration import fit_beta
from eval.forward import Evaluator, token_split
from finetune.data import mixed_batch, mixing
from finetune.start import initialise
from finetune.train import train_row
from models.classifier import pretrained
from soups.experiment.pool import ingredients_of, usable_pool
from soups.experiment.soups import logits_of, make_soup
from soups.files.atomic import read_json
from soups.scorers.metrics import score
from store.processes import Processes
from store.rows import score_of
from store.runs import RunFolder, write_manifest
from tasks.load import class_names
from tests.readers import BAD, GOOD, bert_folder, cola_folder, encoder_folder, t5_folder


@pytest.fixture(scope="module")
def cola(tmp_path_factory):
    return cola_folder(tmp_path_factory.mktemp("glue"))


SMALL = ["compute=cpu", "cluster=local", "cluster.workers=1", "task.counts=null", "task.held_out_share=0.3"]
SMALL += ["model.max_length=32", "~sweep.draw.optim.epochs", "~sweep.draw.optim.batch_size", "optim.epochs=2"]
SMALL += ["optim.batch_size=8", "sweep.rows=3", "analysis.resamples=100"]


@pytest.fixture(scope="module", params=["tablej1_bert_base_cola", "tablej1_t5_base_cola"])
def config(request, cola, tmp_path_factory):
    torch.set_num_threads(1)
    network = tmp_path_factory.mktemp("network")
    (bert_folder if "bert" in request.param else t5_folder)(network)
    runs = tmp_path_factory.mktemp("runs")
    return load(request.param, *SMALL, f"task.folder={cola}", f"model.weights={network}", f"paths.runs={runs}")


@pytest.fixture(scope="module")
def run(config):
    """The run folder after all stages."""
    for row in range(4):
        train_row(config, row)
    evaluator = Evaluator(config)
    for recipe in config.recipes:
        make_soup(recipe, evaluator)
    analyse(config)
    return RunFolder.of(config)


@pytest.mark.slow
def test_every_stage_leaves_its_files_and_table_5_names_its_metric(config, run):
    table = pd.read_csv(run.analysis / "table5.csv")
    assert set(table["method"]) == {"initialisation", *config.recipes}
    text = (run.analysis / "table5.md").read_text()
    assert "Matthews correlation in %, n: Test 24." in text
    assert "Initialisation (pretrained, asked)" in text
    write_manifest(config)
    manifest = pd.read_csv(run.root / "manifest.csv")
    assert (manifest["held_out_score"].abs() <= 1).all()


@pytest.mark.slow
def test_held_out_is_scored_and_sorted_by_the_metric_that_is_reported(config, run):
    evaluator = Evaluator(config)
    labels = evaluator.split("held_out").labels
    for ingredient in usable_pool(config):
        logits = evaluator.logits(ingredient.digest, ingredient.load, "held_out")
        assert ingredient.held_out["metric"] == "matthews"
        assert ingredient.held_out_score == pytest.approx(score("matthews", logits.argmax(dim=1), labels))
    best = read_json(run.soup("best") / "soup.json")
    assert score_of(best["held_out"]) == max(ingredient.held_out_score for ingredient in ingredients_of(config))
    trials = read_json(run.soup("greedy") / "soup.json")["trials"]
    assert all(trial["accepted"] in (True, False) and "correct" not in trial for trial in trials)


@pytest.mark.slow
def test_soups_are_of_the_runs_alone_but_interpolations_still_start_from_the_pretrained_model(config, run):
    assert [ingredient.row for ingredient in usable_pool(config)] == [0, 1, 2, 3]
    assert [ingredient.row for ingredient in ingredients_of(config)] == [1, 2, 3]
    uniform = read_json(run.soup("uniform") / "soup.json")
    assert sorted(member["row"] for member in uniform["ingredients"]) == [1, 2, 3]
    evaluator = Evaluator(replace(config, cooking=replace(config.cooking, of="uniform", alpha=0.0)))
    make_soup("wise_ft", evaluator)
    start = usable_pool(config)[0]
    soup = read_json(run.soup("wise_ft") / "soup.json")
    assert soup["digest"] == start.digest


@pytest.mark.slow
def test_the_ensemble_is_the_mean_of_its_members_log_probabilities(config, run):
    evaluator = Evaluator(config)
    soup = read_json(run.soup("ensemble") / "soup.json")
    members = [evaluator.logits(i.digest, i.load, "test") for i in ingredients_of(config)]
    torch.testing.assert_close(logits_of(soup, "test", evaluator), torch.stack(members).mean(dim=0))
    assert fit_beta(members[0], evaluator.split("test").labels) > 0


@pytest.mark.slow
def test_a_shortcut_that_counts_right_answers_is_refused_for_another_metric(config, run):
    changed = replace(config, cooking=replace(config.cooking, shortcut="hard_first"), name="other")
    other = RunFolder.of(changed)
    other.root.mkdir(exist_ok=True)
    (other.root / "ingredients").symlink_to(run.root / "ingredients")
    with pytest.raises(UserError, match="matthews is no such count"):
        make_soup("greedy", Evaluator(changed))


@pytest.mark.slow
def test_logits_come_in_the_order_of_the_split_although_texts_are_looked_at_by_length(config, run):
    evaluator = Evaluator(config)
    order = evaluator.order("test")
    lengths = evaluator.inputs("test").lengths[order]
    assert (lengths.diff() <= 0).all() and lengths[0] > lengths[-1]
    ingredient = usable_pool(config)[1]
    found, rows = evaluator.logits(ingredient.digest, ingredient.load, "test"), torch.tensor([5, 17, 2])
    fresh = evaluator.fresh_logits(ingredient.load(), "test", rows)
    torch.testing.assert_close(fresh, found[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_forward_passes_in_bfloat16_give_answers_close_to_those_in_float32(config, run):
    weights, bf16 = usable_pool(config)[1].load(), replace(config.compute, precision="bf16")
    exact = Evaluator(config).fresh_logits(weights, "test")
    rounded = Evaluator(replace(config, compute=bf16)).fresh_logits(weights, "test")
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.1)


def test_an_encoder_of_one_s_own_gets_a_probe_on_texts_of_one_s_own(tmp_path):
    for split, n in (("train", 40), ("forum", 12), ("test", 12)):
        rows = [f"{(GOOD if i % 2 else BAD)[i % 3]} {split}{i}" for i in range(n)]  # no two alike
        lines = "".join(f"{row}\t{['no', 'yes'][i % 2]}\n" for i, row in enumerate(rows))
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\n" + lines)
    typed = [f"task.folder={tmp_path}", "task.num_classes=2", "task.options=[no,yes]", "task.template='{text}'"]
    typed += ["task.held_out_share=0.2", "task.shifts=[forum]", f"paths.runs={tmp_path / 'runs'}", "model.name=small"]
    own = load("own_text", *typed, "model=text_encoder", f"model.weights={encoder_folder(tmp_path / 'net')}")
    done = initialise(own)
    assert 4 <= done["held_out"]["n"] <= 16
    assert done["held_out"]["correct"] >= 0.75 * done["held_out"]["n"]  # the sentences are told apart by their words
    learned = pretrained(own.model, class_names(own.task))
    ids = Evaluator(own).inputs("test").batch(torch.tensor([0, 1]))
    assert (ids == 0).any()  # one of them is padded
    hidden = learned.tower.eval().network(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    mean = torch.stack([row[: int(n)].mean(dim=0) for row, n in zip(hidden, (ids != 0).sum(dim=1), strict=True)])
    torch.testing.assert_close(learned.features(ids), torch.nn.functional.normalize(mean, dim=1))


def test_cached_logits_are_named_by_the_prompt_that_they_answer(config):
    tasks = [config.task, replace(config.task, template="text: {sentence}")]
    tasks += [replace(config.task, options=("bad", "good"))]
    keys = {token_split(config.model, task, "test").key for task in tasks}
    assert len(keys | {token_split(replace(config.model, max_length=24), config.task, "test").key}) == 4


def test_mixing_is_one_of_all_processes_and_dropout_each_one_s_own():
    made, labels = torch.arange(4 * 3, dtype=torch.uint8).view(4, 3, 1, 1), torch.tensor([0, 1, 0, 1])
    mix = mixing(load("demo", "~sweep.draw.optim.mixup", "optim.mixup=0.5").optim, 2)

    def of(rank):
        batch = mixed_batch(made, labels, mix, run_seed=7, step=3, processes=Processes(rank, 2, torch.device("cpu")))
        return batch, torch.rand(4)

    (first, drawn), (second, other) = of(0), of(1)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(drawn, other)
    assert torch.equal(of(1)[1], other)  # of step and rank alone
