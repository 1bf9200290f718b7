"""Pools that no soup is made of."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from soups.checks import refuse_unsuitable
from soups.errors import UserError
from soups.made_up import moved
from tests.kinds import optimizer


def files(folder, **states):
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in states]


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(rank, seed=0):
    begin = "base_model.model.q"
    return {f"{begin}.lora_A.weight": noise(seed, rank, 8), f"{begin}.lora_B.weight": noise(seed, 8, rank)}


def test_models_of_another_origin_are_refused_and_a_new_head_is_no_other_origin(tmp_path):
    start = {f"layer{i}.weight": noise(i, 8, 8) for i in range(3)}
    own_heads = [moved(start, i) | {"head.weight": 50 * noise(7 + i, 3, 8)} for i in range(3)]
    refuse_unsuitable(files(tmp_path / "heads", a=own_heads[0], b=own_heads[1], c=own_heads[2]))
    stranger = {f"layer{i}.weight": noise(90 + i, 8, 8) for i in range(3)}
    paths = files(tmp_path / "mixed", a=start, b=moved(start, 1), c=stranger, d=moved(start, 2))
    with pytest.raises(
        UserError, match=r"mixed/c\.safetensors: not fine-tuned from the same .*; weights have a cosine of -?0\.[01]"
    ):
        refuse_unsuitable(paths)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (lora(4), lora(8), r"a\.safetensors is of an adapter .*`soups lora` .*merge_and_unload"),
        ({"w.qweight": torch.ones(2, 2).int()}, {"w.qweight": torch.ones(2, 2).int()}, "is of quantised weights"),
        ({"w.weight": torch.ones(2, 2).to(torch.int8)}, {"w.weight": torch.ones(2, 2).to(torch.int8)}, "quantised"),
    ],
)
def test_what_no_mean_is_made_of_is_refused_by_file_and_tensor(tmp_path, one, other, words):
    with pytest.raises(UserError, match=words) as caught:
        refuse_unsuitable(files(tmp_path, a=one, b=other))
    assert "\n" not in str(caught.value)


def test_classes_in_another_order_are_refused_though_all_shapes_agree(hugging_face, tmp_path):
    for i in range(2):
        shutil.copytree(hugging_face / f"images/checkpoint-{i}", tmp_path / str(i))
    config = json.loads((tmp_path / "1/config.json").read_text())
    config["id2label"] = {"0": "red", "1": "green", "2": "blue"}
    (tmp_path / "1/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"differ in 'id2label' .*another network or label space"):
        refuse_unsuitable([tmp_path / "0", tmp_path / "1"])
    for i, names in enumerate((["red", "blue"], ["blue", "red"])):  # as timm has them
        (tmp_path / str(i) / "config.json").write_text(json.dumps({"architecture": "vit", "label_names": names}))
    with pytest.raises(UserError, match="differ in 'label_names'"):
        refuse_unsuitable([tmp_path / "0", tmp_path / "1"])


def test_a_folder_with_the_state_of_an_optimizer_has_a_model_beside_it(hugging_face, tmp_path):
    shutil.copytree(hugging_face / "texts/checkpoint-0", tmp_path / "checkpoint-9")
    torch.save(optimizer(), tmp_path / "checkpoint-9/optimizer.pt")
    refuse_unsuitable([tmp_path / "checkpoint-9", hugging_face / "texts/checkpoint-1"])


def test_a_folder_with_a_pickle_alone_is_read(tmp_path):
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    refuse_unsuitable([tmp_path])
