"""A `python` whose commands start in milliseconds: each is forked from a process that has imported the libraries.

A command is a process of its own, with its own folder, environment, streams and exit status, and imports the project's
modules itself; it is spared the seconds that torch, pandas and Hydra take to load. It can be killed like any other.
Tests of what a start costs or imports, and of memory, use `sys.executable`.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import io
import json
import multiprocessing
import multiprocessing.process
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.data",
    "torchvision.transforms",
    "timm.data.mixup",
    "timm.optim",
    "open_clip",
    "transformers",
    "hydra",
    "pydantic",
    "pandas",
    "scipy.special",
    "sklearn.linear_model",
    "safetensors.torch",
    "rich.progress",
    "threadpoolctl",
    "xxhash",
    "PIL.Image",
    "matplotlib.figure",
    "tabulate",
)
# Variables that libraries and the interpreter read when they are loaded begin with one of these: a command that has
# other values than the process it would be forked from starts from nothing. How many threads compute is set when it is
# forked, as a stage that a test calls in its own process leaves other numbers there.
READ_AT_LOADING = ("CUDA_", "HF_", "LD_", "MALLOC_", "MPL", "PYTHONHASHSEED", "PYTHONWARNINGS", "TRANSFORMERS_")
SHARED = "MODEL_SOUPS_TESTS_PYTHON"  # names the quick python that the processes of one run of pytest share
ASIDE = 200  # a number above those of files that processes inherit
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # no command under test asks the hub
CLIENT = """#!{python} -SE
import json, os, select, signal, socket, sys

words, environment, parent = sys.argv[1:], {offline} | dict(os.environ), os.getppid()
if words[:1] == ["-u"]:  # as torchrun starts its processes
    words, environment["PYTHONUNBUFFERED"] = words[1:], "1"
if words[:1] == ["-B"]:  # as multiprocessing does
    words = words[1:]
files = [0, 1, 2]
if words[:1] == ["-c"] and words[1].startswith("from multiprocessing."):
    files += [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]
    files = [number for number in files if os.path.exists(f"/proc/self/fd/{{number}}")]  # but that of the listing
read = {{name: value for name, value in environment.items() if name.startswith({prefixes})}}
if read != {read} or not (words and (words[0] in ("-m", "-c") or words[0].endswith(".py"))):
    os.execv({python!r}, [{python!r}, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
ignores = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
request = json.dumps([words, os.getcwd(), environment, files, parent, ignores]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], files)
server.sendall(request)
for number in files[3:]:  # the ends of pipes, whose closing says something
    os.close(number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
while len(files) > 3 and not select.select([server], [], [], 0.5)[0]:
    if os.getppid() != parent:  # a worker, which ends with the process that started it
        os.kill(os.getpid(), signal.SIGKILL)
status = int.from_bytes(server.recv(4), "big", signed=True)
if status < 0:
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@lru_cache(maxsize=1)
def python() -> str:
    """The path of the quick `python`, when it can be used; it is there until the process that began the tests ends."""
    path, began = os.environ.get(SHARED) or begin(), time.monotonic()
    while not Path(path).with_name("socket").exists():
        assert time.monotonic() - began < 300, "the libraries cannot be loaded"
        time.sleep(0.05)
    return path


def begin() -> str:
    """Start to load the libraries, and return the path that the quick `python`, alone in its folder, will have."""
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address, client, environment = str(folder / "socket"), folder / "python", OFFLINE | dict(os.environ)
    read = {name: value for name, value in environment.items() if name.startswith(READ_AT_LOADING)}
    known = {
        "python": sys.executable,
        "address": address,
        "prefixes": READ_AT_LOADING,
        "offline": OFFLINE,
        "read": read,
    }
    client.write_text(CLIENT.format(**known))
    client.chmod(0o755)
    words = [sys.executable, __file__, address, str(client)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=folder, env=environment)
    atexit.register(server.kill)
    return str(client)


def _received(link: socket.socket) -> tuple[list, list[int]]:
    """Words, folder and environment of a command, its files' numbers, parent and heed of Ctrl-C; and the files."""
    head, streams, _, _ = socket.recv_fds(link, 8, 64)
    size, found = int.from_bytes(head, "big"), b""
    while len(found) < size:
        found += link.recv(size - len(found))
    return json.loads(found), streams


def _place(files: list[int], numbers: list[int]) -> None:
    """Give open files the numbers that they have in the process that sent them."""
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD, ASIDE) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(aside, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def _ended(link: socket.socket, status: int) -> None:
    """Tell a client how its command ended, where it still waits."""
    with link, contextlib.suppress(OSError):
        link.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))


def serve(address: str) -> list:
    """Fork for each command that is asked for; returns in the forked process alone, with what it has to do."""
    listener, links, (woken, wake) = socket.socket(socket.AF_UNIX), {}, os.pipe()
    listener.bind(f"{address}-")
    listener.listen(64)
    Path(f"{address}-").rename(address)  # which is there when it listens
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    parent = os.getppid()
    while os.getppid() == parent:
        ready = select.select([woken, listener, *links], [], [], 5)[0]
        for link in [link for link in ready if link in links]:
            number = link.recv(1)
            os.kill(links[link], number[0] if number else signal.SIGKILL)
            if not number:  # the client was killed; what it stands for is gone before another command starts
                _ended(link, os.waitpid(links.pop(link), 0)[1])
        if woken in ready:
            os.read(woken, 4096)
        for link, process in list(links.items()):
            gone, status = os.waitpid(process, os.WNOHANG)
            if gone:
                del links[link]
                _ended(link, status)
        if listener in ready:
            link = listener.accept()[0]
            command, streams = _received(link)
            process = os.fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (listener, link, *links):
                    end.close()
                for end in (woken, wake):
                    os.close(end)
                _place(streams, command[3])
                return command
            links[link] = process
            for stream in streams:
                os.close(stream)
    os._exit(0)


def run(words: list[str], folder: str, environment: dict[str, str], files: list[int], parent: int) -> None:
    """Be the interpreter that was asked for."""
    os.chdir(folder)
    os.getppid = lambda: parent  # as of the process that the client stands for, and that ends it with its own end
    if "OMP_NUM_THREADS" in environment:
        import threadpoolctl  # which is loaded, as torch is; the process that begins the tests needs neither
        import torch

        threads = int(environment["OMP_NUM_THREADS"])
        torch.set_num_threads(threads)
        threadpoolctl.threadpool_limits(threads)
    multiprocessing.process.ORIGINAL_DIR = folder  # workers look there for a script that is named relative to it
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if "PYTHONUNBUFFERED" in environment:
        sys.stdout.reconfigure(write_through=True)
    what, *rest = words
    match what:
        case "-m":
            sys.path[0], sys.argv = folder, words[1:]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        case "-c":
            sys.path[0], sys.argv = "", ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        case _:
            sys.path[0], sys.argv = str(Path(what).resolve().parent), words
            runpy.run_path(what, run_name="__main__")


def in_two(words: list[str], cwd: Path = ROOT, **more: str) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each of two processes of a command, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = more | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    started = [subprocess.Popen([python(), *words], cwd=cwd, env=rank, **pipes) for rank in ranks]
    try:
        printed = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, printed, strict=True)]


def here(words: list[str]) -> subprocess.CompletedProcess[str]:
    """What a command of the project prints and ends with, in this process, where its modules are imported already."""

    def work() -> None:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")

    out, err, typed = io.StringIO(), io.StringIO(), words[1:] if words[0] == "-m" else words
    with patch.object(sys, "argv", typed), patch.dict(os.environ), redirect_stdout(out), redirect_stderr(err):
        status = status_of(work)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def status_of(work: Callable[[], None]) -> int:
    """Do something as the interpreter would, and return what it would end with."""
    status = 0
    try:
        work()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if ended.code != status and ended.code is not None:
            print(ended.code, file=sys.stderr)
    except BaseException:  # an interpreter prints whatever comes
        traceback.print_exc()
        status = 1
    return status


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # what is shared with the forked processes stays shared
    *asked, ignores = serve(sys.argv[1])
    # It heeds Ctrl-C, unless the process that starts it does not.
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignores else signal.default_int_handler)
    asked[2]["PYTHON_EXEC"] = sys.argv[2]  # torchrun starts its processes with it
    multiprocessing.set_executable(sys.argv[2])  # and multiprocessing
    ended_with = status_of(lambda: run(*asked))
    threading._shutdown()  # the interpreter's own end, without the seconds of taking every module apart
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # a helper of multiprocessing closes them
            stream.flush()
    os._exit(ended_with)
