"""The experiment files, what must be typed to compose some of them, and what a hub would have of their networks."""

import os
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path

from transformers import AutoConfig, EfficientNetImageProcessor

from configs.registered import experiments
from configs.schema import load
from soups.files.atomic import replacing
from tests.commands import SHARED
from tests.readers import OF_T5, SPECIAL, tokenizer

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = list(experiments())
TYPED = {
    "own_images": ("task.folder=images", "task.num_classes=3"),
    "own_text": ("task.folder=texts", "task.num_classes=2", "task.options=[a,b]", "task.template='{text}'"),
}


@cache
def loaded(name):
    """An experiment's settings, which take long to compose: once for all processes of a run of pytest."""
    kept = Path(os.environ[SHARED]).with_name(f"{name}.pickle") if SHARED in os.environ else None
    if kept and kept.exists():
        return pickle.loads(kept.read_bytes())
    config = load(name, *TYPED.get(name, ()))
    if kept:
        with replacing(kept) as temporary:
            temporary.write_bytes(pickle.dumps(config))
    return config


def hub_folders(folder):
    """Kind of model -> a folder with the config of one, and a tokenizer of a few words: theirs are not here."""
    folders = {kind: folder / kind for kind in ("transformers", "masked_lm", "seq2seq_lm")}
    AutoConfig.for_model("align").save_pretrained(folders["transformers"])
    EfficientNetImageProcessor(do_normalize=False, rescale_offset=True).save_pretrained(folders["transformers"])
    for kind, name, special in (("masked_lm", "bert", SPECIAL), ("seq2seq_lm", "t5", OF_T5)):
        start = {"decoder_start_token_id": 0} if name == "t5" else {}
        AutoConfig.for_model(name, **start).save_pretrained(folders[kind])
        tokenizer(special).save_pretrained(folders[kind])
    return folders


def loaded_locally(name, folders):
    """An experiment's settings, its network from a folder where it is from the hub."""
    config = loaded(name)
    local = folders.get(config.model.kind)
    return config if local is None else replace(config, model=replace(config.model, weights=local))
