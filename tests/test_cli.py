"""The command `soups`: words, names of files, refusals, a killed run, two processes, and every example of its help."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soups.cli import RUN, main
from soups.made_up import moved
from soups.verify import verify
from soups.words import COMMANDS
from tests.commands import here, in_two, python
from tests.kinds import model
from tests.saved import record_in

ROOT = Path(__file__).resolve().parents[1]
SEE = """import os, struct, sys, time
with open("calls", "a") as file:
    print(os.environ.get("CUDA_VISIBLE_DEVICES", "") + os.environ.get("PAUSE", ""), file=file)
time.sleep(float(os.environ.get("PAUSE", "0")))
print("loading ...")
print(abs(struct.unpack("<f", open(sys.argv[1], "rb").read()[-4:])[0] - 1.4))
"""  # the last four bytes of a file of one number are the number
SCORE = ["--score", f"{sys.executable} -S see.py {{soup}}", "--goal", "min"]


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Models of one number under the names that Lightning gives them, and a program that scores them."""
    for i, value in enumerate((2.0, 1.0, 6.0)):
        save_file({"w": torch.tensor([value])}, tmp_path / f"epoch={i}-step=(1 {i}).safetensors")
    (tmp_path / "see.py").write_text(SEE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(words, capsys):
    """Exit status, and what was printed."""
    status = 0
    try:
        main(words)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def files():
    return sorted(str(path) for path in Path().glob("epoch=*"))


def test_greedy_by_a_command_prints_its_table_and_keeps_it_in_the_file(pool, capsys):
    status, out, err = ended(["greedy", *files(), *SCORE, "--out", "soup.safetensors"], capsys)
    assert status == 0, err
    assert out.splitlines()[2].split()[-2:] == ["0.1000", "kept"]
    assert out.splitlines()[-1] == "soup.safetensors"
    assert load_file("soup.safetensors")["w"].item() == 1.5
    assert [(each["file"], each["accepted"]) for each in record_in("soup.safetensors")["note"]["decisions"]] == [
        ("epoch=1-step=(1 1).safetensors", True),
        ("epoch=0-step=(1 0).safetensors", True),
        ("epoch=2-step=(1 2).safetensors", False),
    ]
    assert len((pool / "calls").read_text().splitlines()) == 5
    assert not list(pool.glob("*.journal.jsonl"))
    assert ended(["verify", "soup.safetensors"], capsys)[0] == 0


def test_weights_are_printed_beside_their_files_and_counted_as_typed(pool, capsys):
    first, _, third = files()
    _, out, _ = ended(["weighted", third, first, "--weights", "3,1", "--out", "soup.safetensors"], capsys)
    assert [line.split()[-1] for line in out.splitlines()[1:3]] == ["0.75", "0.25"]
    assert out.splitlines()[1].startswith("epoch=2-step=(1 2).safetensors")
    assert load_file("soup.safetensors")["w"].item() == 5.0


def test_models_are_sorted_as_people_count(pool, capsys):
    for i in (10, 9):
        shutil.copy(files()[0], f"run{i}.safetensors")
    _, out, _ = ended(["uniform", "run10.safetensors", "run9.safetensors", "--out", "s.safetensors"], capsys)
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["run9.safetensors", "run10.safetensors"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["greedy", "--out", "s.pt"], "the following arguments are required: FILE"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["unifrom"], "did you mean uniform?"),
        (["uniform", "x.pt", "--out", "s.safetensors", "--batch-norm", "kep"], "did you mean keep?"),
        (["greedy", "epoch=*", "--out", "s.pt"], "one of the arguments --score --images"),
        (["greedy", "epoch=*", "--out", "s.pt", "--score", "f {soup}", "--goal", "max", "--columns", "a"],
         "--columns is for --texts, and --score would ignore it"),
        (["greedy", "epoch=*", "--out", "s.pt", "--images", "x", "--goal", "max"], "--goal is for --score"),
        (["greedy", "epoch=*", "--out", "s.pt", "--images", "nowhere", "--network", "timm:x"], "nowhere does not"),
        (["greedy", "epoch=*", "--out", "s.pt", "--images", "."], "--images needs --network"),
        (["uniform", "epoch=*", "--out", "s.pt", "--alpha", "0.5"], "unrecognized arguments: --alpha 0.5"),
        (["uniform", "nothing.pt", "--out", "s.pt"], "nothing.pt does not exist"),
        (["uniform", "epoch=*", "--out", "s.onnx"], "a soup is written as .safetensors, .pt"),
        (["greedy", "epoch=*", *SCORE, "--out", "old.pt"], "is there already: name another file, or type --force"),
        (["greedy", "epoch=*", *SCORE, "--out", "old.pt/s.pt"], "--out old.pt/s.pt would lie in a file"),
        (["greedy", "epoch=*", *SCORE, "--out", "/dev/null"], "--out /dev/null is a file"),
        (["greedy", "epoch=*", *SCORE, "--out", "s" * 300 + ".pt"], "(File name too long): name another place"),
        (["weighted", "epoch=*", "--weights", "a", "--out", "s.pt"], "numbers with commas between them"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line_and_status_2_before_any_work(pool, capsys, words, error):
    (pool / "old.pt").write_bytes(b"of yesterday")
    status, _, err = ended(words, capsys)
    assert (status, len(err.splitlines())) == (2, 1), err
    assert error in err
    assert not (pool / "calls").exists()
    assert (pool / "old.pt").read_bytes() == b"of yesterday"


def test_the_words_of_before_are_refused_with_what_to_type_now():
    answer = here(["-m", "soups", "recipe=greedy", "ingredients=[run/*.pt]", "out=s.pt"])
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: files are named without ingredients=[...] now: python -m soups u")


def test_the_doctor_reads_what_the_recipes_read(pool, capsys):
    for i in range(2):
        torch.save({"model": {"w": torch.tensor([1.0])}, "ema": {"w": torch.tensor([2.0 + i])}}, f"m{i}.pt")
    printed = ended(["doctor", "m0.pt", "m1.pt"], capsys)[1]
    assert "holds several sets of weights" in printed
    assert "nothing wrong was found" in ended(["doctor", "m0.pt", "m1.pt", "--key", "ema"], capsys)[1]
    assert "are the same model" in ended(["doctor", "m0.pt", "m1.pt", "--key", "model"], capsys)[1]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_greedy_run_that_was_killed_goes_on_and_gives_the_same_bytes(how, pool, capsys):
    words = ["greedy", *files(), *SCORE]
    assert ended([*words, "--out", "whole.safetensors"], capsys)[0] == 0
    (pool / "calls").unlink()
    call = [sys.executable, "-m", "soups", *words, "--out", "soup.safetensors"]
    (pool / "between").mkdir()
    own = {"PYTHONPATH": str(ROOT), "PAUSE": "0.3", "TMPDIR": str(pool / "between")}
    run = subprocess.Popen(call, env=os.environ | own, stdout=subprocess.DEVNULL)
    journal = pool / "soup.safetensors.journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and len(journal.read_text().splitlines()) == 2):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)
    run.send_signal(how)
    run.wait()
    assert how == signal.SIGKILL or not list((pool / "between").iterdir())
    scored = len(journal.read_text().splitlines())
    assert ended([*words, "--out", "soup.safetensors"], capsys)[0] == 0
    assert (pool / "calls").read_text().splitlines().count("") == 5 - scored  # a command of the killed run pauses
    assert (pool / "soup.safetensors").read_bytes() == (pool / "whole.safetensors").read_bytes()


def pair(*words, cwd):
    """Exit status, output and errors of two processes of the command."""
    return in_two(["-m", "soups", *words], cwd, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["greedy", "with-replacement"])
def test_two_processes_of_torchrun_share_candidates_and_take_the_decisions_of_one(recipe, pool, capsys):
    save_file({"w": torch.tensor([1.1])}, pool / "epoch=3-step=(1 3).safetensors")
    words = [recipe, *files(), *SCORE]
    assert ended([*words, "--out", "one.safetensors"], capsys)[0] == 0
    alone = len((pool / "calls").read_text().splitlines())
    (pool / "calls").unlink()
    printed = pair(*words, "--out", "two.safetensors", cwd=pool)
    assert [status for status, _, _ in printed] == [0, 0], printed
    assert printed[1][1] == ""
    assert (pool / "two.safetensors").read_bytes() == (pool / "one.safetensors").read_bytes()
    calls = (pool / "calls").read_text().splitlines()
    assert set(calls) == {"0", "1"}
    assert alone <= len(calls) <= alone + 2


PARTS = """import torch
from tests.kinds import network

def parts(examples=7):
    images = torch.randn(examples, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return network(), [(images, torch.arange(examples) % 3)] * 2

def one_example():
    return *parts(1), lambda network, batch: network(batch[0]).square().mean()
"""


@pytest.mark.slow
def test_two_processes_of_torchrun_learn_what_one_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        torch.save(model(i), f"m{i}.pt")
    (tmp_path / "parts_of_it.py").write_text(PARTS)
    words = ["learned", "m0.pt", "m1.pt", "m2.pt", "--per", "layer"]
    assert ended([*words, "--loss", "parts_of_it:parts", "--out", "one.safetensors"], capsys)[0] == 0
    printed = pair(*words, "--loss", "parts_of_it:parts", "--out", "two.safetensors", cwd=tmp_path)
    assert [status for status, _, _ in printed] == [0, 0], printed
    assert printed[0][1].startswith("file")
    assert printed[1][1] == ""
    # Sums over processes are rounded in another order: the same to some digits, and not to the bit.
    one, two = (load_file(f"{name}.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    uniform = {name: sum(model(i)[name] for i in range(3)) / 3 for name in ("conv.weight", "fc.weight")}
    assert all((one[name] - mean).abs().max() > 1e-3 for name, mean in uniform.items())  # there was something to learn
    assert verify(tmp_path / "two.safetensors") == ""
    assert not list(tmp_path.glob("*.state.pt"))
    few = pair(*words, "--loss", "parts_of_it:one_example", "--out", "few.safetensors", cwd=tmp_path)
    assert [status for status, _, _ in few] == [2, 2]
    assert all("a batch of 1 examples has none for some of 2 processes" in each for _, _, each in few)


def test_an_error_of_one_process_ends_both_with_one_line(pool):
    (pool / "see.py").write_text("print('no score')")
    printed = pair("greedy", *files()[:1], *SCORE, "--out", "s.safetensors", cwd=pool)
    assert [status for status, _, _ in printed] == [2, 2]
    assert all("its last line is 'no score', not a number" in each for _, _, each in printed)


def test_the_export_of_before_says_what_to_type_now():
    answer = here(["-m", "soups.export", "soup=runs/demo/soups/greedy", "to=timm"])
    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1), answer.stderr
    assert "is now `soups export SOUP --to LIBRARY --out DIR`" in answer.stderr


# Examples of --help.


@pytest.fixture(scope="module")
def examples(made_up, tmp_path_factory):
    """A folder with everything that the examples name."""
    root = tmp_path_factory.mktemp("examples")
    for name, place in {"timm": "run", "held_out": "held_out", "test": "test", "adapters": "adapters"}.items():
        shutil.copytree(made_up / name, root / place)
    for name in ("held_out.tsv", "held_out.txt"):
        shutil.copy(made_up / name, root)
    for i, place in enumerate(("llama", "llama-0", "llama-1")):
        shutil.copytree(made_up / f"language/checkpoint-{i}", root / place)
    (root / "run/start.safetensors").rename(root / "start.safetensors")
    start = load_file(root / "start.safetensors")
    torch.save(start, root / "start.pt")
    for i, name in enumerate(("run/0.pt", "run/1.pt", "a.pt", "b.pt", "run/0.ckpt", "run/1.ckpt")):
        torch.save(moved(start, i), root / name)
    for i in range(3):
        shutil.copytree(made_up / f"texts/checkpoint-{i}", root / f"run/checkpoint-{i}")
        state = {"global_step": i, "log_history": [{"step": i, "eval_loss": 1 / (i + 1)}]}
        (root / f"run/checkpoint-{i}/trainer_state.json").write_text(json.dumps(state))
    (root / "questions.jsonl").write_text('{"prompt": "a good", "choices": ["film", "day"], "answer": 0}')
    (root / "my_eval.py").write_text(
        "def loss(weights):\n    return weights['head.bias'].double().norm()\naccuracy = lambda w: -loss(w)\n"
    )
    (root / "eval.py").write_text("print(0.5)\n")
    (root / "recipe.yaml").write_text("{recipe: uniform, models: run/*.safetensors, out: by_hand.safetensors}")
    models = "[{model: run/run0.safetensors}, {model: run/run1.safetensors}]"
    (root / "mergekit.yaml").write_text(f"{{merge_method: linear, models: {models}, parameters: {{weight: 1}}}}")
    (root / "scores.json").write_text(
        json.dumps({"run0.safetensors": 0.5, "run1.safetensors": 0.6, "run2.safetensors": 0.4})
    )
    return root


LINES = [(name, line.strip()) for name in RUN for line in COMMANDS[name][1].splitlines() if line.startswith("  soups ")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), LINES, ids=[line for _, line in LINES])
def test_an_example_of_the_help_runs(name, line, examples, monkeypatch, capsys):
    monkeypatch.chdir(examples)
    monkeypatch.setenv("PATH", f"{Path(python()).parent}{os.pathsep}{os.environ['PATH']}")
    words = shlex.split(line.replace("resnet50", "test_vit"))[1:]
    out = Path(words[words.index("--out") + 1]) if "--out" in words else None
    if name in ("verify", "export", "make"):
        main(["uniform", "run/*.safetensors", "--out", "soup.safetensors", "--force"])
        capsys.readouterr()
    status, printed, err = ended(words, capsys)
    assert status == 0, err
    assert printed
    if out is not None:
        assert out.exists()
        if out.suffix == ".safetensors":
            assert verify(out, examples / "run") in ("",) or "--init" in words
        shutil.rmtree(out) if out.is_dir() else out.unlink()


@pytest.mark.parametrize("name", RUN)
def test_the_help_of_a_command_has_its_examples(name, capsys):
    status, out, _ = ended([name, "--help"], capsys)
    assert status == 0
    assert all(line in out for line in COMMANDS[name][1].splitlines())
