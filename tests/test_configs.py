"""Every experiment file composes; wrong settings die with the field's name."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import fields
from functools import cache

import open_clip
import pytest
import timm
from hydra import compose, initialize_config_dir
from torch import nn

from configs.errors import UserError
from configs.schema import CONFIGS, Task, dump, load, parse_values, replicate
from configs.training import EMBEDDED, Augment, Compute, Model, Optim, Regularizer
from finetune.augment import augmentation
from finetune.averages import Averages
from finetune.optimisers import build, learning_rate
from finetune.rows import row_config
from slurm.plan import paper_experiments
from tests.experiments import EXPERIMENTS, ROOT, TYPED

PAPER = paper_experiments()
OF_OWN_POOLS = ("timm", "open_clip", "transformers", "function", "image_folder", "text_file")  # for configs/own.yaml
PUBLISHED = ROOT.parent / "shared/reference/released/hparam_info.json"


@cache
def loaded(name):
    """An experiment's settings."""
    return load(name, *TYPED.get(name, ()))


@cache
def rows(name):
    """Row 1, 2, ... of an experiment, with what is its own."""
    return [row_config(loaded(name), row) for row in range(1, loaded(name).sweep.size + 1)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_parses(name):
    config = loaded(name)
    assert config.name == name
    assert parse_values(dump(config)) == config


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_parses_and_its_augmentation_and_optimiser_build(name):
    model = nn.Linear(2, 2)
    start = model.state_dict()
    for augment in {row.augment for row in rows(name)}:
        augmentation(augment, loaded(name).model.image_size)
    for optim in {row.optim for row in rows(name)}:
        assert build(optim, model).param_groups[0]["lr"] == optim.lr
    for regularizer in {row.regularizer for row in rows(name)}:
        averages = Averages.of(start, regularizer, 10)
        averages.update(start, 9)
        assert set(averages.decays) == {f"ema_{decay}" for decay in regularizer.ema}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_file_is_global_and_carries_its_command(name):
    first, *rest = (ROOT / f"configs/experiment/{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"  # Hydra ignores a file without it silently
    head = "\n".join(line for line in rest if line.startswith("#"))
    assert f"experiment={name}" in head[head.index("Run:") :] or f"make {name}" in head


@pytest.mark.parametrize("name", PAPER)
def test_every_experiment_of_the_paper_says_what_it_costs_and_what_the_paper_has(name):
    text = (ROOT / f"configs/experiment/{name}.yaml").read_text()
    assert "# Cost: about" in text and "an estimate" in text
    assert "# Paper:" in text


@pytest.mark.parametrize(
    ("group", "settings"),
    [
        ("task", Task),
        ("model", Model),
        ("optim", Optim),
        ("augment", Augment),
        ("regularizer", Regularizer),
        ("compute", Compute),
    ],
)
def test_every_setting_of_a_group_can_be_typed_whichever_file_is_chosen(group, settings):
    # Hydra refuses to override a key that no file has.
    names = {field.name for field in fields(settings)}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for path in sorted((CONFIGS / group).glob("*.yaml")):
            if path.stem in OF_OWN_POOLS:
                continue
            composed = compose("config", [f"{group}={path.stem}"], return_hydra_config=False)
            assert set(composed[group]) == names, path


def of_group(model):
    """Settings with a model of configs/model, on a task that it takes."""
    if "kind: masked_lm" in (text := (CONFIGS / f"model/{model}.yaml").read_text()) or "kind: seq2seq_lm" in text:
        return load("table5_bert_rte", f"model={model}")
    return load("demo_text" if model == "minilm" else "demo", f"model={model}")


def test_every_model_of_open_clip_and_timm_is_one_that_they_know():
    for path in sorted((CONFIGS / "model").glob("*.yaml")):
        if path.stem in ("base", *OF_OWN_POOLS) or path.stem.startswith("any_"):
            continue
        model = of_group(path.stem).model
        if model.kind == "open_clip":
            assert (model.name, model.pretrained) in open_clip.list_pretrained()
        if model.kind == "timm":
            assert model.name in timm.list_pretrained()
        assert bool(model.proxy_for) == (path.stem.endswith("proxy") or model.kind in EMBEDDED)


def test_pixels_divide_into_the_patches_of_the_model():
    for name, patch in (("vit_g14_proxy", 14), ("basic_l_proxy", 16), ("clip_vit_b32", 32), ("clip_vit_l14", 14)):
        model = load("demo", f"model={name}").model
        assert model.image_size % patch == 0
        assert model.evaluated_at % patch == 0


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("table3_clip_b32", 71),  # and the initialisation: Table 3's 72 models
        ("released_sweep", 71),
        ("table4_vitg", 58),  # Section 3.3.2
        ("tablec1_basic", 20),  # Appendix C: 2 learning rates x 10 augmentations
        ("figure5_align", 12),  # Appendix J.2.2: 5 + 7
        ("standard_lp", 48),  # 4 learning rates x 3 augmentations x mixup off or on x 2 seeds
        ("extreme_zeroshot", 96),
        ("tablel1_distill", 14),
        ("tablel2_fixaug", 8),
        ("tablel3_sam", 4),
        ("figurel1_clip", 6),
        ("figureb2_seeds", 20),
        ("figureg4_clip", 5),
        ("figure2_landscape", 3),
        ("figuree1_cars", 1),
        ("demo_extreme_lp", 16),
        ("demo_cross_dataset", 5),
    ],
)
def test_a_sweep_has_as_many_rows_as_the_paper_or_its_file_says(name, count):
    assert loaded(name).sweep.size == count


TEXT = [name for name in EXPERIMENTS if name.startswith(("table5_", "tablej1_"))]


def test_tables_5_and_j1_have_8_and_20_experiments():
    assert [sum(name.startswith(table) for name in TEXT) for table in ("table5_", "tablej1_")] == [8, 20]


@pytest.mark.parametrize("name", TEXT)
def test_a_text_experiment_has_32_runs_as_in_appendix_j5_and_soups_of_them_alone(name):
    config = loaded(name)
    assert len(rows(name)) == 32
    assert {row.optim.kind for row in rows(name)} == {"adam"}
    assert {row.optim.schedule for row in rows(name)} == {"linear"}
    assert (config.model.max_length, config.optim.clip_norm, config.optim.weight_decay) == (128, 1.0, 0.0)
    assert (config.model.head, config.optim.loss, config.cooking.initialisation) == ("prompt", "likelihood", False)
    assert {row.optim.seed for row in rows(name)} == {None}  # a stream of its own for each
    assert config.task.metrics.get("held_out") == config.task.metrics.get("test")  # what selects is what is reported
    assert config.task.subset == name.rsplit("_", 1)[1]
    assert config.model.name.split("/")[1].startswith(name.split("_")[1])


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if loaded(name).sweep.listed or loaded(name).sweep.grid])
def test_no_two_rows_of_a_list_or_grid_are_the_same(name):
    own = [(row.task, row.model, row.optim, row.augment, row.regularizer) for row in rows(name)]
    assert len({repr(one) for one in own}) == len(own)


def test_a_grid_over_levels_gives_the_crops_and_strengths_of_appendix_j():
    by_kind = {row.augment.kind: row.augment for row in rows("standard_lp")}
    named = {kind: load("demo_sam", f"augment={kind}").augment for kind in ("minimal", "medium", "strong")}
    for kind, name in (("minimal", "minimal"), ("medium", "medium"), ("rand", "strong")):
        one, other = (repr(augmentation(each, 224)) for each in (by_kind[kind], named[name]))
        assert re.sub(" at 0x[0-9a-f]+", "", one) == re.sub(" at 0x[0-9a-f]+", "", other)


def test_the_seeds_of_a_grid_share_their_order_of_images_and_the_draws_do_not():
    assert {row.optim.seed for row in rows("extreme_lp")} == {0, 1}
    assert {row.optim.seed for row in rows("table3_clip_b32")} == {None}


def test_the_vit_g_rows_hold_its_two_best_models_and_four_of_sam():
    best = [
        row
        for row in rows("table4_vitg")
        if (row.optim.lr, row.optim.schedule, row.optim.loss, row.optim.steps) == (3e-5, "constant", "softmax", 20000)
        and (row.augment.crop, row.optim.cutmix, row.optim.mixup, row.augment.kind) == (0.9, 0.2, 0, "medium")
    ]
    assert sorted(row.regularizer.sam is not None for row in best) == [False, True]
    assert sum(row.regularizer.sam is not None for row in rows("table4_vitg")) == 4
    assert {row.augment.crop for row in rows("table4_vitg")} == {0.05, 0.7, 0.9, 1.0}


def test_align_crosses_crops_randaugment_and_mixup_at_5e_6():
    crossed = [row for row in rows("figure5_align") if row.optim.lr == 5e-6]
    settings = {(row.augment.crop, row.augment.aspect, row.augment.kind, row.optim.mixup) for row in crossed}
    crops = ((0.05, 0.75), (0.9, 0.95))
    assert settings == {(*crop, kind, mixup) for crop in crops for kind in ("medium", "rand") for mixup in (0.0, 0.5)}
    assert sorted(row.optim.lr for row in rows("figure5_align"))[:2] == [1e-6, 2e-6]


def test_distillation_is_from_the_three_augmentations_of_its_own_learning_rate():
    for row in rows("tablel1_distill"):
        if row.regularizer.distill is not None:
            teachers = [rows("tablel1_distill")[number - 1] for number in row.regularizer.distill.rows]
            assert {teacher.optim.lr for teacher in teachers} == {row.optim.lr}
            assert [teacher.augment.kind for teacher in teachers] == ["minimal", "medium", "rand"]


def test_the_labels_of_figure_l1_name_the_rows_they_stand_for():
    for label, row in zip(loaded("figurel1_clip").analysis.labels, rows("figurel1_clip"), strict=True):
        lr, schedule = label.split(", ")
        assert (float(lr), {"restarts": "cosine_restarts"}.get(schedule, schedule)) == (
            row.optim.lr,
            row.optim.schedule,
        )


def test_swa_with_restarts_averages_the_ends_of_cycles_of_imagenet():
    optim, swa = rows("figurel1_clip")[2].optim, rows("figurel1_clip")[2].regularizer.swa
    steps = (1_281_167 - 26_000) // 512 * 10
    taken = range(int(swa.start * steps), steps, swa.every)
    assert len(taken) == 4
    assert taken[-1] == steps - 1
    assert all(learning_rate(optim, step, steps) < 1e-5 * optim.lr for step in taken)


def test_the_pairs_of_appendix_k4_exist_in_both_extreme_grids():
    for name, rates, strong in (("extreme_lp", (1e-4, 1e-5, 1e-6), 0.5), ("demo_extreme_lp", (1e-2, 1e-3, 1e-4), 0.2)):
        found = {(row.optim.lr, row.augment.kind, row.optim.mixup, row.optim.seed) for row in rows(name)}
        for lr in rates:
            for kind, mixup in (("minimal", 0.0), ("rand", strong)):
                assert {(lr, kind, mixup, 0), (lr, kind, mixup, 1)} <= found


def test_a_cross_dataset_row_learns_other_classes_than_those_it_is_evaluated_on():
    parts = [row.task.part for row in rows("demo_cross_dataset")]
    assert [*parts, loaded("demo_cross_dataset").task.part] == [0, 1, 2, 3, 4, 5]
    assert not loaded("demo_cross_dataset").model.train_head


def test_the_best_released_model_has_the_settings_that_the_authors_published():
    row = rows("released_sweep")[42]  # model_43, by its published log
    assert (row.optim.lr, row.optim.epochs, row.optim.mixup) == (1.2309748931412387e-05, 11, 0)
    assert (row.optim.label_smoothing, row.optim.weight_decay) == (0.13393743606826894, 0.0035920124968717246)
    assert (row.augment.kind, row.augment.magnitude, row.augment.layers) == ("rand", 19, 0)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the authors' file is not here")
def test_the_released_rows_are_the_authors_own():
    published = json.loads(PUBLISHED.read_text())
    with (ROOT / "results/released/hyperparameters.csv").open(newline="") as file:
        names = [line["model"] for line in csv.DictReader(file)]
    assert names == [f"model_{number}" for number in range(1, 72)]
    for name, row in zip(names, rows("released_sweep"), strict=True):
        theirs, augment = published[name], row.augment
        assert (row.optim.lr, row.optim.weight_decay) == (theirs["lr"], theirs["wd"])
        assert (row.optim.label_smoothing, row.optim.mixup) == (theirs["smoothing"], theirs["mix"])
        assert row.optim.epochs == theirs["epochs"]
        ours = f"rand-m{augment.magnitude}-n{augment.layers}" if augment.kind == "rand" else None
        assert ours == theirs["aug"]
        assert (augment.crop, augment.increasing) == (None, False)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+optim.learning_rate=1", "optim.learning_rate: unknown key"),
        ("optim.clip_norm=-1", "optim.clip_norm: Input should be greater than 0"),
        ("optim.batch_size=63", "optim.batch_size: Input should be a multiple of 2"),
        ("task.held_out=test", "each split has one role"),
        ("task.train=held_out", "each split has one role"),
        ("sweep.index=99", "past the last row"),
        ("recipes=[greedy]", "must contain best"),
        ("recipe=stew", "recipe: Input should be 'best'"),
        ("name='../elsewhere'", "name: String should match"),
        ("optim.lr=0.001", "optim.lr is varied by the sweep"),
    ],
)
def test_a_wrong_setting_is_named(override, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[")) as error:
        load("demo", override)
    assert "\n" not in str(error.value)


def test_a_drawn_field_can_be_fixed_by_taking_it_out_of_the_draw():
    config = load("demo", "optim.lr=0.001", "~sweep.draw.optim.lr")
    assert config.optim.lr == 0.001
    assert "optim.lr" not in config.sweep.varied


def test_a_config_cannot_be_changed_after_it_was_parsed():
    with pytest.raises(AttributeError):
        load("demo").optim.lr = 1.0


def test_a_replicate_differs_in_its_seed_and_its_folder_only():
    config = load("demo_seeds")
    one = replicate(config, 1)
    assert (one.name, one.sweep.seed, one.replicates) == ("demo_seeds/seed1", 1, ())
    assert one.optim == config.optim


def test_an_entry_point_answers_a_wrong_setting_in_one_line(tmp_path):
    command = [
        sys.executable,
        "reproduce.py",
        "experiment=demo_tiny",
        "task.held_out=test",
        f"paths.runs={tmp_path}/runs",
    ]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: bad config: task: Value error, each split has one role")
    assert len(answer.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_stage_without_an_experiment_says_how_to_name_one():
    answer = subprocess.run([sys.executable, "-m", "finetune"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: bad config: Missing mandatory value: name; an experiment sets it")
    assert len(answer.stderr.splitlines()) == 1


def test_what_an_experiment_leaves_to_its_user_is_named_whole():
    with pytest.raises(UserError, match=r"this experiment leaves it to you: type task\.folder=\.\.\."):
        load("own_images")
