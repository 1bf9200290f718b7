"""Numbers of single examples: what a command writes of them, intervals and p of each decision, and --report."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import binomtest, permutation_test
from test_cli import ended

import soups
from soups.averaging import Averaging
from soups.candidates import Candidate
from soups.errors import UserError
from soups.scorers.metrics import of_classes
from soups.scorers.metrics import score as metric_of
from soups.scorers.outside import of_command, results_in
from soups.scoring import Scored, Scorer, gain_of, mean_of_answers
from soups.sources import pool_of
from soups.verify import verify
from tests.saved import record_in

# A model is a row of numbers, a logit for each of 400 examples; an example is right where its logit is above 0.
LOGITS = np.random.default_rng(0).normal(0.8, 1, 400) + np.random.default_rng(1).normal(0, 1.2, (4, 400))
EVAL = """import json, os, struct, sys, time
path, split = sys.argv[1], sys.argv[2]
with open("calls", "a") as file:
    print(split, os.path.basename(path), file=file)
time.sleep(float(os.environ.get("PAUSE", "0")))
logits = struct.unpack("<400f", open(path, "rb").read()[-1600:])
hits = [logit > 0 for logit in (logits[:200] if split == "held_out" else logits[200:])]
with open(path + ".jsonl", "w") as file:
    rows = [{"doc_id": i, "doc_hash": f"{split}{i}", "acc": float(hit), "f1": 0.5} for i, hit in enumerate(hits)]
    for row in reversed(rows) if sys.argv[3:] else map(int, hits):
        print(json.dumps(row | {"filter": "none", "metrics": ["acc", "f1"]} if sys.argv[3:] else row), file=file)
print(sum(hits) / len(hits))
"""
COMMAND = f"{sys.executable} -S eval.py {{soup}}"
HELD_OUT = ["--score", f"{COMMAND} held_out", "--goal", "max"]
REPORT = ["--report", f"{COMMAND} test"]


@pytest.fixture
def pool(tmp_path, monkeypatch):
    for i, logits in enumerate(LOGITS):
        save_file({"w": torch.tensor(logits, dtype=torch.float32)}, tmp_path / f"m{i}.safetensors")
    (tmp_path / "eval.py").write_text(EVAL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def greedy(*words, capsys, out="soup.safetensors"):
    status, printed, err = ended(["greedy", "m*.safetensors", *words, "--out", out, "--force"], capsys)
    return printed if status == 0 else err


def hits(weights, split=slice(200)):
    return (weights["w"][split] > 0).numpy()


def test_a_command_that_writes_its_examples_decides_as_the_function_does_and_leaves_no_file_beside_a_model(
    pool, capsys
):
    printed = greedy(*HELD_OUT, *REPORT, capsys=capsys)
    assert not list(pool.glob("*.jsonl"))
    report = soups.greedy("m*.safetensors", hits, "max", report=lambda w: hits(w, slice(200, 400)), quiet=True)
    assert str(report) == printed.rpartition("\nsoup.safetensors")[0]
    assert len(report.shares) > 1
    assert verify(pool / "soup.safetensors") == ""


def test_every_decision_has_its_interval_and_mcnemars_p_against_the_soup_so_far(pool):
    found = soups.greedy("m*.safetensors", hits, "max", quiet=True)
    kept, weights = [int(found.decisions[0].file[1])], torch.tensor(LOGITS, dtype=torch.float32)
    for each in found.decisions[1:]:
        number = int(each.file[1])
        before, after = (hits({"w": weights[rows].mean(0)}) for rows in (kept, [*kept, number]))
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        assert each.gain.mean == pytest.approx((gained - lost) / 200)
        assert each.gain.p == pytest.approx(binomtest(gained, gained + lost).pvalue)
        assert each.gain.z == pytest.approx((gained - lost) / (gained + lost) ** 0.5)
        half = 1.96 * np.std(after.astype(float) - before) / 200**0.5
        assert (each.gain.low, each.gain.high) == pytest.approx(
            (each.gain.mean - half, each.gain.mean + half), abs=0.01
        )
        assert each.gain.test == "McNemar"
        kept += [number] if each.accepted else []
    text = str(found)
    assert text.splitlines()[0].split() == ["file", "weight", "alone", "with", "it", "gain", "95", "%", "interval", "p"]
    assert f"{found.decisions[1].gain.p:.2g}  " in text.splitlines()[2]
    assert "p by McNemar's exact test" in text
    assert text.endswith("so this gain is optimistic: --report measures it on others")


@pytest.mark.parametrize("recipe", ["greedy", "random_order", "with_replacement"])
def test_no_model_enters_whose_gain_is_below_the_minimum_of_sigma(pool, recipe):
    def made(**settings):
        return getattr(soups, recipe)("m*.safetensors", hits, "max", quiet=True, **settings)

    plain = made()
    gains = [each.gain for each in plain.decisions if each.accepted and each.gain]
    least = min(gain.z for gain in gains)
    assert least > 0.01
    assert made(min_sigma=least - 0.001).shares == plain.shares
    strict = made(min_sigma=least + 0.001)
    assert all(each.gain.z > least for each in strict.decisions if each.accepted and each.gain)
    none = made(min_sigma=50)
    assert len(none.shares) == 1
    assert recipe == "random_order" or "which is less than --min-sigma asks for" in str(none)


def test_the_gain_on_other_examples_is_that_of_the_soup_over_the_model_that_was_best_on_the_held_out_ones(pool, capsys):
    printed = greedy(*HELD_OUT, *REPORT, capsys=capsys).splitlines()
    note = record_in("soup.safetensors")["note"]
    weights = torch.tensor(LOGITS, dtype=torch.float32)
    best = max(range(4), key=lambda i: hits({"w": weights[i]}).mean())
    chosen = [int(each["file"][1]) for each in note["decisions"] if each["accepted"]]
    ours, theirs = (hits({"w": each}, slice(200, 400)) for each in (weights[chosen].mean(0), weights[best]))
    assert note["report"]["score"] == ours.mean() and note["report"]["single"] == theirs.mean()
    assert note["report"]["gain"]["mean"] == pytest.approx(ours.mean() - theirs.mean())
    assert printed[-3] == "the same examples selected the soup, so this gain is optimistic"
    assert printed[-2].startswith(
        f"on --report, whose examples selected nothing (n = 200): score {ours.mean():.4f}, the best single model "
        f"{theirs.mean():.4f}; the soup gains {ours.mean() - theirs.mean():+.4f} ["
    )
    calls = [line.split()[0] for line in (pool / "calls").read_text().splitlines()]
    assert calls.count("test") == 2  # the soup and the best model
    alone = soups.random_order("m*.safetensors", hits, "max", report=lambda w: hits(w, slice(200, 400)), quiet=True)
    assert alone.report.gain is None and str(alone).splitlines()[-1].endswith(f"score {alone.report.score:.4f}")


def test_samples_as_the_harness_logs_them_are_put_in_order_and_their_metric_is_named(pool, capsys):
    plain = greedy(*HELD_OUT, capsys=capsys).replace("score 0.", "acc 0.")
    words = ["--score", f"{COMMAND} held_out samples", "--goal", "max"]
    assert "has acc,none, f1,none: name one of them by --metric NAME" in greedy(*words, capsys=capsys)
    assert greedy(*words, "--metric", "acc", capsys=capsys) == plain
    printed = greedy(*words, "--metric", "f1", capsys=capsys)
    assert "and the mean of the 200 numbers in m0.safetensors.jsonl is 0.5: print their mean" in printed
    rows = [
        {"doc_id": i, "filter": kind, "metrics": ["em"], "em": i + 0.5 * (kind == "b")} for kind in "ab" for i in (1, 0)
    ]
    Path("s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert results_in(Path("s.jsonl"), "em,b")[0] == [0.5, 1.5]
    with pytest.raises(UserError, match="has em,a, em,b: name one"):
        results_in(Path("s.jsonl"), "em")


@pytest.mark.parametrize(
    ("lines", "printed", "message"),
    [
        ("1\n0\n", "0.6", "the command printed 0.6, and the mean of the 2 numbers in m0.safetensors.jsonl is 0.5"),
        ("1\n0\n", "50", "the command printed 50, and the mean"),
        ("1\n2\n4\n", "2.333", ""),
        ("1\n2\n4\n", "2", "the command printed 2, and the mean of the 3 numbers in m0.safetensors.jsonl is 2.3333333"),
        ("1\nInfinity\n", "'inf'", ""),
        ("1\nhalf\n", "0.5", "m0.safetensors.jsonl: no JSON in a line"),
        ('"a"\n', "0.5", "need a line for each example: a number, or an object as lm_eval logs samples"),
        ("1\nNaN\n", "0.5", "the score of m0.safetensors is NaN"),
        ('{"metrics": ["acc"], "acc": null}', "1", "acc is None in a line, not a number"),
        ('{"acc": 1}\n{"acc": 0}', "0.5", 'has no "metrics": name one of them by --metric NAME'),
    ],
)
def test_what_a_command_writes_has_the_mean_that_it_prints(pool, capsys, lines, printed, message):
    code = f"import sys\nopen(sys.argv[1] + '.jsonl', 'w').write({lines!r})\nsys.stdout.buffer.write(b'\\xff\\n')\n"
    (pool / "eval.py").write_text(f"{code}print({printed})\n")
    found = greedy(*HELD_OUT, capsys=capsys)
    assert message in found and found.startswith("error: " if message else "file")
    assert not message or len(found.splitlines()) == 1
    assert not list(pool.glob("*.jsonl.jsonl")) and not list(pool.glob("m*.jsonl"))


def test_a_file_that_lay_there_before_is_not_read_as_the_commands(pool, capsys):
    (pool / "m0.safetensors.jsonl").write_text("1\n0\n")
    (pool / "eval.py").write_text("print(0.5)\n")
    assert "(no interval: " in greedy(*HELD_OUT, capsys=capsys)
    assert "--metric acc: the command did not write m0.safetensors.jsonl" in greedy(
        *HELD_OUT, "--metric", "acc", capsys=capsys
    )
    assert "--min-sigma needs a number for each example, and of m0" in greedy(
        *HELD_OUT, "--min-sigma", "1", capsys=capsys
    )
    assert (pool / "m0.safetensors.jsonl").read_text() == "1\n0\n"


def test_runs_at_once_over_the_same_models_read_each_the_numbers_of_its_own_command(pool):
    def measured(value):
        written = f"(echo {value}; echo {value}) > {{soup}}.jsonl; touch wrote{value}"
        wait = f"for i in $(seq 600); do [ -e wrote{1 - value} ] && break; sleep 0.1; done"
        scorer = of_command(f"{written}; {wait}; echo {value}", "max")
        return scorer.measure(Candidate(pool_of("m0.safetensors"), {0: 1}, Averaging())).answers.tolist()

    with ThreadPoolExecutor(2) as runs:
        assert list(runs.map(measured, (0, 1))) == [[0.0, 0.0], [1.0, 1.0]]


def test_models_with_other_examples_are_refused(pool, capsys):
    different = EVAL.replace("hits = [", "hits = [True] * (os.path.basename(path) == 'm2.safetensors') + [")
    (pool / "eval.py").write_text(different)
    printed = greedy(*HELD_OUT, capsys=capsys)
    assert "m2.safetensors has 201 numbers of single examples, and m0.safetensors has 200" in printed
    (pool / "eval.py").write_text(
        EVAL.replace("{split}{i}", "{split}{i * (os.path.basename(path) == 'm2.safetensors')}")
    )
    printed = greedy("--score", f"{COMMAND} held_out samples", "--goal", "max", "--metric", "acc", capsys=capsys)
    assert "m2.safetensors was scored on other examples than m0.safetensors" in printed


def test_a_journal_keeps_the_numbers_of_single_examples(pool, capsys):
    words = [*HELD_OUT, *REPORT, "--min-sigma", "0.5", "--journal", "scores.jsonl"]
    printed, whole = greedy(*words, capsys=capsys), (pool / "soup.safetensors").read_bytes()
    (pool / "calls").write_text("")
    assert greedy(*words, capsys=capsys) == printed and (pool / "soup.safetensors").read_bytes() == whole
    assert "held_out" not in (pool / "calls").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report", HELD_OUT[1]], "--report is the data that the soup is selected on: name others"),
        (["--report", "python eval.py"], "write {soup} where the file to be scored stands"),
        (["--min-sigma", "-1"], "--min-sigma is a number of standard deviations, at least 0; got -1.0"),
        (["--min-sigma", "1", "--scores", "known.json"], "which --scores does not have: leave out one"),
    ],
)
def test_a_report_or_a_sigma_without_meaning_is_refused_before_any_work(pool, capsys, words, message):
    assert message in greedy(*HELD_OUT, *words, capsys=capsys)
    assert not (pool / "calls").exists()


def test_one_function_made_for_several_sets_of_examples_is_a_score_of_each(pool):
    def on(split):
        return lambda weights: hits(weights, split)

    first, second = slice(200), slice(200, 400)
    expected = soups.greedy("m*.safetensors", hits, "max", report=lambda w: hits(w, second), quiet=True)
    for score, report in ((on(first), on(second)), (partial(hits, split=first), partial(hits, split=second))):
        assert str(soups.greedy("m*.safetensors", score, "max", report=report, quiet=True)) == str(expected)
    with pytest.raises(UserError, match="--report is the data that the soup is selected on"):
        soups.greedy("m*.safetensors", hits, "max", report=hits, quiet=True)
    few, all_of_them = (soups.greedy("m*.safetensors", on(slice(n)), "max", journal="j", quiet=True) for n in (9, 400))
    assert (few.n, all_of_them.n) == (9, 400)  # a journal does not take one for the other


def test_a_report_of_another_kind_is_refused(pool, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    scorer = Scorer(lambda candidate: Scored(0.5), "max", "acc", "of others")
    with pytest.raises(UserError, match="--report is of acc, and the score that selects of score"):
        soups.greedy("m*.safetensors", hits, "max", report=scorer, quiet=True)


def test_numbers_that_are_no_hits_have_the_p_of_scipys_permutation_test():
    generator = np.random.default_rng(3)
    one, other = generator.normal(0, 1, 60), generator.normal(0.3, 1, 60)
    gain = gain_of(
        Scorer(None, "min", "loss", "", mean_of_answers), Scored(one.mean(), one), Scored(other.mean(), other)
    )
    theirs = permutation_test(
        (other, one),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        rng=0,
    )
    assert gain.mean == pytest.approx(other.mean() - one.mean())
    assert (gain.p, gain.test) == (pytest.approx(theirs.pvalue, abs=0.015), "permutation")
    assert gain.z == pytest.approx(gain.mean / theirs.null_distribution.std(), rel=0.03)


def test_a_metric_that_is_no_mean_is_permuted_and_resampled_whole():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (150,), generator=generator)
    ours, theirs = (torch.where(torch.rand(150, generator=generator) < p, labels, 0) for p in (0.75, 0.6))
    f1, top1 = (of_classes(name, None, labels, "") for name in ("macro_f1", "top1"))

    def answered(name, found):
        return Scored(metric_of(name, found, labels), (found == labels if name == "top1" else found).numpy())

    gains = [
        gain_of(each, *(answered(each.metric, predictions) for predictions in (ours, theirs))) for each in (f1, top1)
    ]
    assert gains[0].low < gains[0].mean < gains[0].high
    assert gains[0].p == pytest.approx(gains[1].p, abs=0.03) and gains[0].z == pytest.approx(gains[1].z, abs=0.7)
    assert [gain.test for gain in gains] == ["permutation", "McNemar"]
