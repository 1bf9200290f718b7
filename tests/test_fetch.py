"""Downloads from a real server: whole or absent, continued, in parallel, and in one line where they cannot be."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from servers import serving

from configs.errors import UserError
from soups.experiment.released.files import CHUNK, Download, _total, fetch, fetch_all

CONTENT = np.random.default_rng(0).integers(0, 256, 3 * CHUNK + 7, dtype=np.uint8).tobytes()


def get(served, folder, name="a.bin"):
    wanted = Download(f"{served.url}/{name}", folder / name)
    fetch(wanted, threading.Event())
    return wanted


@pytest.mark.parametrize(
    ("left", "server", "asked_from"),
    [
        (b"", {}, [0]),
        (CONTENT[:1000], {}, [1000]),
        (b"x" * 5000, {"ranges": False}, [0]),  # all of it comes again, and nothing twice
        (b"", {"cut_after": CHUNK + 3, "cuts": 2}, [0, CHUNK + 3, 2 * CHUNK + 6]),
        (CONTENT, {}, [len(CONTENT)]),
        (CONTENT + b"more", {}, [len(CONTENT) + 4, 0]),
        (b"", {"states": [503]}, [0, 0]),  # a busy server
    ],
    ids=["new", "continued", "without ranges", "cut off", "whole already", "too long", "busy"],
)
def test_a_file_arrives_whole_and_leaves_no_part(left, server, asked_from, tmp_path):
    folder = tmp_path / "new"
    if left:
        folder.mkdir()
        (folder / ".a.bin.part").write_bytes(left)
    with serving({"a.bin": CONTENT}, **server) as served:
        assert get(served, folder).path.read_bytes() == CONTENT
    assert [first for _, first in served.asked] == asked_from
    assert [path.name for path in folder.iterdir()] == ["a.bin"]


def test_a_file_that_never_becomes_as_long_as_it_should_does_not_appear(tmp_path):
    with serving({"a.bin": CONTENT}, cut_after=0, cuts=100) as served, pytest.raises(UserError, match="came of"):
        get(served, tmp_path)
    assert not (tmp_path / "a.bin").exists()


def test_a_range_of_a_file_of_unknown_length_must_be_as_long_as_its_own_header_says():
    headers = {"Content-Range": "bytes 5-9/*", "Content-Length": "5"}
    assert _total(SimpleNamespace(status=206, headers=headers), 5) == 10
    assert _total(SimpleNamespace(status=206, headers=headers | {"Content-Range": "bytes 5-9/20"}), 5) == 20


def test_a_missing_file_is_not_asked_for_again(tmp_path):
    with serving({}) as served, pytest.raises(UserError, match=r"b\.bin: the server answers 404"):
        get(served, tmp_path, "b.bin")
    assert len(served.asked) == 1


def test_without_a_server_it_is_one_line(tmp_path):
    with serving({}) as served:
        pass
    with pytest.raises(UserError, match=r"cannot be downloaded .*run the same again where there is internet") as caught:
        get(served, tmp_path)
    assert "\n" not in str(caught.value)


def test_several_files_come_at_a_time_and_each_is_told_once(tmp_path):
    files = {f"{i}.bin": bytes([i]) * 200_000 for i in range(6)}
    wanted = [Download("", tmp_path / name) for name in files]
    fetched, shown = [], []
    with serving(files, pause=0.05) as served:
        wanted = [Download(f"{served.url}/{each.path.name}", each.path) for each in wanted]
        fetch_all(wanted, workers=3, done=fetched.append, progress=shown.append)
    assert sorted(each.path.name for each in fetched) == sorted(files)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert shown[-1] == 1_200_000


def test_one_that_fails_stops_the_others_and_keeps_their_parts(tmp_path):
    with serving({"a.bin": CONTENT}, pause=0.1) as served:
        wanted = [Download(f"{served.url}/{name}", tmp_path / name) for name in ("a.bin", "none.bin")]
        with pytest.raises(UserError, match="404"):
            fetch_all(wanted, workers=2, done=lambda each: None)
    assert not (tmp_path / "a.bin").exists()
    assert CONTENT.startswith((tmp_path / ".a.bin.part").read_bytes())
