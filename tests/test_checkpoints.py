"""Weight files are read to the bit, and a bad one is one clear error that names it."""

import json

import pytest
import torch

from configs.errors import UserError
from soups.files.checkpoints import digest_file
from soups.files.folders import INDEX
from soups.files.opening import opened
from soups.mean import average_files
from tests.saved import save


def with_header(text):
    """A file of zeros whose header says what its tensors are."""
    header = text.replace(b"ENTRY", b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}')
    return len(header).to_bytes(8, "little") + header + bytes(8)


WHOLE = with_header(b'{"w":ENTRY}')
DAMAGED = {
    "truncated": WHOLE[:-3],
    "longer": WHOLE + b"abc",
    "header": WHOLE[:8] + b"}" + WHOLE[9:],
    "length": b"\xff" * 8 + WHOLE[8:],
    "offset": WHOLE.replace(b"[0,8]", b"[1,9]"),
    "shape": WHOLE.replace(b'"shape":[2]', b'"shape":[3]'),
    "twice": with_header(b'{"w":ENTRY,"w":ENTRY}'),
    "overlap": with_header(b'{"v":ENTRY,"w":ENTRY}'),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, how):
    path = tmp_path / "a.safetensors"
    path.write_bytes(WHOLE)
    average_files([path], tmp_path / "soup.safetensors")
    path.write_bytes(DAMAGED[how])
    with pytest.raises(UserError, match=r"a.safetensors (is truncated|is damaged)[^\n]*$"):
        average_files([path], tmp_path / "soup.safetensors")


def test_a_file_cut_while_it_is_read_is_named(tmp_path):
    path = save(tmp_path, "a", {"w": torch.zeros(200)})
    with opened([path]) as (checkpoint,):
        path.write_bytes(path.read_bytes()[:-400])
        with pytest.raises(UserError, match=r"a.safetensors: tensor 'w' ends too early"):
            digest_file(checkpoint)


def test_shards_are_checked_against_their_index(tmp_path):
    folder = save(tmp_path, "a", {"w": torch.zeros(2), "v": torch.zeros(2)}, "shards")
    index = json.loads((folder / INDEX).read_text())
    cases = [
        ({"w": "../b.safetensors"}, "names a shard outside its folder"),
        ({"w": "part-9.safetensors"}, r"its shard part-9.safetensors is missing"),
        ({"x": "part-0.safetensors"}, "tensor 'x' is in the index but in no shard"),
    ]
    for change, words in cases:
        (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(UserError, match=words):
            average_files([folder], tmp_path / "soup.safetensors")
    (folder / INDEX).write_text("[]")
    with pytest.raises(UserError, match="is damaged or not an index"):
        average_files([folder], tmp_path / "soup.safetensors")
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match=f"a folder without {INDEX}: name a file in it"):
        average_files([folder], tmp_path / "soup.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"w": torch.ones(2), "epoch": [3]}, "not a state dict.*'epoch' is a list, not a tensor"),
        ({"optimizer": {"state": {"w": torch.ones(2)}, "param_groups": []}}, "'optimizer' is a dict, not a tensor"),
        ([1, 2], "holds a list, not a state dict"),
        ({}, "it is empty"),
        (
            {"w": torch.imag(torch.ones(2, dtype=torch.complex64).conj())},
            "'w' is .* a negated view",
        ),  # has -1 stored as 1
    ],
)
def test_what_is_not_a_state_dict_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=words):
        average_files([tmp_path / "a.pt"], tmp_path / "soup.safetensors")


def test_an_archive_of_an_old_torch_is_refused_in_one_line(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"^.*load it with torch and save it again.*$"):
        average_files([tmp_path / "old.pt"], tmp_path / "soup.safetensors")


def test_a_digest_names_the_content_and_not_the_format(tmp_path):
    state = {"w": torch.randn(5, 3).to(torch.bfloat16), "n": torch.tensor(2)}
    turned = {"n": state["n"], "w": state["w"].t().contiguous().t()}  # the same numbers, laid out by columns
    paths = [save(tmp_path, "a", state, how) for how in ("safetensors", "pt", "shards")]
    torch.save(turned, tmp_path / "turned.pt")
    changed = [save(tmp_path, f"changed-{name}", state | {name: state[name] + 1}) for name in state]
    others = {"shape": state["w"].reshape(3, 5), "kind": state["w"].view(torch.int16)}  # of the same bytes
    changed += [save(tmp_path, f"other-{what}", state | {"w": tensor}) for what, tensor in others.items()]
    with opened([*paths, tmp_path / "turned.pt", *changed]) as found:
        *same, w, n, shape, kind = [digest_file(checkpoint) for checkpoint in found]
    assert len(set(same)) == 1
    assert len({same[0], w, n, shape, kind}) == 5


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a"])
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"), (b"", "is empty")],
)
def test_files_that_were_not_fetched_say_so(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error, opened([path]):
        pass
    assert str(error.value).startswith(str(path))
