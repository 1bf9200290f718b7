"""The report's page: its numbers are the files', it loads nothing, nobody's name is code, and a browser opens it."""

import json
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pandas as pd
import pytest

from analysis.artefacts import write_artefact
from analysis.figures.calibration import reliability_rows
from analysis.page.write import write_report
from analysis.tables.table3 import analyse
from configs.errors import UserError
from configs.schema import load
from eval.calibration import calibrate
from soups.experiment.soups import logits_of, make_soup, outputs_of
from soups.files.atomic import read_json, write_json
from store.runs import RunFolder, write_manifest
from tests.pages import Page, browse
from tests.pools import finished_pool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process")]  # a browser opens the page

RECIPES = ("best", "uniform", "greedy", "greedy_random_order", "learned_by_layer", "ensemble")
HOSTILE = "</script><script>throw 1</script>\"' onload=throw{{ 1 }}"
DRIVER = """
const keys = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const shown = () => document.querySelector("#details article:not([hidden])").dataset.key;
const marks = [...document.querySelectorAll(".mark")];
const seen = { first: shown(), wide: document.documentElement.scrollWidth, window: innerWidth };
marks.find((mark) => mark.dataset.key === "uniform").focus();
seen.focused = shown();
seen.ties = document.querySelectorAll("#ties path").length;
keys("End");
seen.last = shown();
keys("ArrowLeft");
seen.before = shown();
const at = marks.find((mark) => mark.dataset.key === "row-2").getBoundingClientRect();
const place = { clientX: at.x + at.width / 2, clientY: at.y + at.height / 2, bubbles: true };
document.getElementById("plot").dispatchEvent(new MouseEvent("click", place));
seen.tapped = shown();
const shade = document.getElementById("shade");
shade.value = "optim.lr";
shade.dispatchEvent(new Event("change"));
const rows = marks.filter((mark) => mark.dataset.key.startsWith("row"));
seen.shades = rows.map((mark) => mark.style.fill);
const head = [...document.querySelectorAll("#pool th button")].find((each) => each.textContent === "optim.lr");
head.click();
head.click();
seen.sorted = [...document.querySelectorAll("#pool tbody th")].map((cell) => cell.textContent);
parent.postMessage(JSON.stringify(seen), "*");
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A pool that was moved by chance, with everything the page can show."""
    plane = "analysis.plane={rows: [[1, 2]], size: 3, margin: 0.2, train_examples: 20, chunk: 1024}"
    settings = ["cluster.workers=1", "cooking.orders=2", f"recipes=[{','.join(RECIPES)}]"]
    config, evaluator = finished_pool(tmp_path_factory.mktemp("runs"), plane, *settings, scale=0.05)
    run = RunFolder.of(config)
    for row, lr in enumerate((0.0003, 0.00002, 0.004), 1):
        path = run.ingredient(row) / "done.json"
        drawn = {"optim.lr": lr, "augment.kind": HOSTILE if row == 1 else "rand"}
        write_json(path, read_json(path) | {"drawn": drawn, "seed": 2**60 + row})
    write_manifest(config)
    for recipe in config.recipes:
        for output in outputs_of(config, recipe):
            make_soup(output, evaluator)
    analyse(config)
    return replace(config, analysis=replace(config.analysis, labels=(HOSTILE, "plain", "other"))), evaluator


@pytest.fixture(scope="module")
def before(finished):
    """The page without figures that have commands of their own."""
    return Page(write_report(finished[0]).read_text())


@pytest.fixture(scope="module")
def path(finished, before):
    del before  # was made first
    write_artefact("reliability", [finished[0]])
    write_artefact("figure2", [replace(finished[0], analysis=replace(finished[0].analysis, labels=()))])
    return write_report(finished[0])


@pytest.fixture(scope="module")
def page(path):
    return Page(path.read_text())


def words(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_the_tables_of_methods_have_the_numbers_of_table_3(finished, page):
    config = finished[0]
    numbers = words(RunFolder.of(config).analysis / "table3.csv")
    for (method, cells), whole, head in zip(
        numbers.groupby("method", sort=False), page.values("splits"), page.values("headline"), strict=True
    ):
        expected = {}
        for _, cell in cells.iterrows():
            gain = [] if method == "best" else [cell["difference"], cell["low"], cell["high"]]
            expected[cell["column"]] = [cell["accuracy"], *([cell["spread"]] if cell["spread"] else []), *gain]
        assert whole == [word for found in expected.values() for word in found]
        assert head[:-2] == expected["test"] + expected["shift_mean"]
        assert head[-2:] == list(cells[["held_out", "models"]].iloc[0])


def test_what_is_shown_are_those_numbers_in_per_cent(finished, page):
    numbers = pd.read_csv(RunFolder.of(finished[0]).analysis / "table3.csv")
    greedy = numbers[(numbers["method"] == "greedy") & (numbers["column"] == "test")].iloc[0]
    line = next(line for line in page.lines("headline") if line[0].words == "Greedy soup")
    assert line[1].words == f"{100 * greedy['accuracy']:.1f}"
    low, mean, high = (f"{100 * greedy[name]:+.1f}" for name in ("low", "difference", "high"))
    assert line[2].words == f"{mean} [{low}, {high}]"


def test_the_table_of_models_is_the_manifest(finished, page):
    manifest = words(RunFolder.of(finished[0]).root / "manifest.csv")
    heads = [cell.words for cell in page.tables["pool"][0]]
    assert len(page.lines("pool")) == len(manifest) == 4
    for line, (_, row) in zip(page.lines("pool"), manifest.iterrows(), strict=True):
        found = dict(zip(heads, line, strict=True))
        assert found["Model"].values == [row["row"]]
        assert found["Held-out top-1 (%)"].values == [row["held_out_top1"]]
        assert found["digest"].values == [row["digest"]]
        assert found["optim.lr"].values == ([row["optim.lr"]] if row["optim.lr"] else [])
        assert found["augment.kind"].words == row["augment.kind"]
    assert found["seed"].words == str(2**60 + 3)


def test_soups_and_decisions_are_those_of_the_records(finished, page):
    config = finished[0]
    names = [output for recipe in RECIPES for output in outputs_of(config, recipe)]
    assert len(page.lines("composition")) == len(names) == 7
    for output, line in zip(names, page.lines("composition"), strict=True):
        soup = read_json(RunFolder.of(config).soup(output) / "soup.json")
        shares = {str(member["row"]): [repr(member["weight"])] for member in soup["ingredients"]}
        heads = [cell.words for cell in page.tables["composition"][0]]
        assert {head: cell.values for head, cell in zip(heads, line, strict=True) if cell.values} == shares
        if not soup["trials"]:
            assert f"log-{output}" not in page.tables
            continue
        for trial, made in zip(soup["trials"], page.lines(f"log-{output}"), strict=True):
            assert made[3].values == [repr(trial["score"])]
            assert f"({trial['correct']} of {soup['held_out']['n']})" in made[3].words
            assert made[2].words == ("✓ kept" if trial["accepted"] else "✗ left out")


def test_coefficients_bins_and_planes_are_those_of_the_csv_files(finished, page):
    run = RunFolder.of(finished[0])
    shares = words(run.soup("learned_by_layer") / "coefficients.csv")
    assert page.values("coefficients-learned_by_layer") == shares.drop(columns="group").to_numpy().tolist()
    bins = words(run.analysis / "reliability.csv")
    filled = [[word for word in line if re.fullmatch(r"[\d.]+", word)] for line in bins.to_numpy().tolist()]
    assert page.values("reliability-bins") == filled
    assert [line[:2] for line in page.values("reliability")] == [
        list(rows.drop_duplicates("stage")["ece"]) for _, rows in bins.groupby("model", sort=False)
    ]
    plane = words(run.analysis / "figure2.csv")
    models = plane.loc[plane["point"] != "grid", ["train_loss", "error_test", "error_shift_mean"]]
    assert page.values("figure2")[:3] == models.to_numpy().tolist()


def test_marks_stand_where_figure_1_has_them(finished, page):
    numbers = pd.read_csv(RunFolder.of(finished[0]).analysis / "figure1.csv").set_index("name")
    marks = {a["data-key"].replace("row-", "row "): a for _, a in page.tags if "data-key" in a and "cx" in a}
    assert set(marks) == set(numbers.index)
    for column, place in (("test", "cx"), ("shift_mean", "cy")):
        at = pd.Series({name: float(mark[place]) for name, mark in marks.items()})
        slope, start = np.polyfit(numbers[column], at[numbers.index], 1)
        assert (slope > 0) == (place == "cx")  # upwards is towards 0 in a drawing
        assert at[numbers.index].to_numpy() == pytest.approx(slope * numbers[column] + start, abs=0.02)


def test_it_loads_nothing_and_forbids_the_rest(page, path):
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    text = path.read_text()
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "script-src 'sha256-" in policy
    assert text.count("data:image/png;base64,iVBOR") == 1  # of the plane
    assert len(text) < 3_000_000


def test_an_interval_is_drawn_between_its_ends_beside_the_same_zero(page):
    cells = [cell.attributes.get("style") for line in page.lines("headline") for cell in line]
    drawn = [[float(place) for place in re.findall(r"([\d.]+)%", style)] for style in cells if style]
    assert len(drawn) == 2 * (len(page.lines("headline")) - 1)  # test and shifts, of all but the baseline
    assert all(0 <= low <= mean <= high <= 100 for low, mean, high, _ in drawn)
    assert len({zero for *_, zero in drawn}) == 1


def test_a_name_is_never_code(page, path):
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "<script>throw" not in path.read_text()
    assert not any("onload" in attributes for _, attributes in page.tags)
    named = [line[0].words for line in page.lines("pool")]
    assert named[1] == f"Row 1: {HOSTILE}"


def test_tables_have_heads_and_pictures_and_drawings_have_words(page):
    assert len(page.tables) > 10
    for rows in page.tables.values():
        assert all(cell.tag == "th" and cell.attributes["scope"] == "col" for cell in rows[0])
        assert all(line[0].tag == "th" and line[0].attributes["scope"] == "row" for line in rows[1:])
    for tag, attributes in page.tags:
        assert tag != "img" or len(attributes["alt"]) > 20
        assert tag != "svg" or "aria-label" in attributes or "aria-hidden" in attributes
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))


def test_what_is_not_made_yet_says_how_in_a_line(before, page):
    text = " ".join(before.words)
    assert "python -m analysis artefact=reliability experiment=demo_tiny" in text
    assert "python -m analysis artefact=figure2 experiment=demo_tiny" in text
    assert "not made yet" in text
    assert "not made yet" not in " ".join(page.words)


def test_a_section_of_a_recipe_that_is_not_made_is_left_out(finished, tmp_path):
    few = replace(finished[0], recipes=("best", "uniform", "greedy"))
    assert "coefficients-learned_by_layer" not in write_report(few, tmp_path / "page.html").read_text()


def test_the_same_files_make_the_same_page(finished, path, tmp_path):
    assert write_report(finished[0], tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_commands_repeat_what_was_typed_and_name_the_sweep_seed_of_several(finished, tmp_path):
    text = write_report(finished[0], tmp_path / "a.html", ["experiment=demo_tiny", "name=mine", "recipes=[best]"])
    assert "python -m soups experiment=demo_tiny name=mine &#39;recipes=[best]&#39;" in text.read_text()
    with pytest.raises(UserError, match=r"demo_seeds name=demo_seeds/seed1 sweep.seed=1 'replicates=\[\]' first"):
        write_report(load("demo_tiny", "name=demo_seeds/seed1", "sweep.seed=1", f"paths.runs={tmp_path}"))


def test_a_missing_stage_or_a_damaged_file_is_named(finished, tmp_path):
    with pytest.raises(UserError, match=r"manifest.csv is missing: run python -m finetune experiment=demo_tiny first"):
        write_report(load("demo_tiny", f"paths.runs={tmp_path}"))
    with pytest.raises(UserError, match="demo_seeds is 3 sweeps"):
        write_report(load("demo_seeds", f"paths.runs={tmp_path}"))
    (tmp_path / "demo_tiny").mkdir()
    (tmp_path / "demo_tiny/manifest.csv").write_bytes(b"row\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"manifest.csv is damaged"):
        write_report(load("demo_tiny", f"paths.runs={tmp_path}"))


def test_reliability_is_of_test_with_temperatures_of_held_out(finished, path):
    del path  # has made the figure
    config, evaluator = finished
    found = words(RunFolder.of(config).analysis / "reliability.csv")
    names = ["Best individual model", "Uniform soup", "Greedy soup", "Ensemble"]
    assert list(found["model"].unique()) == names
    soup = read_json(RunFolder.of(config).soup("ensemble") / "soup.json")
    pairs = [(logits_of(soup, split, evaluator), evaluator.split(split).labels) for split in ("held_out", "test")]
    expected = reliability_rows({"Ensemble": calibrate(pairs[0], pairs[1], bins=config.analysis.bins)})
    ours = found[found["model"] == "Ensemble"]
    assert list(ours["count"].astype(int)) == list(expected["count"])
    assert list(ours["beta"].astype(float)) == pytest.approx(list(expected["beta"]), abs=1e-8)
    assert ours["ece"].astype(float).iloc[0] == pytest.approx(expected["ece"].iloc[0], abs=1e-8)


def test_a_browser_runs_its_script_and_its_console_says_nothing(path, tmp_path):
    console, shown = browse(path, tmp_path, "--window-size=390,900")
    assert console == []
    assert re.search(r'class="mark chosen" data-key="greedy"', shown)
    assert "<button" in shown


def test_a_planted_script_is_refused_by_the_policy(path, tmp_path):
    planted = tmp_path / "planted.html"
    planted.write_text(path.read_text().replace("</main>", "<script>document.title = 'planted'</script></main>"))
    console, shown = browse(planted, tmp_path)
    assert any("Content Security Policy" in line for line in console)
    assert "<title>planted</title>" not in shown


@pytest.mark.parametrize("width", [390, 1280])
def test_points_answer_to_keys_taps_and_settings_and_nothing_is_wider_than_the_window(path, tmp_path, width):
    text = re.sub(r"script-src 'sha256-[^']+'", "script-src 'unsafe-inline'", path.read_text())
    (tmp_path / "driven.html").write_text(text.replace("</body>", f"<script>{DRIVER}</script></body>"))
    # A window of a headless browser is at least 500 wide, a frame need not be.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="driven.html" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>addEventListener('message', (event) => document.body.append(`SAID${event.data}DIAS`))</script>"
    )
    console, shown = browse(frame, tmp_path)
    assert console == []
    seen = json.loads(unescape(re.search(r"SAID({.*?})DIAS", shown, re.DOTALL)[1]))
    assert seen["window"] == width
    assert seen["wide"] <= width
    assert (seen["first"], seen["focused"], seen["tapped"]) == ("greedy", "uniform", "row-2")
    assert seen["ties"] == 4
    assert seen["last"] != seen["before"]
    assert len(set(seen["shades"])) == 3
    assert seen["sorted"] == ["Row 3: other", f"Row 1: {HOSTILE}", "Row 2: plain", "Initialisation"]
