"""The six claims: their bootstrap beside a second one and closed forms, and the page that came before the models."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.claims import (
    CLAIMS,
    METHODS,
    POOLS,
    SHIFTS,
    UNSEEN,
    Claim,
    Estimate,
    answer,
    answers,
    estimated,
    gains,
    read_pools,
    resampled,
    table,
    write_claims,
)
from configs.errors import UserError
from configs.schema import load
from soups.errors import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "results/measured"


def made_up(seed, classes=30):
    """A table of predictions: every method is right by chance, each with a rate of its own."""
    generator, frames = np.random.default_rng(seed), []
    for selects, reports in (UNSEEN, UNSEEN[::-1]):
        for split in (reports, *SHIFTS):
            labels = np.sort(generator.integers(classes, size=classes if split == reports else 40))
            frame = pd.DataFrame({"selects": selects, "split": split, "image": range(len(labels)), "class": labels})
            for place, method in enumerate(METHODS):
                frame[method] = (generator.random(len(labels)) < 0.4 + 0.05 * place).astype(int)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def pools():
    return {name: made_up(seed) for seed, name in enumerate(POOLS[:3])}


def by_hand(claim, pools, resamples=10_000, seed=0):
    """docs/claims.md once more, image by image, with nothing of the module: (difference, low, high, p)."""
    shifts = ["v2", "r", "sketch", "objectnet", "a"]
    reported = [("held_out", "test"), ("test", "held_out")]
    if claim.on == "shifts":
        reported = [(selects, split) for selects in ("held_out", "test") for split in shifts]

    def part(pool, selects, split):
        return pool[(pool["selects"] == selects) & (pool["split"] == split)]

    def differences(pool, times):  # times: (R, classes), how often each class is drawn
        found = []
        for selects, split in reported:
            images = part(pool, selects, split)
            drawn = times[:, images["class"].to_numpy()]
            right = images[claim.method].to_numpy() - images[claim.baseline].to_numpy()
            found.append((drawn * right).sum(axis=1) / drawn.sum(axis=1))
        return sum(found) / len(found)

    tables = list(pools.values())
    known = [np.unique(np.concatenate([part(pool, *each)["class"] for each in reported])) for pool in tables]
    generator = np.random.Generator(np.random.PCG64(seed))
    draws = np.zeros(resamples)
    for _ in tables:
        which = generator.integers(len(tables), size=resamples)
        for number, (pool, classes) in enumerate(zip(tables, known, strict=True)):
            mine = np.flatnonzero(which == number)
            times = np.zeros((len(mine), pool["class"].max() + 1))
            times[:, classes] = generator.multinomial(len(classes), [1 / len(classes)] * len(classes), len(mine))
            for block in np.array_split(np.arange(len(mine)), 20):  # little memory
                draws[mine[block]] += differences(pool, times[block]) / len(tables)
    mean = np.mean([differences(pool, np.ones((1, pool["class"].max() + 1))) for pool in tables])
    low, high = np.percentile(draws, [2.5, 97.5])
    if claim.margin is None:
        p = 2 * (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / (resamples + 1)
    else:
        p = (1 + max((draws >= claim.margin).sum(), (draws <= -claim.margin).sum())) / (resamples + 1)
    return mean, low, high, min(1, p)


def printed(row):
    return [f"{100 * row[name]:+.2f}" for name in ("difference", "low", "high")], f"{row['p']:.4f}"


def agrees(rows, pools):
    for claim, (_, row) in zip(CLAIMS, rows.iterrows(), strict=True):
        mean, low, high, p = by_hand(claim, pools)
        assert (row["claim"], row["pools"]) == (claim.number, len(pools))
        assert printed(row) == ([f"{100 * value:+.2f}" for value in (mean, low, high)], f"{p:.4f}")


@pytest.mark.slow
def test_a_second_computation_agrees_to_the_last_printed_digit(pools):
    agrees(answers(pools), pools)


@pytest.mark.slow
def test_the_committed_answers_are_those_of_a_second_computation_from_the_committed_predictions():
    agrees(pd.read_csv(MEASURED / "claims.csv"), read_pools(MEASURED, POOLS))


@pytest.mark.slow
def test_the_committed_table_is_what_the_command_writes(tmp_path):
    for file in MEASURED.glob("*_predictions.csv"):
        (tmp_path / file.name).symlink_to(file)
    for file in write_claims(tmp_path):
        same = file.read_bytes() == (MEASURED / file.name).read_bytes()
        assert same or file.suffix in (".pdf", ".png"), file.name  # whose bytes other libraries change


def test_the_claims_are_those_of_the_page_that_came_before_the_models():
    page = (ROOT / "docs/claims.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.+?) − (.+?) \| (.+?) \| .+? \| (.+?) \|$", page, re.MULTILINE)
    words = {
        "greedy": "greedy soup",
        "best": "best single model",
        "uniform": "uniform soup",
        "ensemble": "ensemble",
        "learned_by_tensor": "soup learned by tensor",
    }
    on = {"test": "test", "shifts": "mean of the five shifts"}
    assert rows == [
        (
            str(claim.number),
            words[claim.method],
            words[claim.baseline],
            on[claim.on],
            "above 0" if claim.margin is None else "between −1 and 1 point",
        )
        for claim in CLAIMS
    ]
    assert "10,000 resamples" in page and "2.8 bootstrap standard errors" in page and "Holm" in page


def test_the_pools_are_those_of_experiment_evidence_and_the_shifts_are_the_benchmarks():
    assert load("evidence").parts == POOLS
    for fold, name in enumerate(POOLS):
        config = load(name)
        assert (config.task.fold, config.sweep.seed, config.sweep.size) == (fold, fold, 71)
        assert config.task.shifts == SHIFTS and (config.task.held_out, config.task.test) == UNSEEN
        assert config.model.probe_c == (1.0,) and set(METHODS) == set(config.recipes)


def test_of_one_pool_the_error_is_that_of_a_mean_over_classes():
    generator = np.random.default_rng(1)
    gain = generator.normal(0.02, 0.3, 400)
    found = np.stack([gain, np.ones(400)])[None, None]
    mean, draws = resampled([found], 20_000, seed=3)
    assert mean == pytest.approx(gain.mean())
    assert draws.std() == pytest.approx(gain.std() / 20, rel=0.03) and draws.mean() == pytest.approx(mean, abs=0.001)


def test_of_pools_without_noise_the_error_is_that_of_a_mean_over_pools():
    values = np.array([0.0, 0.01, 0.05])
    found = [np.stack([np.full(50, value), np.ones(50)])[None, None] for value in values]
    mean, draws = resampled(found, 20_000, seed=3)
    assert mean == pytest.approx(0.02) and draws.std() == pytest.approx(values.std() / np.sqrt(3), rel=0.02)
    assert draws.min() == pytest.approx(0) and draws.max() == pytest.approx(0.05)


def test_gains_are_summed_by_class_where_the_other_split_selected(pools):
    pool = pools["demo72"]
    found = gains(pool, "greedy", "best", "test")
    assert found.shape[:3] == (2, 1, 2)
    part = pool[(pool["selects"] == "test") & (pool["split"] == "held_out")]
    assert found[1, 0, 1].sum() == len(part) and found[1, 0, 0].sum() == (part["greedy"] - part["best"]).sum()
    assert gains(pool, "greedy", "best", "shifts").shape[:2] == (2, 5)


ABOVE, WITHIN = Claim(1, "greedy", "best", "test", ""), Claim(6, "greedy", "best", "test", "", margin=0.01)


def estimate(mean, low, high):
    return Estimate(mean, low, high, error=0.01, p=0.5, per_pool=())


@pytest.mark.parametrize(
    ("claim", "found", "p", "expected"),
    [
        (ABOVE, estimate(0.02, 0.01, 0.03), 0.01, "yes"),
        (ABOVE, estimate(-0.02, -0.03, -0.01), 0.01, "no"),
        (ABOVE, estimate(0.02, 0.001, 0.03), 0.06, "cannot tell (smallest visible 2.8)"),
        (WITHIN, estimate(0.004, 0.001, 0.008), 0.01, "yes"),
        (WITHIN, estimate(0.03, 0.011, 0.05), 1.0, "no"),
        (WITHIN, estimate(0.008, -0.001, 0.02), 0.3, "cannot tell (smallest visible 2.8)"),
    ],
)
def test_an_answer_is_yes_no_or_cannot_tell(claim, found, p, expected):
    assert answer(claim, found, p) == expected


def test_a_soup_within_the_margin_is_equivalent_and_one_beyond_is_not():
    near, far = (
        {"a": made_up(0).assign(greedy=1, learned_by_tensor=value)} for value in (1, 0)
    )  # equal everywhere; worse everywhere
    assert estimated(CLAIMS[5], near).p == pytest.approx(1 / 10_001) and estimated(CLAIMS[5], far).p == 1


def test_with_fewer_pools_the_table_says_interim_and_none_is_refused(tmp_path, capsys):
    made_up(0).to_csv(tmp_path / "demo72_predictions.csv", index=False)
    markdown = write_claims(tmp_path)[0].read_text()
    assert (
        "Interim: 1 of 5 pools so far." in markdown
        and "Answer (interim)" in markdown
        and "a proxy for ImageNet" in markdown
    )
    assert len(table(answers({"demo72": made_up(0)}))) == 6
    with pytest.raises(UserError, match=r"no <pool>_predictions.csv .*reproduce.py experiment=demo72"):
        write_claims(tmp_path / "none")
    with pytest.raises(SystemExit):
        one_line_errors(lambda: write_claims(tmp_path / "none"))
    assert "analysis predictions" in capsys.readouterr().err


def test_no_published_record_names_a_folder_of_the_machine_that_made_it():
    records = list(MEASURED.glob("*.json"))
    assert len(records) > 20 and [file.name for file in records if '": "/' in file.read_text()] == []
