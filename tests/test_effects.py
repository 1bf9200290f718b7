"""No setting is accepted and ignored: each changes something, or is refused by its name."""

import re
from dataclasses import fields, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import miniatures
import pytest
import torch
from pictures import save_tree
from pydantic import ValidationError

from analysis.measure.methods import bootstrap_groups
from analysis.tables.table3 import note
from configs.data import KINDS, kinds_with
from configs.errors import UserError
from configs.help import settings_of
from configs.schema import Experiment, checked, dump, load, needs_of
from configs.training import Distribution
from eval.forward import Evaluator
from store.rows import row_config
from tasks.emoji import load as emoji
from tasks.load import class_names, load_annotations, load_split
from tasks.texts import pieces_of
from tests.experiments import TYPED


def save_image_folder(root, kind="image_folder", **own):
    save_tree(root, classes=("cat", "dog", "fox"), splits=("train", "held_out", "test"))
    return miniatures.settings(kind, root, 3, **own)


def save_image_table(root):
    task = save_image_folder(root, "image_table", table=Path("all.csv"))
    paths = [path.relative_to(root) for path in sorted(root.rglob("*.jpg"))]
    lines = [f"{path},{path.parent.name},{path.parts[0]}" for path in paths]
    miniatures.write(root / "all.csv", "\n".join(["path,label,split", *lines]) + "\n")
    return task


def save_glue(root):
    for file, rows in (("train", 40), ("dev", 4)):
        lines = [f"source\t{i % 2}\t*\tthe {file} sentence {i}" for i in range(rows)]
        miniatures.write(root / "CoLA" / f"{file}.tsv", "\n".join(lines) + "\n")
    own = {"subset": "cola", "template": "{sentence}", "options": ("no", "yes"), "held_out_share": 0.25}
    return miniatures.settings("glue", root, 2, folders={"test": "validation"}, **own)


def save_sentences(root):
    for split, rows in (("train", 12), ("test", 4)):
        lines = ["text\tlabel", *(f"{split} {i}\t{i % 2}" for i in range(rows))]
        miniatures.write(root / f"{split}.tsv", "\n".join(lines) + "\n")
    own = {"template": "{text}", "options": ("no", "yes"), "held_out_share": 0.25}
    return miniatures.settings("sentences", root, 2, **own)


SAVED = {
    "emoji": lambda root: replace(load("demo").task, classes=20, shifts=("v2",)),
    "sentiment": lambda root: replace(load("demo_text").task, shifts=("nyt",), take={"test": 20, "nyt": 20}),
    "image_folder": save_image_folder,
    "image_table": save_image_table,
    "glue": save_glue,
    "sentences": save_sentences,
} | {
    name: getattr(miniatures, f"save_{name}")
    for name in ("cifar10", "cifar100", "dtd", "food101", "sun397", "cars", "fmow", "iwildcam", "parquet")
}
CHANGED = {  # another value of each setting of a task
    "folder": lambda task: Path("tests"),  # which has no data
    "fold": lambda task: 1,
    "folders": lambda task: task.folders | {task.test: "nowhere"},
    "num_classes": lambda task: task.num_classes + 1,
    "counts": lambda task: (task.counts or {}) | {task.train: 1},
    "names": lambda task: "nowhere.txt",
    "label": lambda task: "another",
    "table": lambda task: Path("nowhere.csv"),
    "path_column": lambda task: "another",
    "split_column": lambda task: "another",
    "subset": lambda task: "rte",
    "template": lambda task: "again: {sentence}{text}",
    "options": lambda task: tuple(reversed(task.options)),
    "asked": lambda task: tuple(reversed(range(task.num_classes))),
    "take": lambda task: {task.test: 2},
    "subsets": lambda task: {task.test: 1},
    "numbered": lambda task: (task.test,),
    "objectnet": lambda task: task.test,
    "objectnet_border": lambda task: True,
    "annotations": lambda task: {"real": Path("nowhere.json")},
    "held_out_per_class": lambda task: (task.held_out_per_class or 0) + 1,
    "held_out_share": lambda task: 0.5,
    "held_out_index": lambda task: Path("nowhere.npy"),
    "listings": lambda task: task.folder.parent / "kept",
    "protocol": lambda task: "paper",
    "train": lambda task: "elsewhere",
    "held_out": lambda task: "elsewhere",
    "test": lambda task: "elsewhere",
    "shifts": lambda task: ("elsewhere",),
    "metrics": lambda task: {task.test: "matthews"},
    "title": lambda task: "Another",
    "titles": lambda task: {task.test: "Another"},
    "proxy_for": lambda task: "another",
    "bootstrap_unit": lambda task: "image" if task.bootstrap_unit == "class" else "class",
    "classes": lambda task: 10 if task.classes else task.num_classes + 1,
    "parts": lambda task: 2,
    "part": lambda task: 1,
}


load_once = cache(load)


def observed(task, runs):
    """Everything that a task's settings are read for, the cheapest first: captions, names, examples, labels, scores."""
    config = SimpleNamespace(**vars(load_once("demo")) | {"task": task, "paths": SimpleNamespace(runs=runs)})
    evaluator = Evaluator(config)
    try:
        yield note(config), task.split_title(task.test), task.answers, pieces_of(task.template)
        yield class_names(task)
        for split in (task.test, task.train, task.held_out, *task.shifts):
            examples = load_split(task, split)
            yield split, examples.labels.tolist(), examples.digest
        labels = load_split(task, task.test).labels
        all_first = torch.eye(task.size)[torch.zeros(len(labels), dtype=torch.long)]
        yield [evaluator.score(logits, task.test) for logits in (all_first, torch.eye(task.size)[labels])]
        yield len(load_annotations(task))
        yield [group.tolist() for group in bootstrap_groups(evaluator, (task.train,))]
        yield task.listings is not None and any(task.listings.iterdir())
    except (UserError, ValueError) as error:  # the second of a metric over no example
        yield str(error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVED)
def test_every_setting_of_every_kind_of_task_changes_something_or_is_refused(kind, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(emoji, "read_table", cache(emoji.read_table))  # most of the time of its kind
    task = SAVED[kind](tmp_path / "data")
    before = list(observed(task, tmp_path))
    assert not isinstance(before[-1], str), before[-1]
    elsewhere = {"kind", "overlap_allowed"}  # of the second see tests/test_overlaps.py: no image here stands twice
    for setting in (each.name for each in fields(task) if each.name not in elsewhere):
        value = CHANGED[setting](task)
        assert value != getattr(task, setting), setting
        try:
            other = replace(task, **{setting: value})
        except ValidationError as error:
            assert any(setting in (*each["loc"], *re.findall(r"\w+", each["msg"])) for each in error.errors()), setting
        else:
            pairs = zip_longest(observed(other, tmp_path), before)  # no more is read than shows a difference
            assert any(now != then for now, then in pairs), setting


def test_a_setting_of_other_kinds_is_refused_with_the_kinds_that_have_it():
    every = {each.name for kind in KINDS.values() for each in fields(kind)}
    of_some = [setting for setting in every if len(kinds_with(setting)) < len(KINDS)]
    assert len(of_some) == 23
    for name in ("demo", "demo_text", "table3_clip_b32", "figuree1_dtd", "figureg2_cifar10", "tablej1_bert_base_rte"):
        values = dump(load_once(name))
        assert set(values["task"]) == {"kind", *CHANGED, "overlap_allowed"}  # whatever the kind
        for setting in of_some:
            kinds, own = kinds_with(setting), values["task"]["kind"]
            for other in ("another", {"test": "another"}) if own not in kinds else ():
                with pytest.raises(UserError) as refused:
                    checked(Experiment, values | {"task": values["task"] | {setting: other}})
                message = f"bad config: task.{setting} is for task.kind={', '.join(kinds)}, not for {own}"
                assert str(refused.value) == message


@pytest.mark.parametrize(
    ("experiment", "typed", "words"),
    [
        # What the sweep gives its rows, by whatever way it does.
        ("demo", "optim.lr=0.001", r"optim\.lr is varied by the sweep"),
        ("released_sweep", "optim.lr=0.5", r"optim\.lr is varied by the sweep, by the column optim\.lr of"),
        ("released_sweep", "augment.magnitude=3", r"augment\.magnitude is varied by the sweep, by the column"),
        ("figurel1_clip", "regularizer.swa.every=7", r"regularizer\.swa\.every is varied by .* by sweep\.listed"),
        ("tablel3_sam", "+regularizer.sam.rho=1", r"regularizer\.sam"),
        ("standard_lp", "optim.lr=1", r"optim\.lr is varied by the sweep; .*'~sweep\.grid\.optim\.lr'"),
        ("released", "optim.batch_size=64", r"optim needs sweep\.imported=null"),
        ("demo", "sweep.draw.optim.epochs={kind: integers, low: 9, high: 4}", "low=9 is above high=4"),
        # A task's.
        ("demo", "task.held_out_per_class=1", r"task\.held_out_per_class is for task\.kind="),
        ("demo", "+task.counts.train=5", r"task\.counts is for task\.kind="),
        ("demo", "+task.folders.train=x", r"task\.folders is for task\.kind="),
        ("demo", "task.classes=900", r"task\.classes=900 is more than there are"),
        ("demo", "+task.metrics.tset=macro_f1", r"task\.metrics names the split 'tset'"),
        ("table3_clip_b32", "task.objectnet=o", r"task\.objectnet names the split 'o'"),
        ("own_text", "task.options=[true,false]", r"options\.0: should be a text, in quotes where it is true"),
        ("own_text", "task.options=[a,a]", r"task\.options has 'a' for two classes"),
        ("own_text", "task.options=['1','0']", r"task\.options calls class 0 '1', which is also the id of another"),
        ("demo_text", "task.asked=[1,0]", r"task\.asked needs model\.head=prompt"),
        ("demo", "task.asked=[0]", r"task\.asked is for task\.kind=glue, sentences, sentiment, not for emoji"),
        ("tablej1_bert_base_cola", "task.asked=[1,1]", r"task.asked=\[1, 1\]: not each class id below 2 once"),
        ("tablej1_bert_base_cola", "task.protocol=paper", r"type task\.held_out_share=null too"),
        ("demo", "task.protocol=paper", r"task\.protocol is for task\.kind=glue, not for"),
        ("demo", "task.held_out=test", "each split has one role"),
        ("demo", "task.train=held_out", "each split has one role"),
        ("demo", "task.num_classes=1", r"task\.num_classes: Input should be greater than or equal to 2, got '1'"),
        ("demo", "task.kind=imagefolder", r"task\.kind: Input should be .*, got 'imagefolder'; near is image_folder"),
        ("demo", "+task.fodler=x", r"task\.fodler: there is no such setting; near is task\.folder"),
        ("own_images", "task.folder=???", r"this experiment leaves it to you: type task\.folder=\.\.\."),
        # Of texts, and of images.
        ("demo_text", "model=emoji_clip", r"has texts, which model\.kind=emoji_clip does not take"),
        ("demo_text", "augment=minimal", "augment=none is for texts"),
        ("demo_text", "optim.mixup=0.2", "mixup and CutMix mix pixels"),
        ("demo_text", "optim.loss=likelihood", "belong together"),
        ("demo_text", "task.options=[a,b,c]", r"task\.num_classes=2 task\.options"),
        ("demo_text", "task.subset=rte", r"task\.subset is for task\.kind=glue, not for sentiment"),
        ("demo", "task.template='{a}'", r"task\.template is for task\.kind=glue, sentences, sentiment, not for emoji"),
        ("demo", "augment=none", "augment=none is for texts"),
        ("demo", "compute.resized=256", r"compute\.resized needs task\.kind=image_folder, image_table, dtd"),
        ("demo", "compute.decoder=simplejpeg", r"compute\.decoder needs task\.kind=image_folder, image_table, dtd"),
        ("table3_clip_b32", "compute.resized_quality=80", r"compute\.resized_quality needs compute\.resized"),
        ("table3_clip_b32", "compute.resized=128", r"128 is smaller than the 224 pixels of model\.image_size"),
        # A network's.
        ("demo", "model.max_length=64", r"model\.max_length needs model\.kind=minilm, text_encoder"),
        ("demo_text", "model.image_size=32", r"model\.image_size needs model\.kind=emoji_clip, "),
        ("demo_text", "model.squash=true", r"model\.squash needs model\.kind=emoji_clip, "),
        ("demo_text", "compute.loader_workers=3", r"compute\.loader_workers needs model\.kind=emoji_clip"),
        ("demo_grid_zeroshot", "model.probe_c=[1]", r"model\.probe_c needs model\.head=linear_probe"),
        ("tablej1_t5_small_rte", "model.train_head=false", r"model\.train_head needs model\.head=linear_probe, zero"),
        ("demo_imagenet_init", "model.weights=x", r"model\.weights needs model\.kind=emoji_clip, open_clip"),
        # An optimiser's.
        ("demo", "optim.momentum=0.9", r"optim\.momentum needs optim\.kind=sgd, rmsprop or adafactor"),
        ("demo", "optim.cycles=3", r"optim\.cycles needs optim\.schedule=cosine_restarts"),
        ("table4_vitg", "optim.epochs=3", r"optim\.epochs needs optim\.steps=null"),
        ("tablej1_t5_small_rte", "optim.label_smoothing=0.1", r"optim\.label_smoothing needs optim\.loss=softmax"),
        ("demo_text", "optim.decay=all", r"optim\.decay needs optim\.weight_decay"),
        ("demo", "+optim.learning_rate=1", r"optim\.learning_rate: there is no such setting"),
        ("demo", "optim.clip_norm=-1", r"optim\.clip_norm: Input should be greater than 0"),
        ("demo", "optim.batch_size=63", r"optim\.batch_size: Input should be a multiple of 2"),
        ("demo_tiny", "optim.keep=best", r"optim\.keep=best needs optim\.evaluate_every"),
        # An augmentation's.
        ("demo_sam", "augment.magnitude=3", r"augment\.magnitude needs augment\.kind=rand"),
        ("demo_sam", "augment.fill=mean", r"augment\.fill needs augment\.kind=rand or auto"),
        ("demo", "augment.color_jitter=0.1", r"augment\.color_jitter needs augment\.kind=medium"),
        ("demo_cross_dataset", "augment.flip=0.1", r"augment\.flip needs augment\.kind=medium, rand or auto"),
        ("demo_text", "augment.crop=0.5", r"augment\.crop needs augment\.kind="),
        ("demo_text", "augment.last_epochs_minimal=1", r"augment\.last_epochs_minimal needs augment\.kind="),
        ("demo_sam", "augment.kind=stochastic", r"augment\.among and augment\.kind=stochastic belong together"),
        # And of the rest.
        ("demo", "sweep.index=99", "past the last row"),
        ("demo", "recipes=[greedy]", "must contain best"),
        ("demo", "recipe=gredy", r"recipe: Input should be 'best', .* got 'gredy'; near is greedy"),
        ("demo", "name='../elsewhere'", "name: should be lower-case letters, digits and _, as in my_pets_2"),
        ("demo_tiny", "regularizer.ingredient=swa", r"regularizer\.ingredient=swa is not made"),
        ("demo", "regularizer.ema_ramp=true", r"^bad config: regularizer\.ema_ramp needs regularizer\.ema: here .*t$"),
        ("demo", "tracking.mode=offline", r"tracking\.mode needs tracking\.kind=wandb"),
        ("demo", "cluster.restarts=3", r"cluster\.restarts needs cluster\.kind=slurm"),
        ("demo", "submit=true", r"submit needs cluster\.kind=slurm"),
        ("demo", "cooking.rows=[1]", r"cooking\.rows needs recipe=subset"),
        ("demo", "cooking.alpha=0.3", r"cooking\.alpha needs recipe=wise_ft"),
        ("demo_text", "cooking.rounds=3", r"cooking\.rounds needs recipe=greedy_with_replacement"),
        ("demo_text", "cooking.learned.lr=1", r"cooking\.learned needs recipe=learned, learned_by_layer or"),
        ("demo", "cooking.ahead=3", r"cooking\.ahead needs cooking\.shortcut=speculative"),
        ("demo", "cooking.chunk=3", r"cooking\.chunk needs cooking\.shortcut=hard_first"),
        ("demo_tiny", "analysis.labels=[one]", r"analysis\.labels has 1 names for 3 rows"),
        ("demo_tiny", "+analysis.sets.all=[1,2]", r"analysis\.sets needs analysis\.labels"),
    ],
)
def test_a_setting_that_is_wrong_or_has_no_effect_is_refused_in_one_line(experiment, typed, words):
    own = [word for word in TYPED.get(experiment, ()) if word.split("=")[0] != typed.split("=")[0]]
    with pytest.raises(UserError, match=words) as refused:
        load(experiment, *own, typed)
    assert "\n" not in str(refused.value) and "{'" not in str(refused.value)


def test_a_prompt_has_no_more_options_than_letters():
    many = f"task.options=[{','.join(f'word{i}' for i in range(27))}]"
    prompt = ("task.template='{text}'", "model=bert_base", "optim=text_prompt")
    with pytest.raises(UserError, match=r"27 task\.options are more than a prompt has letters"):
        load("own_text", "task.folder=x", "task.num_classes=27", many, *prompt)


def test_what_a_setting_needs_is_a_setting_that_can_have_such_values():
    values_of = {each.name: re.split(", | or ", each.values) for each in settings_of(Experiment)}
    for name, needs in needs_of(Experiment).items():
        values = ["null" if value is None else value for value in needs.values]
        assert set(values) <= set(values_of[needs.setting]), name


@pytest.mark.parametrize(
    ("experiment", "typed"),
    [
        *(("demo", [f"optim.kind={kind}", "optim.momentum=0.5"]) for kind in ("sgd", "rmsprop", "adafactor")),
        ("demo_grids", ["optim.momentum=0.5"]),  # rows 1 and 2 have one
        ("demo", ["optim.schedule=cosine_restarts", "optim.cycles=3"]),
        ("demo_ema_swa", ["optim.cycles=3"]),
        ("demo", ["recipe=subset", "cooking.rows=[1]"]),
        ("demo", ["recipe=wise_ft", "cooking.alpha=0.3"]),
        ("demo", ["augment.flip=0.1"]),
        ("figurel1_clip", ["regularizer.ema=[0.99]", "regularizer.ingredient=raw"]),
        ("standard_lp", ["~sweep.grid.optim.lr", "optim.lr=1e-5"]),
        ("demo", ["+task.metrics.test=macro_f1", "task.shifts=[r]"]),
        ("demo", ["cluster=slurm_cpu", "submit=true", "cluster.restarts=3"]),
    ],
)
def test_a_setting_that_some_row_needs_is_taken(experiment, typed):
    config = load(experiment, *typed)
    assert checked(Experiment, dump(config)) == config
    assert row_config(config, 1).sweep.index == 1


def test_rows_that_are_imported_need_no_settings_of_their_training(tmp_path):
    (tmp_path / "rows.csv").write_text("model,optim.lr\nmodel_1,1e-5\n")  # and no column says how it was augmented
    config = load("released", f"sweep.imported={tmp_path}", f"sweep.file={tmp_path / 'rows.csv'}", "sweep.rows=1")
    assert row_config(config, 1).optim.lr == 1e-5
    with pytest.raises(UserError) as refused:
        load("released", f"sweep.imported={tmp_path}", "augment.crop=0.5")
    assert "augment needs sweep.imported=null" in str(refused.value)


@pytest.mark.parametrize("kind", ["log10_uniform", "zero_or_uniform", "integers"])
def test_a_distribution_ends_where_it_begins_or_later(kind):
    own = {"kind": kind, "high": 3} | ({"zero": 0.5} if kind == "zero_or_uniform" else {})
    assert checked(Distribution, own | {"low": 3}).low == 3
    with pytest.raises(UserError, match="low=4 is above high=3"):
        checked(Distribution, own | {"low": 4})
