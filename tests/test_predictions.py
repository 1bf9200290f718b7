"""Tables of predictions of a pool, with held-out and test swapped, and soups of smaller pools drawn from it."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from analysis import subpools as module
from analysis.claims import METHODS, SHIFTS, models, predictions, write_pool
from analysis.subpools import KINDS, Subpool, candidates, measured, pays, subpools, write_pays, write_subpools
from analysis.will_it_help import NOISE
from configs.errors import UserError
from configs.schema import load
from eval.metrics import correct
from soups.experiment.pool import mix, usable_pool
from soups.experiment.soups import make_soup, make_soups
from soups.mean import STATISTICS
from soups.recipes import mean_of
from store.rows import row_config
from store.runs import RunFolder
from tests.pools import finished_pool

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """An evaluator of a pool of the initialisation and six models moved from it."""
    torch.set_num_threads(1)
    return finished_pool(tmp_path_factory.mktemp("runs"), "sweep.rows=6", scale=0.6)[1]


@pytest.fixture(scope="module")
def frame(pool):
    return predictions(pool.config)


@pytest.mark.slow
def test_each_unseen_split_reports_where_the_other_selects_and_shifts_report_both_times(pool, frame):
    found = frame.groupby(["selects", "split"], sort=False).size().to_dict()
    n = {split: len(pool.split(split)) for split in ("held_out", "test", *pool.config.task.shifts)}
    assert found == {
        (selects, split): n[split]
        for selects, reports in (("held_out", "test"), ("test", "held_out"))
        for split in (reports, *pool.config.task.shifts)
    }
    assert set(frame[list(METHODS)].to_numpy().ravel()) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize(("selects", "reports"), [("held_out", "test"), ("test", "held_out")])
def test_the_best_model_is_the_best_on_the_split_that_selects(pool, frame, selects, reports):
    members = usable_pool(pool.config)
    hits = {s: [pool.hits(pool.logits(m.digest, m.load, s), s) for m in members] for s in (selects, reports)}
    best = max(range(len(members)), key=lambda i: int(hits[selects][i].sum()))
    part = frame[(frame["selects"] == selects) & (frame["split"] == reports)]
    assert part["best"].tolist() == hits[reports][best].int().tolist()
    assert part["class"].tolist() == pool.split(reports).labels.tolist()


@pytest.mark.slow
def test_where_test_selects_its_scores_do_and_recorded_held_out_ones_have_no_say(pool, tmp_path):
    members = usable_pool(pool.config)
    right = [pool.count(pool.logits(m.digest, m.load, "test"), "test")[0] for m in members]
    worst = right.index(min(right))
    planted = [
        replace(m, held_out={"split": "held_out", "correct": 9 if i == worst else 1, "n": 10})
        for i, m in enumerate(members)
    ]
    assert max(right) > min(right)
    chosen = {s: mix("best", planted, pool, tmp_path, "", split=s).soup.ingredients[0] for s in ("held_out", "test")}
    assert chosen == {"held_out": worst, "test": right.index(max(right))}


@pytest.mark.slow
def test_a_swapped_greedy_soup_is_chosen_and_scored_on_test_alone_and_lies_apart(pool, frame):
    swapped, usual = make_soup("greedy", pool, "test"), make_soup("greedy", pool)
    root = RunFolder.of(pool.config).root / "soups"
    assert (root / "greedy@test/soup.json").exists() and (root / "greedy/soup.json").exists()
    assert (swapped["selected_on"]["split"], usual["selected_on"]["split"]) == ("test", "held_out")
    for made in (swapped, usual):
        split, members = made["selected_on"]["split"], {m.row: m for m in usable_pool(pool.config)}
        weights = mean_of([members[each["row"]].load for each in made["ingredients"]])
        right = int(correct(pool.fresh_logits(weights, split), pool.split(split).labels).sum())
        assert made["held_out"]["correct"] == right
        first = made["trials"][0]["correct"] if made["trials"] else right
        assert right >= first
    kept = [m["row"] for m in usual["ingredients"]]
    make_soups(pool.config, ("greedy",))
    assert [m["row"] for m in make_soup("greedy", pool)["ingredients"]] == kept


@pytest.mark.slow
def test_every_model_has_its_digest_settings_and_results(pool):
    table = models(pool.config)
    members = usable_pool(pool.config)
    assert table["digest"].tolist() == [m.digest for m in members]
    for split in ("test", "v2"):
        hits = pool.hits(pool.logits(members[3].digest, members[3].load, split), split)
        assert table[split][3] == pytest.approx(hits.double().mean().item())


@pytest.mark.slow
def test_what_a_pool_writes_can_be_read_as_it_was(pool, frame):
    files = write_pool(pool.config)
    assert [file.name for file in files] == ["predictions.csv", "models.csv", "predictions_provenance.json"]
    pd.testing.assert_frame_equal(pd.read_csv(files[0]), frame, check_dtype=False)
    record = files[2].read_text()  # is published, so it names no folder of this machine
    assert '"experiment": "demo_tiny"' in record and str(pool.config.paths.runs) not in record


@pytest.mark.parametrize("words", [["model.probe_c=[0.1,1]"], ["optim.keep=best", "optim.evaluate_every=5"]])
def test_a_pool_that_held_out_had_a_say_in_is_refused(words):
    with pytest.raises(UserError, match=r"cannot change places with test: the pool needs model.probe_c=\[1\]"):
        predictions(load("demo_tiny", *words))


@pytest.mark.slow
def test_sub_pools_are_drawn_by_key_from_those_that_their_kind_names(pool, monkeypatch):
    drawn = {("any", 3, 1.0): 2, ("any", 7, 1.0): 1, ("short trainings", 2, 1.0): 1}
    drawn |= {("long trainings", 2, 1.0): 1, ("few held-out", 3, 0.5): 2}
    monkeypatch.setattr(module, "KINDS", {kind: (number, "") for kind, number in drawn.items()})
    config, members = pool.config, usable_pool(pool.config)
    found = subpools(config, members, 10)
    assert found == subpools(config, members, 10)
    kinds = [each.kind for each in found]  # seven are more than the six fine-tuned ones
    assert kinds == ["any", "any", "short trainings", "long trainings", "few held-out", "few held-out"]
    assert all(0 not in each.members for each in found)
    assert [each.members for each in found[:2]] == [each.members for each in found[4:]]
    assert [len(each.held_out) for each in found] == [10, 10, 10, 10, 5, 5]
    lengths = {i: row_config(config, members[i].row).optim.epochs for i in range(1, 7)}
    assert sorted(lengths[i] for i in found[2].members) == sorted(lengths.values())[:2]
    assert sorted(lengths[i] for i in found[3].members) == sorted(lengths.values())[-2:]


def test_near_learning_rates_are_those_around_the_middle():
    assert sorted(candidates("near learning rates", [1] * 6, [1e-6, 1e-3, 1.1e-3, 1, 2, 3])) == [3, 4]


@pytest.mark.slow
def test_a_sub_pools_soups_are_those_of_its_models_and_are_found_again(pool, monkeypatch):
    config, members = pool.config, usable_pool(pool.config)
    subpool = Subpool("any", 0, 0.5, (1, 2, 4), tuple(range(0, len(pool.split("held_out")), 2)))
    found = measured(config, subpool)
    rows = torch.tensor(subpool.held_out)
    labels = pool.split("held_out").labels[rows]
    known = {
        i: correct(pool.logits(members[i].digest, members[i].load, "held_out")[rows], labels).double().mean().item()
        for i in subpool.members
    }
    assert found["best held_out"] == max(known.values())
    best = members[max(known, key=known.get)]
    hits = pool.hits(pool.logits(best.digest, best.load, "test"), "test")
    assert found["best test"] == pytest.approx(hits.double().mean().item())
    mean = mean_of([members[i].load for i in subpool.members])
    hits = pool.hits(pool.fresh_logits(mean, "test"), "test")
    assert found["uniform test"] == pytest.approx(hits.double().mean().item())
    assert found["greedy held_out"] >= found["best held_out"]
    first, second = sorted(known, key=lambda i: (-known[i], i))[:2]
    middle = pool.fresh_logits(mean_of([members[first].load, members[second].load]), "held_out", rows)
    between = correct(middle, labels).double().mean().item()
    assert found["barrier held_out"] == pytest.approx((known[first] + known[second]) / 2 - between)
    monkeypatch.setattr(module, "greedy", lambda *_: pytest.fail("it was computed again"))
    assert measured(config, subpool) == found


def averaged(name, tensor):
    return tensor.is_floating_point() and not name.endswith(STATISTICS)


@pytest.mark.slow
def test_all_sub_pools_come_in_one_table(pool, monkeypatch):
    monkeypatch.setattr(module, "KINDS", {("any", 2, 1.0): (2, ""), ("few held-out", 2, 0.5): (1, "")})
    (file,) = write_subpools(pool.config)
    table = pd.read_csv(file)
    assert table["kind"].tolist() == ["any", "any", "few held-out"] and set(table["models"]) == {2}
    assert table["held_out"].tolist() == [len(pool.split("held_out"))] * 2 + [len(pool.split("held_out")) // 2]
    assert table[["best test", "greedy shifts", "uniform held_out", "barrier held_out"]].notna().all().all()
    pooled = usable_pool(pool.config)
    start, *tuned = (
        torch.cat([tensor.double().flatten() for name, tensor in each.load().items() if averaged(name, tensor)])
        for each in pooled
    )
    rows = [each.row for each in pooled[1:]]
    a, b = (tuned[rows.index(int(row))] - start for row in table["rows"][0].split())
    assert table["cosine"][0] == pytest.approx((a @ b / a.norm() / b.norm()).item(), rel=1e-4)
    assert table["distance"][0] == pytest.approx(((a.norm() + b.norm()) / 2 / start.norm()).item(), rel=1e-4)


def lines_of_sub_pools():
    rows = []
    for kind, size, share in KINDS:
        for number, (gain, of_uniform) in enumerate([(0.02, 0.01), (0.0, -0.02), (-0.01, -0.05), (0.03, 0.0)]):
            row = {"kind": kind, "models": size, "share": share, "number": number, "held_out": 600 * share}
            row |= {"epochs": 8 + number, "lr spread": 0.3}
            for on in ("test", "shifts"):
                row |= {f"best {on}": 0.5, f"greedy {on}": 0.5 + gain, f"uniform {on}": 0.5 + of_uniform}
            rows.append(row)
    return pd.DataFrame(rows)


def test_how_often_and_by_how_much_sub_pools_gain():
    error = 0.025 / NOISE
    table = pays(lines_of_sub_pools().assign(**{"noise test": error, "noise shifts": error}))
    assert len(table) == 32 and set(table["n"]) == {4}
    greedy, uniform = table.iloc[0], table.iloc[1]
    assert (greedy["kind"], greedy["on"], greedy["soup"], greedy["epochs"]) == ("12 models", "test", "greedy", 9.5)
    assert greedy["mean"] == pytest.approx(0.01) and uniform["mean"] == pytest.approx(-0.015)
    assert (greedy["better"], greedy["same"], greedy["worse"]) == (0.5, 0.25, 0.25)
    assert (greedy["beyond noise"], greedy["below noise"]) == (0.25, 0)
    assert (uniform["beyond noise"], uniform["below noise"]) == (0, 0.25)


def test_the_figure_of_sub_pools_has_its_numbers_beside_it(tmp_path, frame):
    lines_of_sub_pools().to_csv(tmp_path / "demo72_subpools.csv", index=False)
    with pytest.raises(UserError, match="python -m analysis predictions writes both"):
        write_pays(tmp_path, ["demo72", "demo72_fold1"])
    swapped = frame[frame["split"].isin(["held_out", "test"])]  # the tiny benchmark has one of the five shifts
    shifts = pd.concat([frame[frame["split"] == "v2"].assign(split=split) for split in SHIFTS])
    pd.concat([swapped, shifts]).to_csv(tmp_path / "demo72_predictions.csv", index=False)
    files = write_pays(tmp_path, ["demo72", "demo72_fold1"])
    assert [file.name for file in files] == ["subpools_gain.pdf", "subpools_gain.png", "subpools_gain.csv"]
    assert len(pd.read_csv(files[2])) == 32
    with pytest.raises(UserError, match="python -m analysis predictions writes both"):
        write_pays(tmp_path, ["another"])
