"""Downloads from a real server: whole or absent, continued, in parallel, and in one line where they cannot be."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from servers import serving

from configs.errors import UserError
from soups.experiment.released.fetch import CHUNK, Download, _total, fetch, fetch_all

CONTENT = np.random.default_rng(0).integers(0, 256, 3 * CHUNK + 7, dtype=np.uint8).tobytes()


def get(served, folder, name="a.bin"):
    wanted = Download(f"{served.url}/{name}", folder / name)
    fetch(wanted, threading.Event())
    return wanted


def test_a_file_arrives_whole_and_leaves_no_part(tmp_path):
    with serving({"a.bin": CONTENT}) as served:
        wanted = get(served, tmp_path / "new")
    assert wanted.path.read_bytes() == CONTENT
    assert [path.name for path in wanted.path.parent.iterdir()] == ["a.bin"]


def test_what_an_earlier_call_left_is_continued_by_a_range(tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(CONTENT[:1000])
    with serving({"a.bin": CONTENT}) as served:
        assert get(served, tmp_path).path.read_bytes() == CONTENT
    assert served.asked == [("a.bin", 1000)]


def test_a_server_without_ranges_sends_all_of_it_again_and_nothing_twice(tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(b"x" * 5000)
    with serving({"a.bin": CONTENT}, ranges=False) as served:
        assert get(served, tmp_path).path.read_bytes() == CONTENT


def test_an_answer_that_is_cut_off_is_continued_by_itself(tmp_path):
    with serving({"a.bin": CONTENT}, cut_after=CHUNK + 3, cuts=2) as served:
        assert get(served, tmp_path).path.read_bytes() == CONTENT
    assert [first for _, first in served.asked] == [0, CHUNK + 3, 2 * CHUNK + 6]


def test_a_part_that_is_already_whole_is_kept_and_one_that_is_too_long_is_not(tmp_path):
    (tmp_path / ".a.bin.part").write_bytes(CONTENT)
    with serving({"a.bin": CONTENT}) as served:
        assert get(served, tmp_path).path.read_bytes() == CONTENT
        (tmp_path / ".a.bin.part").write_bytes(CONTENT + b"more")
        assert get(served, tmp_path).path.read_bytes() == CONTENT


def test_a_file_that_never_becomes_as_long_as_it_should_does_not_appear(tmp_path):
    with serving({"a.bin": CONTENT}, cut_after=0, cuts=100) as served, pytest.raises(UserError, match="came of"):
        get(served, tmp_path)
    assert not (tmp_path / "a.bin").exists()


def test_a_range_of_a_file_of_unknown_length_must_be_as_long_as_its_own_header_says():
    headers = {"Content-Range": "bytes 5-9/*", "Content-Length": "5"}
    assert _total(SimpleNamespace(status=206, headers=headers), 5) == 10
    assert _total(SimpleNamespace(status=206, headers=headers | {"Content-Range": "bytes 5-9/20"}), 5) == 20


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(tmp_path):
    with serving({"a.bin": CONTENT}, states=[503]) as served:
        assert get(served, tmp_path).path.read_bytes() == CONTENT
        with pytest.raises(UserError, match=r"b\.bin: the server answers 404"):
            get(served, tmp_path, "b.bin")
    assert [name for name, _ in served.asked] == ["a.bin", "a.bin", "b.bin"]


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
