"""Rows of a sweep are keyed: the same for ever, whatever is added beside them."""

import io
import re
from dataclasses import field, fields, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic_core import PydanticUndefined
from rich.console import Console

from analysis.measure.methods import measure
from analysis.page.files import read_results
from analysis.tables.named_rows import variants
from configs.data import KINDS
from configs.errors import UserError
from configs.schema import dump, load
from configs.training import (
    Augment,
    Choice,
    Distill,
    Integers,
    LogUniform,
    Model,
    Optim,
    Regularizer,
    Sam,
    Swa,
    Sweep,
    ZeroOrUniform,
    closed,
)
from eval.forward import Evaluator
from eval.pool import model_folders
from finetune.rows import cell, differing, print_rows
from finetune.start import other_head, refuse_other_data
from finetune.sweep import train_sweep
from finetune.train import train_row
from slurm.jobs import jobs_of
from slurm.status import pace
from soups.chance import seed, uniform
from soups.experiment.pool import usable_pool
from soups.experiment.soups import make_soup
from soups.files.atomic import digest_of, read_json, write_json
from soups.files.weights import load_weights, save_weights
from store.rows import draw, identity, inverse, meaning, require_trainable, row_config
from store.runs import RunFolder, read_pool
from tasks.load import load_split
from tests.commands import here
from tests.experiments import TYPED
from tests.pools import finished_pool, recorded_pool


def test_the_keyed_numbers_are_the_ones_of_every_earlier_run():
    # blake2b-64 of "0/17/optim.lr", its top 53 bits over 2**53.
    assert uniform(0, 17, "optim.lr") == 0.6014784406838153
    assert seed(0, 17, "run") == 7219473067861316596


def test_keyed_numbers_are_uniform_and_independent_of_their_neighbours():
    grid = np.array([[uniform(s, row, "field") for row in range(200)] for s in range(20)])
    assert abs(grid.mean() - 0.5) < 0.02
    assert abs(grid.std() - 12**-0.5) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.05


def test_each_distribution_is_the_inverse_of_its_definition():
    assert inverse(LogUniform(kind="log10_uniform", low=-6, high=-4), 0.5) == pytest.approx(1e-5)
    half = ZeroOrUniform(kind="zero_or_uniform", zero=0.5, low=0.2, high=0.4)
    assert [inverse(half, u) for u in (0.0, 0.49, 0.5, 0.75)] == [0, 0, 0.2, pytest.approx(0.3)]
    assert [inverse(Integers(kind="integers", low=4, high=7), u) for u in (0, 0.25, 0.5, 0.99)] == [4, 5, 6, 7]
    weighted = Choice(kind="choice", values=("minimal", "rand", "rand"))
    assert [inverse(weighted, u) for u in (0.3, 0.34, 0.99)] == ["minimal", "rand", "rand"]


def test_adding_a_field_or_a_row_moves_no_other_draw():
    config = load("demo")
    added = {"model": {"frozen_stages": Integers(kind="integers", low=1, high=2)}}
    more = replace(config.sweep, rows=100, draw=added | config.sweep.draw)
    grown = replace(config, sweep=more)
    for row in (1, 2, 12):
        old, new = draw(config, row), draw(grown, row)
        assert {field: new[field] for field in old} == old


def test_each_field_of_a_row_has_a_draw_of_its_own():
    config = load("demo")
    law = config.sweep.draw["optim"]["lr"]
    alike = replace(config.sweep, draw={"optim": {"lr": law, "weight_decay": law}})
    both = draw(replace(config, sweep=alike), 1)
    assert both["optim.lr"] == draw(config, 1)["optim.lr"] != both["optim.weight_decay"]


def test_a_grid_has_a_row_for_every_combination_with_each_line_of_a_list():
    listed = ({"optim": {"lr": 1e-3}}, {"optim": {"lr": 1e-2}})
    sweep = Sweep(listed=listed, grid={"optim": {"mixup": (0.0, 0.5), "seed": (0, 1, 2)}})
    assert sweep.size == 12
    rows = [draw(replace(load("demo"), sweep=sweep), row) for row in range(1, 13)]
    assert [(row["optim.lr"], row["optim.mixup"], row["optim.seed"]) for row in rows] == list(
        product((1e-3, 1e-2), (0.0, 0.5), (0, 1, 2))
    )


def test_rows_and_seeds_differ_within_the_sweeps_bounds_and_row_0_is_the_initialisation():
    config = load("demo", "sweep.rows=40")
    other, law = replace(config, sweep=replace(config.sweep, seed=1)), config.sweep.draw["optim"]["lr"]
    assert draw(config, 0) == {} and draw(config, 1) != draw(other, 1)
    rates = [row_config(config, row).optim.lr for row in range(1, 41)]
    assert rates == [draw(config, row)["optim.lr"] for row in range(1, 41)] and len(set(rates)) == 40
    assert all(10**law.low <= rate < 10**law.high for rate in rates)


def test_a_row_is_identified_by_what_changes_its_weights_and_by_nothing_else():
    config = load("demo")
    assert identity(config, 3) == identity(load("demo", "sweep.rows=40", "cluster.workers=1", "recipes=[best]"), 3)
    assert identity(config, 3) != identity(config, 4)
    assert identity(config, 3) != identity(load("demo", "optim.clip_norm=2"), 3)
    assert identity(config, 0) == identity(load("demo", "optim.clip_norm=2"), 0)
    assert identity(config, 3) != identity(load("demo", "sweep.seed=5"), 3)
    alike = load("demo_seeds_only")  # rows that differ by their random stream alone
    assert identity(alike, 3) != identity(replace(alike, sweep=replace(alike.sweep, seed=5)), 3)
    assert identity(config, 3) == identity(load("demo", "task.shifts=[v2]", "+task.metrics.test=macro_f1"), 3)
    assert identity(config, 3) != identity(load("demo", "+task.metrics.held_out=macro_f1"), 3)  # recipes sort by it
    assert identity(config, 3) != identity(load("demo", "task.held_out=v2", "task.shifts=[r]"), 3)
    texts = load("demo_text")
    assert identity(texts, 3) == identity(load("demo_text", "task.take.nyt=50", "task.take.test=90"), 3)
    assert identity(texts, 3) != identity(load("demo_text", "task.take.train=1500"), 3)


def test_where_things_lie_is_no_setting_of_a_row():
    moved = {
        "table3_clip_b32": ("task.folder=/scratch/imagenet",),
        "released": ("sweep.imported=/scratch/released", "compute.decoded=/scratch/decoded"),
        "tablej1_bert_base_rte": ("task.folder=/scratch/glue", "paths.runs=/scratch"),
        "own_text": ("task.folder=/scratch/texts", "task.label=label"),
    }
    for name, places in moved.items():
        config, elsewhere = load(name, *TYPED.get(name, ())), load(name, *TYPED.get(name, ()), *places)
        for row in (0, 1):
            assert identity(config, row) == identity(elsewhere, row), name
    listed = load("released", "task.held_out_index=/a/imagenet_98_idxs.npy")
    assert identity(listed, 1) == identity(load("released", "task.held_out_index=/b/imagenet_98_idxs.npy"), 1)
    assert identity(listed, 1) != identity(load("released", "task.held_out_index=/a/other.npy"), 1)
    local = load("table3_clip_b32", "model.weights=/a/clip.safetensors")
    assert identity(local, 1) == identity(load("table3_clip_b32", "model.weights=/b/clip.safetensors"), 1)
    for other in (("model.weights=/a/other.safetensors",), ()):  # other weights to start from
        assert identity(local, 0) != identity(load("table3_clip_b32", *other), 0)


def grown(kind, default=7, **nested):
    """A kind of settings with one setting more, and with other kinds in some of its own."""
    types = {"added": Any} | {name: each | None for name, each in nested.items()}
    body = {"__annotations__": types, "added": default} | dict.fromkeys(nested)
    return closed(type(f"Grown{kind.__name__}", (kind,), body))


@closed
class GrownAugment(Augment):
    among: tuple["GrownAugment", ...] = ()
    added: float = 0.5


GROWN = {"model": grown(Model, None), "optim": grown(Optim, field(default_factory=dict)), "augment": GrownAugment}
GROWN["regularizer"] = grown(Regularizer, (1,), swa=grown(Swa), sam=grown(Sam, False), distill=grown(Distill))


@pytest.mark.parametrize(
    ("name", "row"), [("demo", 1), ("demo_text", 2), ("figurel1_clip", 1), ("tablel1_distill", 7), ("tablel3_sam", 3)]
)
def test_a_setting_that_is_added_with_a_default_makes_no_finished_row_foreign(name, row):
    config = load(name)
    own, before = row_config(config, row), identity(config, row)
    kinds = {"task": grown(type(own.task))} | GROWN
    values = {
        group: {each.name: dump(own)[group][each.name] for each in fields(getattr(own, group))} for group in kinds
    }
    more = {group: kind(**values[group]) for group, kind in kinds.items()}
    more |= {"sweep": own.sweep, "compute": own.compute}
    assert digest_of(meaning(SimpleNamespace(**more))) == before
    set_otherwise = more | {"optim": GROWN["optim"](**values["optim"], added={"x": 1})}
    assert digest_of(meaning(SimpleNamespace(**set_otherwise))) != before


PINNED = {  # of rows as they have been named from the first version on that leaves defaults out
    "demo": {0: "d24ca8672b446da2d7eb4cc09aade444", 1: "f72bec7bc3e1418528fa621b6e92fe45"},
    "demo_tiny": {2: "3547064269e42874cbd095e74e63e652"},
    "demo_text": {0: "d382769b69c9fc8a12d3e59e5f0b39f4", 1: "1a45f429ad1e849c65bcf919c8cc2097"},
    "demo_ema_swa": {2: "3a0ba4e4fae750bc7f83fb54a87091b1"},
    "demo_cross_dataset": {3: "fdc2fe37f7a013e1dda6936fcd6ecfe4"},
    "table3_clip_b32": {0: "fe2ac32b517d1ee73edc013fea7f1e2e", 1: "259858b493112615bebc48a4b2c7a14a"},
    "released": {0: "739a453a9109719a5f99f366820629bc", 1: "5985a44df20c405894fe4c1d139ecbee"},
    "figurel1_clip": {3: "de9ba4c68d8b1402670cf7cf12155099"},
    "tablel1_distill": {7: "177668e21664ac5271a598036edd2db2"},
    "table4_vitg": {57: "a58c92d868d519e39bb898d02519252f"},
    "tablej1_bert_base_rte": {1: "5fffd71a96b4157c76c5260b6d6422c5"},
    "figureg1_fmow": {1: "f24ef174a44dd5f9cc4d7d8fb86d4c30"},
    "own_images": {1: "b8b8b472d2f4bcea5b66c6ccab2f2fb6"},
}


@pytest.mark.parametrize("name", PINNED)
def test_rows_keep_their_names(name):
    """A change here makes finished rows foreign, or takes rows that mean something else for these."""
    config = load(name, *TYPED.get(name, ()))
    assert {row: identity(config, row) for row in PINNED[name]} == PINNED[name]


DEFAULTS = {  # those of settings that rows depend on
    "Task": {"folders": {}, "counts": None, "names": "folder", "label": "label", "asked": (), "take": None}
    | {"subsets": {}, "numbered": (), "objectnet": None, "objectnet_border": False, "annotations": {}}
    | {"held_out_per_class": None, "held_out_share": None, "held_out_index": None, "protocol": "apart"}
    | {"overlap_allowed": 0, "metrics": {}, "title": None, "titles": {}, "proxy_for": None}
    | {"bootstrap_unit": "image", "classes": None, "parts": 1, "part": 0},
    "Model": {"name": None, "pretrained": None, "weights": None, "proxy_for": None, "max_length": 128}
    | {"eval_size": None, "eval_resize": None, "squash": False, "templates": None, "train_head": True}
    | {"frozen_stages": 0, "frozen_batch_norm": True},
    "Optim": {"kind": "adamw", "decay": "weights", "momentum": 0.9, "schedule": "cosine", "cycles": 1, "steps": None}
    | {"loss": "softmax", "cutmix": 0.0, "seed": None, "evaluate_every": 0, "keep": "last"},
    "Augment": {"crop": None, "aspect": 0.75, "flip": 0.5, "color_jitter": 0.0, "magnitude": 0, "layers": 0}
    | {"magnitude_max": 10, "increasing": True, "fill": "white", "last_epochs_minimal": 0, "among": ()},
    "Regularizer": {"ema": (), "ema_ramp": False, "swa": None, "sam": None, "distill": None, "ingredient": "raw"},
    "Distill": {"temperature": 1.0, "weight": 1.0},
}


def now(kind):
    return {name: at.get_default(call_default_factory=True) for name, at in kind.__pydantic_fields__.items()}


def test_defaults_which_identities_leave_out_never_change():
    """Where another default is better, yaml files have it: a row that leaves one out must always mean the same."""
    for kind in (Model, Optim, Augment, Regularizer, Distill):
        assert {name: now(kind)[name] for name in DEFAULTS[kind.__name__]} == DEFAULTS[kind.__name__]
    for kind in KINDS.values():
        known = {name: value for name, value in DEFAULTS["Task"].items() if name in now(kind)}
        assert {name: now(kind)[name] for name in known} == known
    assert DEFAULTS["Task"].keys() <= {name for kind in KINDS.values() for name in now(kind)}
    needed = {name for kind in KINDS.values() for name, value in now(kind).items() if value is PydanticUndefined}
    roles = {"train", "held_out", "test", "shifts"}
    assert needed == {"kind", "folder", "num_classes", *roles, "subset", "template", "options"}  # always in an identity


def test_data_that_moved_are_the_same_and_other_data_under_the_same_name_are_refused(tmp_path):
    for place, words in (("one", "text"), ("moved", "text"), ("other", "word")):
        for split in ("train", "held_out", "test"):
            lines = ["text\tlabel", *(f"{split} {words} {i}\t{i % 2}" for i in range(4))]
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    one, moved, other = (
        load("own_text", f"task.folder={tmp_path / place}", *TYPED["own_text"][1:], f"paths.runs={tmp_path / 'runs'}")
        for place in ("one", "moved", "other")
    )
    write_json(RunFolder.of(one).ingredient(0) / "config.json", dump(one))
    done = {"data": {split: load_split(one.task, split).digest for split in ("train", "held_out")}}
    for same in (one, moved):
        refuse_other_data(same, done)
    with pytest.raises(UserError, match=r"made from other examples than those of task\.folder=.*other.*name=demo_mine"):
        refuse_other_data(other, done)


def test_every_reader_refuses_rows_that_were_made_with_other_settings(tmp_path):
    words = [f"paths.runs={tmp_path}", "sweep.rows=2", "cluster=slurm_cpu"]
    recorded_pool(load("demo", *words))
    other = load("demo", *words, "optim.clip_norm=9")
    readers = {
        "pool": read_pool,
        "evaluation": model_folders,
        "recipes": usable_pool,
        "a recipe": lambda config: make_soup("uniform", Evaluator(config)),
        "tables": lambda config: measure(Evaluator(config)),
        "a table of rows": variants,
        "the page": lambda config: read_results(config).done,
        "plan": lambda config: jobs_of(config, []),
        "pace": pace,
    }
    for name, read in readers.items():
        with pytest.raises(UserError, match="made with other settings"):
            read(other)
            pytest.fail(name)


def test_the_list_of_rows_has_the_settings_that_differ_and_no_others():
    names, values = differing(load("demo_sam"))
    assert names == ["optim.seed", "regularizer.sam"]
    sam = {"rho": 0.05, "synchronised": True}
    assert values == [[0, None], [1, None], [0, sam], [1, sam]]
    assert [cell(value) for value in (0, 0.0, None, False, sam)] == ["0", "0", "", "", "rho 0.05, synchronised"]


def test_the_list_of_rows_is_not_cut_in_a_log_starts_with_the_initialisation_and_says_what_to_run_next(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    answer = here(["-m", "finetune.rows", "experiment=demo", "optim.clip_norm=2"])
    assert answer.returncode == 0, answer.stderr
    assert "python -m finetune experiment=demo optim.clip_norm=2 sweep.index=1" in answer.stdout
    lines = [line.split() for line in answer.stdout.splitlines()]
    head, *rows = [words for words in lines if words and (words[0] == "row" or words[0].isdigit())]
    assert head[1:] == differing(load("demo"))[0]
    assert rows[0] == ["0", "initialisation"]
    assert [row[0] for row in rows] == [str(number) for number in range(13)]
    assert rows[3][1] == f"{draw(load('demo'), 3)['optim.lr']:.4g}"


def test_rows_of_each_replicate_are_listed():
    log = io.StringIO()
    print_rows(load("demo_seeds"), "experiment=demo_seeds", Console(file=log))
    assert all(f"demo_seeds/seed{number}" in log.getvalue() for number in range(3))


def searched(runs, scores):
    """A finished search of three rows in `runs`, with their held-out scores; of None the row diverged."""
    search = load("figureg3_in22k", "sweep.rows=3", f"paths.runs={runs}")
    for row, score in enumerate((0.9, *scores)):
        folder = RunFolder.of(search).ingredient(row)
        write_json(folder / "config.json", dump(row_config(search, row)))
        held_out = {"correct": int(100 * (score or 0)), "n": 100}
        write_json(folder / "done.json", {"status": "diverged" if score is None else "done", "held_out": held_out})
    return search


def test_seeds_take_the_settings_of_the_best_row_of_the_search(tmp_path):
    config = load("figureg4_in22k", f"paths.runs={tmp_path}")
    before = [identity(config, row) for row in range(3)]
    assert row_config(config, 1).optim.epochs == 11  # stands for them in plans
    with pytest.raises(UserError, match=r"row 0 of .*figureg3_in22k is not finished.*experiment=figureg3_in22k first"):
        require_trainable(config)
    search = searched(tmp_path, (0.5, 0.7, 0.7))
    best = row_config(search, 2)
    require_trainable(config)
    for row in (1, 5):
        own = row_config(config, row)
        assert own.augment == best.augment
        assert own.optim == replace(best.optim, seed=row - 1)
    assert identity(config, 0) == before[0]  # the initialisation is the same
    assert identity(config, 1) != before[1]
    with pytest.raises(UserError, match=r"optim.lr is that of the best row .*sweep.best_of=null"):
        load("figureg4_in22k", "optim.lr=1e-5")
    assert load("figureg4_in22k", "optim.lr=1e-5", "sweep.best_of=null").optim.lr == 1e-5


def test_a_search_that_ended_badly_or_not_at_all_has_no_best_row(tmp_path):
    config = load("figureg4_in22k", f"paths.runs={tmp_path}")
    search = searched(tmp_path, (None, None, None))
    with pytest.raises(UserError, match=r"every row of .*figureg3_in22k diverged"):
        require_trainable(config)
    (RunFolder.of(search).ingredient(3) / "done.json").unlink()
    with pytest.raises(UserError, match=r"row 3 of .* is not finished"):
        require_trainable(config)


def test_an_experiment_of_other_experiments_rows_trains_nothing():
    for train in (train_sweep, lambda config: train_row(config, 0)):
        with pytest.raises(UserError, match="figuree1_soups trains nothing"):
            train(load("figuree1_soups"))


@pytest.mark.slow
def test_a_row_may_start_with_the_head_of_another_run(tmp_path):
    listed = ("sweep=cross_dataset", "~sweep.draw", "sweep.rows=null", "sweep.listed=[{model: {head_of: other}}, {}]")
    other, _ = finished_pool(tmp_path, "sweep.rows=1", "name=other", small=False)
    config, _ = finished_pool(tmp_path, *listed, small=False)
    folder = RunFolder.of(other).ingredient(0)
    weights = load_weights(folder / "weights.safetensors", read_json(folder / "done.json")["digest"])
    weights["head.bias"] = weights["head.bias"] + 1
    digest = save_weights(folder / "weights.safetensors", weights)
    write_json(folder / "done.json", read_json(folder / "done.json") | {"digest": digest})
    head = other_head(config, row_config(config, 1), 1)
    assert set(head) == {"head.weight", "head.bias"}
    assert torch.equal(head["head.bias"], weights["head.bias"])
    assert other_head(config, row_config(config, 2), 2) == {}
    require_trainable(config)
    (folder / "done.json").unlink()
    with pytest.raises(UserError, match=r"model\.head_of=other: .*other/ingredients/000 holds no finished row 0"):
        require_trainable(config)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("optm.lr", "the sweep varies optm.lr, but rows can differ in task, model, optim, augment, regularizer only"),
        ("optim.learning_rate", "optim.learning_rate: there is no such setting"),
        ("optim.lr.x", "optim.lr.x: there is no such setting; near is optim.lr"),
        ("task.clases", "task.clases: there is no such setting; near is task.classes"),
        ("optim.lr", "optim.lr: Input should be greater than 0, got '-1'"),
    ],
)
def test_what_is_no_setting_or_outside_its_limits_is_refused(tmp_path, column, words):
    (tmp_path / "rows.csv").write_text(f"{column}\n-1\n")
    config = load("demo", "~sweep.draw", f"sweep.file={tmp_path / 'rows.csv'}", "sweep.rows=1")
    with pytest.raises(UserError, match=re.escape(words)):
        row_config(config, 1)


def test_row_0_is_probed_by_the_loss_that_is_set(tmp_path, monkeypatch):
    class EnoughError(Exception):
        """The probe was asked for."""

    def asked(*args, loss, **more):
        raise EnoughError(loss)

    monkeypatch.setattr("finetune.start.linear_probe", asked)
    config = load("demo_tiny", f"paths.runs={tmp_path}", "task.classes=5", "model.probe_loss=bce")
    with pytest.raises(EnoughError, match="bce"):
        train_row(config, 0)
    with pytest.raises(UserError, match=r"probe_loss"):
        load("demo_tiny", "model.probe_loss=bce", "model.head=zero_shot")


def test_the_optional_probes_of_vit_g_are_of_its_58_rows_and_named_where_they_come_from():
    plain, probed = (load("table4_vitg", f"sweep={name}") for name in ("vit_g", "vit_g_probes"))
    assert plain.sweep.size == probed.sweep.size == 58
    rows = [row_config(probed, row) for row in range(1, 59)]
    heads = [row.model.head_of for row in rows]
    assert {head: heads.count(head) for head in set(heads)} == {None: 42, "table4_vitg_bce": 8, "table4_vitg_224": 8}
    assert all((row.optim.loss == "bce") == (row.model.head_of == "table4_vitg_bce") for row in rows)
    assert [row.optim for row in rows] == [row_config(plain, row).optim for row in range(1, 59)]
