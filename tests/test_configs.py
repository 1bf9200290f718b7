"""Every experiment file composes, its networks can be built, and wrong settings die with the field's name."""

import csv
import json
import re
from dataclasses import fields, replace
from functools import cache
from itertools import zip_longest

import open_clip
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from torch import nn

from analysis.artefacts import ARTEFACTS
from analysis.tables.table3 import note
from configs.data import KINDS
from configs.registered import experiments, neutral
from configs.schema import CONFIGS, Experiment, checked, dump, load, parse
from configs.stages import Analysis, Angles, Pairs, Plane, Theory
from configs.training import EMBEDDED, Augment, Compute, Model, Optim, Regularizer
from finetune.averages import Averages
from finetune.data import augmentation
from finetune.optim import build, learning_rate
from models.classifier import architecture
from models.prompts import question
from slurm.plan import paper_experiments
from store.rows import identity, row_config
from tasks.held_out import own_name
from tests.experiments import EXPERIMENTS, ROOT, hub_folders, loaded

PUBLISHED = ROOT.parent / "shared/reference/released/hparam_info.json"


@cache
def rows(name):
    """Row 1, 2, ... of an experiment, with what is its own."""
    return [row_config(loaded(name), row) for row in range(1, loaded(name).sweep.size + 1)]


@pytest.mark.slow
def test_every_experiment_composes_and_the_augmentation_and_optimiser_of_each_row_build():
    model = nn.Linear(2, 2)
    start = model.state_dict()
    for name in EXPERIMENTS:
        assert loaded(name).name == name
        assert checked(Experiment, dump(loaded(name))) == loaded(name)
        assert set(loaded(name).parts) <= set(EXPERIMENTS), name
        for augment in {row.augment for row in rows(name)}:
            augmentation(augment, loaded(name).model.image_size)
        for optim in {row.optim for row in rows(name)}:
            assert build(optim, model).param_groups[0]["lr"] == optim.lr, name
        for regularizer in {row.regularizer for row in rows(name)}:
            averages = Averages(start, regularizer, 10)
            averages.update(start, 9)
            assert set(averages.decays) == {f"ema_{decay}" for decay in regularizer.ema}, name
        if loaded(name).sweep.listed or loaded(name).sweep.grid:  # whose rows all differ
            own = [(row.task, row.model, row.optim, row.augment, row.regularizer) for row in rows(name)]
            assert len({repr(one) for one in own}) == len(own), name


@cache
def network(model, num_classes, options):
    """The network of these settings; experiments share it, since only its shapes are looked at."""
    with torch.device("meta"):
        return architecture(model, num_classes, options)


# Searches whose pool holds the initialisation: the random one, as the released pool does, the extreme one and ALIGN's.
WITH_START = (
    *("table3_clip_b32", "released", "released_sweep", "figureg1_fmow", "figureg1_iwildcam", "figureg2_cifar10"),
    *("figureg3_in22k", "extreme_lp", "extreme_zeroshot", "figure5_align"),
)
TWO_AVERAGES = ("table4_vitg", "tablec1_basic")


@pytest.mark.slow
def test_the_network_and_the_optimiser_of_every_row_are_built(tmp_path):
    folders = hub_folders(tmp_path)
    for name in EXPERIMENTS:
        config = loaded(name)
        if not name.startswith(("demo", "own_")) and not config.parts:  # Sections 3.3.2, J.2; Appendix H
            assert config.cooking.initialisation == (name in WITH_START), name
            assert len(config.cooking.individuals) == (2 if name in TWO_AVERAGES else 0), name
        optims = {(row.optim.kind, row.optim.decay): row.optim for row in rows(name)}.values()
        for model, classes, answers in {(row.model, row.task.size, row.task.answers) for row in rows(name)}:
            local = replace(model, weights=folders[model.kind]) if model.kind in folders else model
            built = network(local, classes, answers)
            parameters = list(built.parameters())
            assert all(parameter.is_meta for parameter in parameters), name
            assert built.num_classes == classes, name
            trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            for optim in optims:
                groups = build(optim, built).param_groups
                assert sum(parameter.numel() for group in groups for parameter in group["params"]) == trained, name


def test_every_experiment_file_is_global_and_carries_its_command():
    for name, file in experiments().items():
        lines = file.read_text().splitlines()
        head = "\n".join(line for line in lines if line.startswith("#"))
        commands = head[head.index("Run:") :]
        if file.parent.name == "series":  # one of its names stands for all of them
            assert any(f"experiment={other}" in commands for other in EXPERIMENTS if experiments()[other] == file), name
        else:
            assert lines[0] == "# @package _global_", name  # Hydra ignores a file without it silently
            assert f"experiment={name}" in commands or f"make {name}" in head, name


def test_what_an_experiment_chooses_for_itself_stands_above_what_it_shares_with_others():
    cars, dtd, parent = (loaded(name) for name in ("figuree1_cars", "figuree1_dtd", "extreme_lp"))
    assert (cars.task.kind, dtd.task.kind, parent.task.title) == ("cars", "dtd", "ImageNet")
    assert (cars.optim.warmup_steps, dtd.optim.warmup_steps) == (50, 20) and cars.optim.lr == dtd.optim.lr == 3e-5
    assert (cars.augment.kind, cars.sweep.rows) == ("minimal", 1)
    assert replace(cars, task=dtd.task, optim=dtd.optim, name=dtd.name) == dtd


def test_the_laws_of_a_sweep_can_be_typed_as_the_docs_show_them():
    page = (ROOT / "docs/training.md").read_text()
    typed = re.findall(r"`'(\+?sweep\.draw\.[^']+)'`", page)
    kinds = set()
    for word in typed:
        _, _, group, field = word.split("=")[0].split(".")
        kinds.add(load("demo", word).sweep.draw[group][field].kind)
    assert kinds == {"log10_uniform", "zero_or_uniform", "integers", "choice"}


WORDS = [
    (),
    ("optim.warmup_steps=3", "sweep.rows=2", "paths.runs=/tmp/x y"),
    ("model.probe_c=[1,2]", "+analysis.sets.both=[1,2]", "analysis.labels=[a,b,c]", "sweep.rows=3"),
    ("optim=sgd", "~sweep.draw.optim.lr", "optim.lr=0.1"),
    ("augment=emoji_medium", "~sweep.draw.augment.kind", "~sweep.draw.augment.crop", "augment.crop=0.4"),
    ("+task.folders.test=val", "task=image_folder", "task.folder=x", "task.num_classes=3"),
    ("optim.epochs=2", "~sweep.draw.optim.epochs"),
]


@pytest.mark.parametrize("words", WORDS)
def test_settings_that_are_loaded_are_what_hydra_makes_of_all_words(words):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        whole = compose("config", ["experiment=demo", *words])
    assert load("demo", *words) == load("demo", *words) == parse(whole, words)


@pytest.mark.parametrize(
    "word",
    [
        *("optim.foo=1", "optim.lr", "optim.lr=1,2", "optim@model=sgd", "model=none_such"),
        *("+optim.batch_size=2", "~optim.foo", "~optim.batch_size=3"),
    ],
)
def test_a_wrong_word_is_refused_by_hydra(word):
    load("demo")
    with pytest.raises(HydraException):
        load("demo", word)


def test_a_setting_that_no_file_has_is_its_dataclass_default_and_one_without_a_default_must_be_typed(tmp_path):
    assert loaded("demo").optim.momentum == Optim.__pydantic_fields__["momentum"].default == 0.9
    assert loaded("demo_angles").analysis == Analysis(angles=Angles(), pairs=Pairs(), plane=Plane(), theory=Theory())
    assert neutral(Optim)["lr"] == "???" and neutral(Experiment)["cooking"]["learned"]["lr"] == "???"


def test_every_experiment_of_the_paper_says_what_it_costs_and_what_the_paper_has():
    for name in paper_experiments():
        text = experiments()[name].read_text()
        assert "# Cost: about" in text and "an estimate" in text and "# Paper:" in text, name


SETTINGS = {"model": Model, "optim": Optim, "augment": Augment, "regularizer": Regularizer, "compute": Compute}
GROUPS = {"task": tuple(KINDS.values())} | {group: (settings,) for group, settings in SETTINGS.items()}


@cache
def chosen():
    """Group -> file of it -> what Hydra makes of the group there; a file of each is chosen at once, to save time."""
    files = {group: [path.stem for path in sorted((CONFIGS / group).glob("*.yaml"))] for group in GROUPS}
    found = {group: {} for group in GROUPS}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for together in zip_longest(*files.values()):
            choices = {group: file for group, file in zip(files, together, strict=True) if file}
            composed = compose("config", [f"{group}={file}" for group, file in choices.items()])
            for group, file in choices.items():
                found[group][file] = OmegaConf.to_container(composed[group])
    return found


@pytest.mark.slow
def test_every_setting_of_a_group_can_be_typed_whichever_file_is_chosen():
    # Hydra refuses to override a key that no file has.
    for group, settings in GROUPS.items():
        names = {field.name for each in settings for field in fields(each)}
        for file, values in chosen()[group].items():
            assert set(values) == names, (group, file)


def test_every_model_of_open_clip_and_timm_is_one_that_they_know():
    for file, values in chosen()["model"].items():
        if "name: ???" in (CONFIGS / f"model/{file}.yaml").read_text():
            continue  # the user names the network
        model = checked(Model, values)
        if model.kind == "open_clip":
            assert (model.name, model.pretrained) in open_clip.list_pretrained()
        if model.kind == "timm":
            assert model.name in timm.list_pretrained()
        assert bool(model.proxy_for) == (file.endswith("proxy") or model.kind in EMBEDDED)


def test_pixels_divide_into_the_patches_of_the_model():
    for name, patch in (("vit_g14_proxy", 14), ("basic_l_proxy", 16), ("clip_vit_b32", 32), ("clip_vit_l14", 14)):
        model = checked(Model, chosen()["model"][name])
        assert model.image_size % patch == 0
        assert model.evaluated_at % patch == 0


SIZES = {
    "table3_clip_b32": 71,  # and the initialisation: Table 3's 72 models
    "released_sweep": 71,
    "table4_vitg": 58,  # Section 3.3.2
    "tablec1_basic": 20,  # Appendix C: 2 learning rates x 10 augmentations
    "figure5_align": 12,  # Appendix J.2.2: 5 + 7
    "standard_lp": 48,  # 4 learning rates x 3 augmentations x mixup off or on x 2 seeds
    "extreme_zeroshot": 96,
    "tablel1_distill": 14,
    "tablel2_fixaug": 8,
    "tablel3_sam": 4,
    "figurel1_clip": 6,
    "figureb2_seeds": 20,
    "figureg4_clip": 5,
    "figure2_landscape": 3,
    "figuree1_cars": 1,
    "demo_extreme_lp": 16,
    "demo_cross_dataset": 5,
}


@pytest.mark.slow
def test_a_sweep_has_as_many_rows_as_the_paper_or_its_file_says():
    assert {name: loaded(name).sweep.size for name in SIZES} == SIZES


TEXT = [name for name in EXPERIMENTS if name.startswith("tablej1_")]
GLUE = ("mrpc", "rte", "cola", "sst2")


@pytest.mark.slow
def test_table_5_shows_eight_of_the_twenty_experiments_of_table_j1_which_all_have_draws_of_their_own():
    assert set(loaded("tablej1").parts) == set(TEXT) and len(TEXT) == 20
    assert set(loaded("table5").parts) == {name for name in TEXT if "_base_" in name}
    assert ARTEFACTS["table5"].paper == tuple(f"tablej1_{n}_base_{t}" for n in ("bert", "t5") for t in GLUE)
    assert len({loaded(name).sweep.seed for name in TEXT}) == 20
    assert len({tuple(row.optim.lr for row in rows(name)) for name in TEXT}) == 20
    parts = [name for name in loaded("paper").parts if not loaded(name).parts]
    assert len(parts) == len(set(parts)) and set(TEXT) < set(parts)


def test_a_prompt_lists_options_in_the_order_of_the_paper_and_answers_keep_their_class_ids():
    asked = {
        "sst2": "A) positive B) negative",  # the two that Appendix J.5 prints
        "cola": "A) acceptable B) unacceptable",
        "mrpc": "A) equivalent B) different",
        "rte": "A) true B) false",
    }
    for task, options in asked.items():
        glue = loaded(f"tablej1_bert_base_{task}").task
        assert question(glue.answers) == f" | options: {options} | label:"
        assert [answer[3:] for answer in glue.answers] == list(glue.options)


def test_answers_have_the_letters_of_the_order_in_which_they_are_asked():
    prompt = ("task.template='{text}'", "model=bert_base", "optim=text_prompt", "task.asked=[2,1,0]")
    task = load("own_text", "task.folder=x", "task.num_classes=3", "task.options=[a,b,c]", *prompt).task
    assert task.answers == ("C) a", "B) b", "A) c")
    assert replace(task, classes=2).answers == ("B) a", "A) b")


def test_by_the_papers_protocol_for_glue_held_out_is_what_reports_and_names_say_so():
    protocol = ("task.protocol=paper", "task.held_out_share=null")
    ours, paper = loaded("tablej1_bert_base_cola"), load("tablej1_bert_base_cola", *protocol)
    for task, held_out in ((ours.task, "train"), (paper.task, "validation")):
        assert [own_name(task, split) for split in ("train", "held_out", "test")] == ["train", held_out, "validation"]
    assert "selected on" not in note(ours) and "(selected on the reported split)" in note(paper)
    assert paper.task.split_title("test") == "Test (selected on it)"
    assert identity(ours, 1) != identity(paper, 1)


def test_table_3_is_evaluated_in_float32_with_one_coefficient_a_tensor_beside_one_a_layer():
    for name in ("table3_clip_b32", "released", "released_sweep"):
        config = loaded(name)
        assert (config.compute.precision, config.compute.evaluates_in) == ("bf16", "fp32")
        assert {"learned", "learned_by_layer", "learned_by_tensor"} < set(config.recipes)
    assert loaded("standard_lp").compute.evaluates_in == "bf16"
    assert loaded("demo").compute.evaluates_in == "fp32"


def test_clip_decays_all_parameters_as_the_authors_script_does_and_the_embedded_model_weights_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].bias.requires_grad_(False)
    by_default, theirs = (build(loaded(name).optim, model).param_groups for name in ("demo", "table3_clip_b32"))
    assert [(group["weight_decay"], len(group["params"])) for group in by_default] == [(0.0, 2), (0.1, 1)]
    assert [(group["weight_decay"], len(group["params"])) for group in theirs] == [(0.1, 3)]


def test_the_optimisers_of_figure_f1_are_those_of_the_appendix_and_rmsprop_has_no_momentum():
    settings = [(row.optim.kind, row.optim.lr, row.optim.momentum) for row in rows("figuref1_optimizer")]
    assert settings[:2] == [("sgd", 0.1, 0.9), ("rmsprop", 3e-5, 0.0)]
    assert build(rows("figuref1_optimizer")[1].optim, nn.Linear(2, 2)).defaults["momentum"] == 0


@pytest.mark.slow
def test_randaugment_fills_with_the_models_mean_in_the_papers_experiments_and_with_white_in_the_embedded_ones():
    for name in (each for each in EXPERIMENTS if not loaded(each).parts):
        for augment in (each for row in rows(name) for each in (row.augment, *row.augment.among)):
            if augment.kind in ("rand", "auto"):
                assert augment.fill == ("white" if name.startswith("demo") else "mean"), name


def test_what_comes_from_beyond_an_image_has_the_colour_that_the_model_subtracts():
    fills = {}
    for fill in ("white", "mean"):
        steps = augmentation(Augment(kind="rand", layers=1, magnitude=9, fill=fill), 64, (0.25, 0.5, 1.0)).transforms
        fills[fill] = {op.kwargs["fillcolor"] for op in next(step.ops for step in steps if hasattr(step, "ops"))}
    assert fills == {"white": {(255, 255, 255)}, "mean": {(64, 128, 255)}}
    model = architecture(loaded("demo").model, 3)
    assert torch.allclose(255 * torch.tensor(model.subtracted), model.mean.flatten())


def test_images_of_your_own_are_trained_as_their_sweep_means_it_on_a_cluster_file_that_has_a_gpu():
    config, searched = loaded("own_images"), {row.augment.kind: row.augment for row in rows("own_images")}
    published = {row.augment.kind: row.augment for row in rows("table3_clip_b32")}
    assert replace(searched["rand"], magnitude=0, layers=0) == replace(published["rand"], magnitude=0, layers=0)
    assert searched["minimal"].crop is None
    assert config.cluster == load("demo", "cluster=gpu").cluster
    assert config.compute.precision == "bf16"


@pytest.mark.slow
def test_a_text_experiment_has_32_runs_as_in_appendix_j5_and_soups_of_them_alone():
    for name in TEXT:
        config = loaded(name)
        shared = {(row.optim.kind, row.optim.schedule, row.optim.seed) for row in rows(name)}
        assert (len(rows(name)), shared) == (32, {("adam", "linear", None)}), name  # a stream of its own for each
        assert (config.model.max_length, config.optim.clip_norm, config.optim.weight_decay) == (128, 1.0, 0.0), name
        made = (config.model.head, config.optim.loss, config.cooking.initialisation)
        assert made == ("prompt", "likelihood", False), name
        metrics = config.task.metrics
        assert metrics.get("held_out") == metrics.get("test"), name  # what selects is what is reported
        assert config.task.subset == name.rsplit("_", 1)[1]
        assert config.model.name.split("/")[1].startswith(name.split("_")[1]), name


def test_a_grid_over_levels_gives_the_crops_and_strengths_of_appendix_j():
    by_kind = {row.augment.kind: row.augment for row in rows("standard_lp")}
    named = {kind: load("demo_sam", f"augment={kind}").augment for kind in ("minimal", "medium", "strong")}
    for kind, name in (("minimal", "minimal"), ("medium", "medium"), ("rand", "strong")):
        one, other = (repr(augmentation(each, 224)) for each in (by_kind[kind], named[name]))
        assert re.sub(" at 0x[0-9a-f]+", "", one) == re.sub(" at 0x[0-9a-f]+", "", other)


def test_the_seeds_of_a_grid_share_their_order_of_images_and_the_draws_do_not():
    for name, seeds in (("extreme_lp", {0, 1}), ("table3_clip_b32", {None})):
        assert {row.optim.seed for row in rows(name)} == seeds


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
        assert (row.optim.lr, row.optim.schedule.removeprefix("cosine_")) == (float(lr), schedule)


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
    optim, augment = row.optim, row.augment
    assert (optim.lr, optim.epochs, optim.mixup) == (1.2309748931412387e-05, 11, 0)
    assert (optim.label_smoothing, optim.weight_decay) == (0.13393743606826894, 0.0035920124968717246)
    assert (augment.kind, augment.magnitude, augment.layers) == ("rand", 19, 0)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the authors' file is not here")
def test_the_released_rows_are_the_authors_own():
    published = json.loads(PUBLISHED.read_text())
    with (ROOT / "results/released/hyperparameters.csv").open(newline="") as file:
        names = [line["model"] for line in csv.DictReader(file)]
    assert names == [f"model_{number}" for number in range(1, 72)]
    for name, row in zip(names, rows("released_sweep"), strict=True):
        theirs, optim, augment = published[name], row.optim, row.augment
        ours = (optim.lr, optim.weight_decay, optim.label_smoothing, optim.mixup, optim.epochs)
        assert ours == tuple(theirs[word] for word in ("lr", "wd", "smoothing", "mix", "epochs"))
        ours = f"rand-m{augment.magnitude}-n{augment.layers}" if augment.kind == "rand" else None
        assert ours == theirs["aug"]
        assert (augment.crop, augment.increasing) == (None, False)


def test_splits_without_titles_are_spelled_as_words_beside_those_with():
    shifts = ("task.shifts=[art_painting,sketch,v2]", "+task.titles.v2=V2")
    task = load("own_images", "task.folder=pacs", "task.num_classes=7", *shifts).task
    assert [task.split_title(split) for split in task.reported] == ["Test", "Art painting", "Sketch", "V2"]
