"""Tables with the paper's numbers: what is bold, what stands beside what, and that proxies are named."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest

from analysis.artefacts import ARTEFACTS, write_artefact
from analysis.measure.methods import measure
from analysis.tables.paper import (
    cells_beside_paper,
    measure_beside_paper,
    measure_rows_beside_paper,
    network_of,
    paper_table,
    with_significance,
)
from configs.errors import UserError
from configs.schema import load
from eval.pool import evaluate, is_scored
from soups.experiment.pool import individuals_of
from soups.experiment.soups import make_soups
from soups.files.atomic import read_json, read_jsonl, write_json
from soups.files.weights import load_weights, save_weights
from store.runs import RunFolder
from tests.pools import finished_pool, moved

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process")]  # a pool is evaluated


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    settings = ("sweep.rows=3", "recipes=[best,uniform,greedy,ensemble]", "model.templates=null", "cluster.workers=1")
    config, evaluator = finished_pool(runs, *settings, classes=20)
    make_soups(config, config.recipes, Console(quiet=True))
    return config, evaluator


def test_bold_is_the_best_and_what_mcnemars_test_does_not_tell_from_it(finished):
    config, evaluator = finished
    _, methods = measure(evaluator)
    best = next(method for method in methods if method.name == "best")
    tidy = with_significance(evaluator, methods, best).query("column == 'test'").set_index("method")
    top = tidy["accuracy"].idxmax()
    assert tidy.loc[top, "bold"]
    by_name = {method.name: method for method in methods}
    for name, row in tidy.iterrows():
        ours, theirs = (by_name[each].hits["test"].bool() for each in (name, top))
        p = binomtest(int((ours & ~theirs).sum()), max(1, int((ours ^ theirs).sum()))).pvalue
        if name != top and config.task.bootstrap_unit == "image":
            assert row["p_to_best"] == pytest.approx(p, abs=0.01)
        assert row["bold"] == (row["p_to_best"] >= 0.05)


def test_an_oracle_is_never_bold_and_stands_where_the_paper_has_one(finished):
    config, _ = finished
    markdown, latex, csv = write_artefact("table4", [config])
    numbers = pd.read_csv(csv)
    assert not numbers.loc[numbers["method"] == "oracle", "bold"].any()
    assert "oracle" not in set(pd.read_csv(write_artefact("table3", [config])[2])["method"])
    paper = paper_table("table4").set_index(["row", "column"])["value"]
    beside = numbers.dropna(subset=["paper"]).set_index(["method", "column"])
    assert beside.loc[("greedy", "test"), "paper"] == paper["greedy", "test"]
    page = markdown.read_text()
    assert "emoji, a proxy for ImageNet" in page
    assert "**" in page
    assert r"\textbf{" in latex.read_text()
    assert "**" not in latex.read_text()


@pytest.mark.parametrize(
    ("table", "alone"),
    [
        ("table1", {"ViT-G/14 (Zhai et al. 2021)": "90.45", "CoAtNet-7 (Dai et al. 2021)": "90.88"}),
        ("table4", {"ViT-G/14 (Zhai et al. 2021, re-evaluated)": "90.47", "CoAtNet-7 (Dai et al. 2021)": "90.88"}),
        ("tablec1", {"CoCa (Yu et al. 2022)": "91.00†"}),
        ("table3", {"Second best model": "79.89†", "Learned soup (by layer: every tensor)": "81.37"}),
    ],
)
def test_what_only_the_paper_has_is_printed_as_the_papers(finished, table, alone):
    markdown, _, csv = write_artefact(table, [finished[0]])
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in _rows_of(markdown)]
    by_name = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    for name, value in alone.items():
        row = by_name[f"{name}, paper only"]
        assert (row["Test"], row["Test, paper"], row["Test − best"]) == ("", value, "")
    assert "paper only" not in " ".join(name for name in by_name if name.startswith("Best individual model"))
    numbers = pd.read_csv(csv)
    there = set(paper_table(table).query("column == 'test'")["row"])
    assert there == set(numbers[numbers["paper"].notna() & (numbers["column"] == "test")]["method"])


def test_differences_to_the_paper_are_of_the_papers_own_model_alone(finished):
    config, _ = finished
    numbers = measure_beside_paper(config, "table3")
    off = 100 * numbers["accuracy"] - numbers["paper"]
    assert off.notna().any() and numbers["minus_paper"].dropna().tolist() == pytest.approx(off.dropna().tolist())
    assert "Test − paper" in cells_beside_paper(config, numbers)[0]
    markdown, _, csv = write_artefact("table3", [config])  # of a proxy
    assert "− paper" not in markdown.read_text() and pd.read_csv(csv)["minus_paper"].isna().all()
    table = ARTEFACTS["table3"]
    assert table.is_papers(load("table3_clip_b32")) and table.is_papers(load("released"))
    assert not ARTEFACTS["table4"].is_papers(load("table4_vitg"))  # of a stand-in


def _rows_of(markdown):
    return [line for line in markdown.read_text().splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def two_averages(tmp_path_factory):
    """Rows with a low and a high EMA; the high one of row 2 is the best of all, the zero-shot weights but a little."""
    runs = tmp_path_factory.mktemp("runs")
    settings = ["sweep.rows=3", "recipes=[best,second_best,uniform,ensemble]", "model.head=zero_shot"]
    settings += ["regularizer.ema=[0.9,0.99]", "regularizer.ingredient=ema_0.9", "cluster.workers=1"]
    settings += ["cooking.individuals=[ema_0.9,ema_0.99]", "cooking.initialisation=false", "task.shifts=[v2]"]
    config, evaluator = finished_pool(runs, *settings, classes=20, small=False)
    run = RunFolder.of(config)
    start = load_weights(
        run.ingredient(0) / "weights.safetensors", read_json(run.ingredient(0) / "done.json")["digest"]
    )
    for row, scale in ((1, 0.4), (2, 0.01), (3, 0.4)):
        folder = run.ingredient(row)
        digest = save_weights(folder / "ema_0.99.safetensors", moved(start, row, scale))
        logits = evaluator.logits_of_file(digest, folder / "ema_0.99.safetensors", "held_out")
        high = {"digest": digest, "held_out": evaluator.scored(logits, "held_out")}
        done = read_json(folder / "done.json") | {"ingredient": "ema_0.9", "variants": {"raw": high, "ema_0.99": high}}
        write_json(folder / "done.json", done)
    make_soups(config, config.recipes, Console(quiet=True))
    return config, evaluator


def test_single_models_are_chosen_of_both_averages_and_soups_are_of_the_low_one(two_averages):
    config, evaluator = two_averages
    soups = {name: read_json(RunFolder.of(config).soup(name) / "soup.json") for name in config.recipes}
    best = soups["best"]["ingredients"][0]
    assert (best["row"], best["kind"]) == (2, "ema_0.99")
    assert soups["best"]["digest"] == best["digest"]
    for name in ("uniform", "ensemble"):
        assert {(each["row"], each["kind"]) for each in soups[name]["ingredients"]} == {
            (i, "ema_0.9") for i in (1, 2, 3)
        }
    pool, methods = measure(evaluator, with_oracle=True)
    by_name = {method.name: method for method in methods}
    assert by_name["oracle"].accuracy("test") == by_name["best"].accuracy("test")
    assert by_name["best"].accuracy("test") > max(method.accuracy("test") for method in pool[1:])
    assert pool[0].accuracy("test") >= by_name["oracle"].accuracy("test")  # the initialisation is no candidate
    page = write_artefact("table4", [config])[0].read_text()
    assert "without the initialisation, soups and ensembles of ema_0.9, best of ema_0.9, ema_0.99" in page


def test_both_averages_are_evaluated_with_their_row(two_averages):
    config, _ = two_averages
    folder = RunFolder.of(config).ingredient(1)
    alone = replace(config, cooking=replace(config.cooking, individuals=()))
    evaluate(alone, folder)
    assert is_scored(alone, folder)
    assert not is_scored(config, folder)
    assert evaluate(config, folder).startswith("ingredients/001: test ")
    assert is_scored(config, folder)
    done = read_json(folder / "done.json")
    assert [row["weights"] for row in read_jsonl(folder / "scores.jsonl") if row["split"] == "v2"] == [
        done["digest"],
        done["variants"]["ema_0.99"]["digest"],
    ]


def test_an_average_that_rows_do_not_leave_is_refused(two_averages):
    with pytest.raises(UserError, match=r"cooking.individuals: ema_0.5 is not made"):
        load("table4_vitg", "cooking.individuals=[ema_0.999,ema_0.5]")
    with pytest.raises(UserError, match=r"leaves out ema_0\.999"):
        load("table4_vitg", "cooking.individuals=[ema_0.9999999]")
    config, _ = two_averages
    file = RunFolder.of(config).ingredient(3) / "done.json"
    done = read_json(file)
    write_json(file, done | {"variants": {}})
    try:
        with pytest.raises(UserError, match=r"ingredients/003 has no weights of kind ema_0\.99,"):
            individuals_of(config)
    finally:
        write_json(file, done)


def test_81_37_stands_beside_one_coefficient_for_each_tensor():
    paper = paper_table("table3").set_index(["row", "column"])["value"]
    assert paper["learned_by_tensor", "test"] == 81.37
    assert "learned_by_layer" not in paper.index.get_level_values("row")
    for experiment in ("table3_clip_b32", "released", "released_sweep", "demo"):
        assert {"learned_by_tensor", "learned_by_layer"} <= set(load(experiment).recipes)


def test_the_papers_gain_is_its_row_minus_its_best(finished):
    table = write_artefact("table3", [finished[0]])[0].read_text().splitlines()
    header = [cell.strip() for cell in table[0].strip("|").split("|")]
    greedy = next(line for line in table if line.startswith("| Greedy soup "))
    cells = dict(zip(header, [cell.strip() for cell in greedy.strip("|").split("|")], strict=True))
    assert cells["Test − best, paper"] == "+0.65"  # 81.03 - 80.38
    assert cells["Mean of shifts − best, paper"] == "+2.92"  # 50.75 - 47.83


@pytest.mark.parametrize(("rate", "paper"), [("3e-5", 80.24), ("1e-5", 80.08), (None, 80.24)])
def test_a_row_stands_beside_the_papers_number_at_its_learning_rate(finished, rate, paper):
    config, _ = finished
    names = [f"{name}, {rate}" if rate else name for name in ("minimal", "medium", "strong")]
    whole = "minimal, medium, strong" + (f", {rate}" if rate else "")
    named = replace(config.analysis, labels=tuple(names), sets={whole: (1, 2, 3)})
    numbers = pd.read_csv(write_artefact("tablel1", [replace(config, analysis=named)])[2])
    soup = numbers[numbers["method"].str.startswith("Soup") & (numbers["column"] == "test")]
    assert soup["paper"].item() == paper


def test_rows_without_names_are_refused(finished):
    with pytest.raises(UserError, match=r"analysis\.labels"):
        measure_rows_beside_paper(finished[0], "tablel1")


def test_networks_are_called_as_in_the_papers_tables():
    names = {network: f"tablej1_{network}_rte" for network in ("bert_base", "bert_large", "t5_small", "t5_large")}
    assert {network: network_of(load(name)) for network, name in names.items()} == {name: name for name in names}
    assert {row.partition("/")[0] for row in paper_table("tablej1")["row"]} > set(names)
    assert network_of(load("demo_text")) == "minilm"


def test_a_table_of_texts_has_ours_and_every_number_of_the_paper(finished):
    config, _ = finished
    text = write_artefact("table5", [config])[0].read_text()
    assert re.search(r"\| BERT-base +\| rte +\|.*\| Greedy soup +\|.*\| 61.7", text)
    assert "| emoji" in text


def test_an_ensemble_costs_as_many_forward_passes_as_it_has_models(finished):
    torch.set_num_threads(1)
    numbers = pd.read_csv(write_artefact("table2", [finished[0]])[2]).set_index("method")
    assert list(numbers.index) == ["best", "ensemble", "uniform", "greedy"]
    assert numbers.loc["ensemble", "models"] == 4
    assert numbers.loc["ensemble", "gflops"] == pytest.approx(4 * numbers.loc["best", "gflops"])
    assert numbers.loc["ensemble", "times_single"] > 2
    assert numbers.loc["uniform", "gflops"] == numbers.loc["best", "gflops"]
