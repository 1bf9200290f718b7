"""Averaging files against a slow float64 reference, in any order, and one clear error for each bad input."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from configs.errors import UserError
from soups import mean as files_module
from soups.average import Average
from soups.files import checkpoints
from soups.files.checkpoints import digest_file
from soups.files.dtypes import round_once
from soups.files.folders import INDEX
from soups.files.opening import opened
from soups.files.reading import Reading
from soups.mean import average_files
from soups.verify import verify
from tests.saved import save

ROOT = Path(__file__).resolve().parents[1]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = [torch.int64, torch.int32, torch.uint8, torch.bool]
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 7 elements, so that small tensors span several."""
    monkeypatch.setattr(files_module, "BLOCK", 7)
    monkeypatch.setattr(checkpoints, "BLOCK", 7)


@st.composite
def pools(draw):
    """Up to 5 models of one random layout; integers equal, counters free."""
    models, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    pool = [{} for _ in range(models)]
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(), (0,), (1,), (3, 5), (2, 3, 4), (29,)]))
        dtype = draw(st.sampled_from(FLOATS + INTEGERS))
        shared = torch.randint(0, 2, shape, generator=generator).to(dtype)
        scale = 10.0 ** draw(st.integers(-6, 3))
        for state in pool:
            noisy = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
            state[f"t{i}"] = noisy if dtype in FLOATS else shared.clone()
    if draw(st.booleans()):
        for state in pool:
            state["bn.num_batches_tracked"] = torch.randint(0, 99, (), generator=generator)
    return pool


def nearest(exact, dtype):
    """The number of `dtype` nearest to a fraction, ties to even, by trying the neighbours of torch's answer."""
    start = torch.tensor(float(exact), dtype=torch.float64).to(dtype)
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}[dtype]
    near = [(start.view(bits) + step).view(dtype) for step in (-1, 0, 1)]
    near = [value for value in near if torch.isfinite(value)]
    return min(near, key=lambda v: (abs(Fraction(v.item()) - exact), v.view(bits).item() % 2))


def reference(pool, weights):
    """The policy, slowly: one element at a time."""
    mean = {}
    for name, first in pool[0].items():
        if not first.is_floating_point():
            mean[name] = torch.stack([state[name] for state in pool]).amax(0)
            continue
        total = sum(state[name].double() * weight for state, weight in zip(pool, weights, strict=True))
        mean[name] = total / sum(weights)
    return mean


@QUICK
@given(pool=pools(), how=st.sampled_from(["safetensors", "pt", "shards"]), data=st.data())
def test_the_mean_is_the_float64_mean_in_any_format_order_and_number_of_threads(tmp_path, pool, how, data):
    weights = data.draw(st.one_of(st.none(), st.lists(st.floats(0.1, 3), min_size=len(pool), max_size=len(pool))))
    paths = [save(tmp_path / how, f"m{i}", state, how) for i, state in enumerate(pool)]
    out = tmp_path / "soup.safetensors"
    average_files(paths, out, weights=weights, threads=1)
    soup, expected = load_file(out), reference(pool, weights or [1.0] * len(pool))
    assert soup.keys() == expected.keys()
    for name, value in soup.items():
        assert value.dtype == pool[0][name].dtype
        assert value.shape == pool[0][name].shape
        if value.is_floating_point():
            scale = max([state[name].double().abs().max().item() for state in pool] if value.numel() else [0])
            grain = torch.finfo(value.dtype).eps / 2 + 1e-14
            torch.testing.assert_close(
                value.double(),
                expected[name],
                rtol=grain,
                atol=1e-14 * scale + torch.finfo(value.dtype).tiny * grain * 4,
            )
        else:
            assert torch.equal(value, expected[name])
    order = data.draw(st.permutations(range(len(pool))))
    again = tmp_path / "again.safetensors"
    shuffled = None if weights is None else [weights[i] for i in order]
    average_files([paths[i] for i in order], again, weights=shuffled, threads=2)
    assert again.read_bytes() == out.read_bytes()


@QUICK
@given(pool=pools())
def test_files_and_the_running_average_in_memory_agree(tmp_path, pool):
    pool = [{k: v for k, v in state.items() if v.dtype != torch.float64} or {"t": torch.zeros(1)} for state in pool]
    paths = [save(tmp_path, f"m{i}", state) for i, state in enumerate(pool)]
    average_files(paths, tmp_path / "soup.safetensors")
    average = Average().plus(pool[0])
    for state in pool[1:]:
        average = average.plus(state)
    soup, memory = load_file(tmp_path / "soup.safetensors"), average.weights()
    for name in soup:  # they may sum in different orders, so float32 may differ in the last bit, though it seldom does
        torch.testing.assert_close(soup[name], memory[name], rtol=torch.finfo(torch.float32).eps, atol=0)
        assert soup[name].dtype == memory[name].dtype


def test_neither_order_nor_names_of_files_decide_a_bit_even_where_float64_sums_depend_on_it(tmp_path):
    # (2**60 + 1) - 2**60 is 0 in float64, (2**60 - 2**60) + 1 is 1; the first bytes of all files are equal, so that
    # only the digest of the whole content can order them.
    states = [{"w": torch.tensor([0.0] * 2000 + [value])} for value in (2.0**60, 1.0, -(2.0**60), 3.0)]
    found = set()
    for names in ("abcd", "acbd", "dcba", "bdac"):
        paths = [save(tmp_path, name, state) for name, state in zip(names, states, strict=True)]
        average_files(sorted(paths), tmp_path / "soup.safetensors")
        found.add(load_file(tmp_path / "soup.safetensors")["w"][-1].item())
    assert len(found) == 1


def test_the_same_model_with_two_weights_is_summed_in_one_order(tmp_path):
    # Float64 models of many numbers show any change of order; some of the others are summed before the twins.
    random = torch.Generator().manual_seed(0)
    twin, *others = ({"w": torch.randn(500, generator=random, dtype=torch.float64)} for _ in range(8))
    rest = [save(tmp_path, f"n{i}", state) for i, state in enumerate(others)]
    one, two = save(tmp_path / "a", "m", twin), save(tmp_path / "b", "m", twin)
    weights = [0.1 * i + 0.05 for i in range(7)]
    names = ["m", "m", *(f"n{i}" for i in range(7))]  # else their folders would tell the twins apart in the record
    average_files([one, two, *rest], tmp_path / "x.safetensors", weights=[0.3, 0.6, *weights], names=names)
    average_files([one, two, *rest], tmp_path / "y.safetensors", weights=[0.6, 0.3, *weights], names=names)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


@QUICK
@given(st.lists(st.floats(-1e5, 1e5) | st.floats(-1e-6, 1e-6), min_size=1, max_size=20), st.integers(-40, -7))
def test_float64_is_rounded_to_16_bits_once(values, exponent):
    # Numbers just beside the middle of two neighbours, where a rounding on the way would tell.
    middles = [v.item() * (1 + 2.0**-8) for v in torch.tensor(values, dtype=torch.bfloat16)]
    beside = [m * (1 + sign * 2.0**exponent) for m in middles for sign in (-1, 0, 1)]
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        numbers = [v for v in [*values, *beside] if abs(v) < 6e4]
        stored = round_once(np.array(numbers, np.float64), name).view("<i2")
        for number, got in zip(numbers, torch.from_numpy(stored).view(dtype), strict=True):
            want = nearest(Fraction(number), dtype)
            assert got.item() == want.item(), number


def test_bfloat16_that_overflows_or_vanishes_is_rounded_like_any_other():
    values = np.array([3.4e38, 3.3961775292304601e38, -1e-46, 1e-40, -0.0, 2.0**-134, 1.5 * 2.0**-133])
    expected = torch.tensor(values).to(torch.bfloat16)
    got = torch.from_numpy(round_once(values, "BF16").view("<i2")).view(torch.bfloat16)
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def test_weights_may_differ_from_tensor_to_tensor(tmp_path):
    paths = [save(tmp_path, f"m{v}", {"a": torch.tensor([v]), "b": torch.tensor([v])}) for v in (1.0, 5.0)]
    average_files(paths, tmp_path / "soup.safetensors", weights={"a": [1, 3], "b": [1, 0]})
    assert {k: v.item() for k, v in load_file(tmp_path / "soup.safetensors").items()} == {"a": 4.0, "b": 1.0}


def test_the_output_kind_is_the_one_asked_for_and_integers_keep_theirs(tmp_path):
    paths = [save(tmp_path, f"m{v}", {"w": torch.tensor([v]), "n": torch.tensor(3)}) for v in (1.0, 1.0 + 2**-7)]
    average_files(paths, tmp_path / "soup.safetensors", dtype="BF16")
    soup = load_file(tmp_path / "soup.safetensors")
    assert (soup["w"].dtype, soup["n"].dtype) == (torch.bfloat16, torch.int64)
    assert soup["w"].item() == 1.0  # the middle of two neighbours goes to the even one


def test_tied_tensors_are_counted_once_and_stay_tied(tmp_path):
    paths = []
    for i in range(3):
        w = torch.arange(12.0).reshape(4, 3) + i
        paths.append(save(tmp_path, f"m{i}", {"head": w, "embedding": w, "t": w.t(), "b": torch.zeros(2)}, "pt"))
    soup = average_files(paths, tmp_path / "soup.safetensors")
    assert soup.layout.ties == {"head": "embedding"}
    sizes = [entry.size for entry in soup.layout.entries.values()]
    assert sum(sizes) == 12 + 12 + 2  # a transposed view is a tensor of its own
    written = load_file(tmp_path / "soup.safetensors")
    assert written.keys() == {"embedding", "head", "t", "b"}  # a network with both names loads it strictly
    assert torch.equal(written["head"], written["embedding"])
    # A file of transformers, which drops one of the names, fits to it; a soup can be an ingredient.
    lone = torch.arange(12.0).reshape(4, 3) + 5
    dropped = save(tmp_path, "dropped", {"head": lone, "t": torch.zeros(3, 4), "b": torch.zeros(2)})
    mixed = average_files([tmp_path / "soup.safetensors", dropped], tmp_path / "mixed.safetensors")
    assert mixed.layout.ties == {"embedding": "head"}
    with opened([tmp_path / "soup.safetensors", dropped]) as found:
        assert {i.digest for i in mixed.ingredients} == {digest_file(checkpoint) for checkpoint in found}
    for name in ("head", "embedding"):
        assert torch.equal(load_file(tmp_path / "mixed.safetensors")[name], torch.arange(12.0).reshape(4, 3) + 3)


def test_a_tensor_tied_here_and_separate_there_is_refused(tmp_path):
    w = torch.zeros(3)
    tied = save(tmp_path, "tied", {"a": w, "b": w}, "pt")
    apart = save(tmp_path, "apart", {"a": w, "b": w + 1})
    with pytest.raises(UserError, match=r"apart.safetensors: 'a' and 'b' are two tensors, but tied in another file"):
        average_files([tied, apart], tmp_path / "soup.safetensors")


def test_batch_norm_statistics_are_averaged_or_kept_and_counters_take_the_largest(tmp_path):
    def state(value, count):
        return {
            "bn.running_mean": torch.tensor([value]),
            "bn.running_var": torch.tensor([value + 1]),
            "bn.weight": torch.tensor([value]),
            "bn.num_batches_tracked": torch.tensor(count),
        }

    paths = [save(tmp_path, f"m{i}", state(float(i), 10 - i)) for i in range(3)]
    for keep_from, mean in ((None, 1.0), (2, 2.0)):
        average_files(paths, tmp_path / "soup.safetensors", keep_from=keep_from)
        soup = load_file(tmp_path / "soup.safetensors")
        assert (soup["bn.running_mean"].item(), soup["bn.running_var"].item()) == (mean, mean + 1)
        assert (soup["bn.weight"].item(), soup["bn.num_batches_tracked"].item()) == (1.0, 10)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"w": torch.zeros(2)}, r"b.safetensors: tensor 'n' of .*a.safetensors is missing"),
        ({"w": torch.zeros(2), "n": torch.tensor(1), "v": torch.zeros(1)}, r"b.safetensors: tensor 'v' is not in .*a"),
        ({"w": torch.zeros(3), "n": torch.tensor(1)}, r"b.safetensors: tensor 'w' is F32 \(3,\), but F32 \(2,\) in"),
        ({"w": torch.zeros(2).int(), "n": torch.tensor(1)}, r"'w' is I32 \(2,\), but F32 \(2,\) in"),
        ({"w": torch.tensor([0, float("nan")]), "n": torch.tensor(1)}, "b.safetensors: tensor 'w' holds NaN or inf"),
        ({"w": torch.tensor([0, -float("inf")]), "n": torch.tensor(1)}, "b.safetensors: tensor 'w' holds NaN or inf"),
        ({"w": torch.zeros(2), "n": torch.tensor(2)}, "integer tensor 'n' differs from that of"),
    ],
)
@pytest.mark.parametrize("how", ["safetensors", "pt", "shards"])
def test_models_that_do_not_fit_together_are_refused_by_file_and_tensor(tmp_path, other, words, how):
    one = save(tmp_path, "a", {"w": torch.zeros(2), "n": torch.tensor(1)}, how)
    two = save(tmp_path, "b", other, how)
    ending = {"safetensors": ".safetensors", "pt": ".pt", "shards": f"/{INDEX}"}[how]
    with pytest.raises(UserError, match=words.replace(".safetensors", ending)):
        average_files([one, two], tmp_path / "soup.safetensors")
    assert not (tmp_path / "soup.safetensors").exists()


def test_a_sum_past_float64_and_a_mean_past_the_output_kind_are_refused(tmp_path):
    huge = [save(tmp_path, f"m{i}", {"w": torch.tensor([1.7e308], dtype=torch.float64)}) for i in range(2)]
    with pytest.raises(UserError, match="'w': the sum over the models is past what float64 can hold"):
        average_files(huge, tmp_path / "soup.safetensors")
    with pytest.raises(UserError, match=r"'w': 1.7e\+308 is past what F16 can hold"):
        average_files(huge[:1], tmp_path / "soup.safetensors", dtype="F16")


def test_wrong_weights_and_wrong_names_are_refused(tmp_path):
    path = save(tmp_path, "a", {"w": torch.ones(2)})
    with pytest.raises(UserError, match="need a list for every tensor and nothing else, but see 'v'"):
        average_files([path], tmp_path / "soup.safetensors", weights={"w": [1], "v": [1]})
    with pytest.raises(UserError, match=r"a soup is written as .safetensors"):
        average_files([path], tmp_path / "soup.pt")
    with pytest.raises(UserError, match="no ingredients"):
        average_files([], tmp_path / "soup.safetensors")


PEAK = """
import sys, threading, time
from pathlib import Path
from soups.mean import average_files
from soups.verify import verify
peak = 0
def watch():
    global peak
    while True:
        with open("/proc/self/status") as file:
            peak = max(peak, next(int(line.split()[1]) for line in file if line.startswith("RssAnon")))
        time.sleep(0.001)
paths = [Path(path) for path in sys.argv[2:]]
if paths[0].suffix == ".pt":
    import torch
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.02)
before = peak
average_files(paths, Path(sys.argv[1]))
assert paths[0].suffix == ".pt" or "torch" not in sys.modules
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("how", ["safetensors", "pt"])
def test_memory_does_not_grow_with_the_number_of_models_nor_with_their_size(tmp_path, how):
    path = save(tmp_path, "m", {f"w{i}": torch.randn(1000, 1000) for i in range(8)}, how)  # 31 MiB
    peaks = {}
    for models in (4, 16):
        links = [tmp_path / f"{models}-{i}{path.suffix}" for i in range(models)]
        for link in links:
            link.symlink_to(path)
        command = [sys.executable, "-c", PEAK, str(tmp_path / "soup.safetensors"), *map(str, links)]
        few_files = ["sh", "-c", 'ulimit -Sn 16; exec "$@"', "sh"]  # a limit that pools of shards are past
        answer = subprocess.run([*few_files, *command], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks[models] = int(answer.stdout) / 1024
    assert max(peaks.values()) < 16  # MiB: two threads' blocks
    assert abs(peaks[16] - peaks[4]) < 6


def test_a_layer_of_zeros_that_a_file_lacks_is_no_copy_of_another(tmp_path):
    one = save(tmp_path, "a", {"w": torch.zeros(2, 2), "v": torch.zeros(2, 2)})
    two = save(tmp_path, "b", {"w": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"b.safetensors: tensor 'v' of .*a.safetensors is missing .--only-common"):
        average_files([one, two], tmp_path / "soup.safetensors")


def heads(tmp_path):
    """Two models of one backbone: the second has another head and no position_ids."""
    body = {"body": torch.ones(2), "position_ids": torch.arange(3)}
    return [
        save(tmp_path, "a", body | {"head.w": torch.ones(2, 2)}),
        save(tmp_path, "b", {"body": torch.zeros(2), "head.w": torch.zeros(3, 2), "extra": torch.zeros(1)}),
    ]


@pytest.mark.parametrize("reading", [Reading(only_common=True), Reading(exclude="^head|position_ids|extra")])
def test_tensors_that_are_not_averaged_are_kept_of_one_file_and_listed(tmp_path, reading):
    paths, out = heads(tmp_path), tmp_path / "soup.safetensors"
    for first, head, kept, dropped in (
        (0, torch.ones(2, 2), ("head.w", "position_ids"), ("extra",)),
        (1, torch.zeros(3, 2), ("extra", "head.w"), ("position_ids",)),
    ):
        soup = average_files(paths, out, reading=reading, first=first)
        assert (soup.layout.kept, soup.layout.dropped) == (kept, dropped)
        written = load_file(out)
        assert written.keys() == {"body", *kept}
        assert torch.equal(written["body"], torch.full((2,), 0.5))
        assert torch.equal(written["head.w"], head)
        with opened(paths) as found:  # digests are those of whole files
            assert {i.digest for i in soup.ingredients} == {digest_file(checkpoint) for checkpoint in found}
        assert verify(out) == ""


def test_a_pattern_that_finds_nothing_or_everything_or_is_none_is_refused(tmp_path):
    paths = heads(tmp_path)
    for pattern, words in (("heed", "finds no tensor"), ("(", "not a regular expression"), (".", "no tensors to av")):
        with pytest.raises(UserError, match=words):
            average_files(paths, tmp_path / "soup.safetensors", reading=Reading(exclude=pattern))


def test_several_kinds_are_averaged_in_float64_and_written_in_the_narrowest_that_holds_them(tmp_path):
    for kinds, written in (
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ):
        values = (torch.tensor([1 + 2.0**-7, 3.0]), torch.tensor([1.0, 2.0]))
        paths = [save(tmp_path, f"m{i}", {"w": v.to(k)}) for i, (v, k) in enumerate(zip(values, kinds, strict=True))]
        soup = average_files(paths, tmp_path / "soup.safetensors")
        mean = load_file(tmp_path / "soup.safetensors")["w"]
        assert (mean.dtype, mean.tolist()) == (written, [1 + 2.0**-8, 2.5])
        kind = {torch.float32: "F32", torch.float64: "F64"}[written]
        assert soup.remarks() == [f"files have several kinds of numbers; the soup is {kind}"]
    assert average_files(paths[:1], tmp_path / "soup.safetensors").remarks() == []


def test_infinities_that_all_models_have_in_one_place_are_a_masks(tmp_path):
    mask = torch.full((3, 3), -torch.inf).triu(1)
    paths = [save(tmp_path, f"m{i}", {"mask": mask, "w": torch.ones(1) * i}) for i in range(2)]
    average_files(paths, tmp_path / "soup.safetensors", weights=[1, 0])
    assert torch.equal(load_file(tmp_path / "soup.safetensors")["mask"], mask)
    other = save(tmp_path, "other", {"mask": -mask, "w": torch.ones(1)})
    with pytest.raises(UserError, match=r"tensor 'mask' holds NaN or infinity"):
        average_files([*paths, other], tmp_path / "soup.safetensors")


FORMAT_1 = {  # written before format 2, of m0.pt and m1.pt below: tied names once, prefixes kept, sums from 0
    "m0": {"module.w": [-0.0, 1.0], "module.e": [[1.0, 2.0]]},
    "m1": {"module.w": [-0.0, 2.0], "module.e": [[3.0, 4.0]]},
}


def test_a_soup_of_format_1_is_verified_to_the_byte(tmp_path):
    for name, state in FORMAT_1.items():
        tensors = {key: torch.tensor(value) for key, value in state.items()}
        torch.save(tensors | {"module.head": tensors["module.e"]}, tmp_path / f"{name}.pt")
    (tmp_path / "soup.safetensors").write_bytes((Path(__file__).parent / "data/format_1.safetensors").read_bytes())
    assert verify(tmp_path / "soup.safetensors") == ""
    average_files([tmp_path / "m0.pt", tmp_path / "m1.pt"], tmp_path / "new.safetensors")
    assert load_file(tmp_path / "new.safetensors").keys() == {"w", "e", "head"}
    assert load_file(tmp_path / "new.safetensors")["w"].view(torch.int32)[0] == torch.iinfo(torch.int32).min  # -0.0
