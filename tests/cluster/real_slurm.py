"""A real Slurm on this machine: two emulated nodes, two partitions, and its accounting where that is installed.

Needs Debian's slurmctld, slurmd, slurm-client and munge (slurmdbd and mariadb-server-core for sacct), and root. No
systemd. Partition `high` preempts `main`, whose jobs go back into the queue. There is one such cluster on a machine.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NODES = ("node1", "node2")
CPUS = 2  # of each node; counted, not enforced
PORT = 16817  # slurmctld's; the next ones are slurmdbd's and the nodes'
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
ACCOUNTING = ("slurmdbd", "mariadbd")
FOLDER = Path(tempfile.gettempdir()) / "model-soups-slurm"
DAEMONS = ("slurmd-node1", "slurmd-node2", "slurmctld", "slurmdbd", "mariadbd", "munged")  # in the order of their end
HOSTS = Path("/etc/hosts")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"

CONTROLLER = """\
ClusterName=soups
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
GresTypes=gpu
KillWait=10
MinJobAge=300
InactiveLimit=0
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
{accounting}
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory={memory}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=10
"""
ACCOUNTED = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge/socket"""
DATABASE = """\
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
"""


def obstacle() -> str | None:
    """Why there can be no cluster here, or None where there can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"Slurm is not installed here ({', '.join(missing)} missing)"
    return None if os.geteuid() == 0 else "a Slurm of one's own needs root"


def until(happened: Callable[[], bool], seconds: float, what: str, folder: Path = FOLDER) -> None:
    """Wait for something; say what was waited for, and the ends of the daemons' logs, where it does not come."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-8:])
                for log in sorted(folder.glob("log/*"))
            )
            raise TimeoutError(f"{what}: not within {seconds:.0f} s\n{logs}")
        time.sleep(0.2)  # since most of what is waited for is asked of Slurm by a process of its own


@dataclass(frozen=True)
class Cluster:
    """A running cluster, spoken to by Slurm's own clients."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What its clients need, and nothing that Slurm itself would read as an option."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return clean | {"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def has_accounting(self) -> bool:
        """Whether sacct answers."""
        return (self.folder / "slurmdbd.conf").exists()

    def run(self, *words: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """What a command prints, e.g. run("squeue", "-h")."""
        own = self.environment | dict(environment or {})
        call = [str(word) for word in words]
        ended = subprocess.run(call, cwd=cwd, env=own, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            raise RuntimeError(f"{call} ended with {ended.returncode}: {ended.stdout}{ended.stderr}")
        return ended.stdout.strip()

    def sbatch(self, *words: object, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
        """Send a job from a folder; its id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, environment=environment)

    def field_of(self, job: str, field: str) -> str:
        """A field of `scontrol show job`, e.g. JobState or Restarts, of a job or of one task as in 12_3."""
        lines = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()
        words = dict(word.split("=", 1) for word in lines[0].split() if "=" in word)
        return words[field]

    def states(self, job: str) -> set[str]:
        """The states of all tasks of a job, or of several as 12,13; the queue forgets them after five minutes."""
        try:
            lines = self.run("squeue", "--noheader", "--array", "--states=all", "--format=%T", f"--jobs={job}")
        except RuntimeError as error:
            if "Invalid job id" not in str(error):
                raise
            lines = ""
        if not lines and self.has_accounting:
            words = ("--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job}")
            lines = "\n".join(line.split()[0] for line in self.run("sacct", *words).splitlines())
        return set(lines.split())

    def wait(self, job: str, *states: str, seconds: float = 300) -> None:
        """Until all tasks of a job are in one of some states; COMPLETED where none is named."""
        wanted = set(states or ("COMPLETED",))
        failed = {"FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"} - wanted

        def happened() -> bool:
            found = self.states(job)
            if found & failed:
                raise RuntimeError(f"job {job}: {found}")
            return bool(found) and found <= wanted

        try:
            until(happened, seconds, f"job {job} {sorted(wanted)}", self.folder)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.run('squeue', '--states=all')}") from None


def _alive(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _start(folder: Path, name: str, *words: object, environment: Mapping[str, str] | None = None) -> None:
    """Start a daemon in the foreground of a session of its own, and note its process."""
    with (folder / "log" / name).open("a") as log:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=Cluster(folder).environment | dict(environment or {}),
            start_new_session=True,
        )
    (folder / f"pid-{name}").write_text(str(process.pid))


def _end(folder: Path, name: str) -> None:
    """End a daemon, if its process is still what it was."""
    note = folder / f"pid-{name}"
    if not note.exists():
        return
    pid = int(note.read_text())
    with suppress(OSError):
        if Path(f"/proc/{pid}/comm").read_text().strip() == name.partition("-")[0]:
            os.kill(pid, signal.SIGTERM)
            with suppress(ChildProcessError):
                deadline = time.monotonic() + 10
                while _alive(pid) and time.monotonic() < deadline:
                    os.waitpid(pid, os.WNOHANG)
                    time.sleep(0.05)
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
    note.unlink()


def _of_this_cluster(folder: Path) -> Iterator[int]:
    """Processes that a job left behind: their environment names the cluster's configuration."""
    mark = f"SLURM_CONF={folder / 'slurm.conf'}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "environ").read_bytes().split(b"\0")
            is_of_a_job = any(word.startswith(b"SLURM_JOB_ID=") for word in words)
            stepd = (process / "comm").read_text().strip() == "slurmstepd"
            if mark in words and (is_of_a_job or stepd) and int(process.name) != os.getpid():
                yield int(process.name)


def _name_hosts(names: Sequence[str]) -> None:
    """Let node names resolve, which torchrun's rendezvous needs; without names, undo it."""
    mark = "# model-soups test cluster"
    kept = [line for line in HOSTS.read_text().splitlines() if mark not in line]
    # In place, since a container's file of hosts cannot be renamed over.
    HOSTS.write_text("\n".join([*kept, *(f"127.0.0.1 {name} {mark}" for name in names)]) + "\n")


def _start_database(folder: Path) -> None:
    """MariaDB without a network or users, and slurmdbd on it."""
    data, say = folder / "database", folder / "database.socket"
    own = ["--no-defaults", "--user=root", f"--datadir={data}", "--skip-grant-tables", "--skip-networking"]
    own += ["--debug-no-sync", "--innodb-log-file-size=16M", "--innodb-buffer-pool-size=64M"]
    tables = Path("/usr/share/mysql/mysql_system_tables.sql").read_text()
    with (folder / "log/mariadbd").open("a") as log:
        subprocess.run(
            ["mariadbd", *own, "--bootstrap"],
            input=f"create database mysql;\nuse mysql;\n{tables}",
            env=Cluster(folder).environment,
            stdout=log,
            stderr=log,
            text=True,
            check=True,
        )
    _start(folder, "mariadbd", "mariadbd", *own, f"--socket={say}")
    until(say.exists, 30, "MariaDB", folder)
    conf = folder / "slurmdbd.conf"
    conf.write_text(DATABASE.format(folder=folder, port=PORT + 1))
    conf.chmod(0o600)
    _start(folder, "slurmdbd", "slurmdbd", "-D", environment={"MYSQL_UNIX_PORT": str(say)})
    until(lambda: _answers(folder, "sacctmgr", "-n", "list", "cluster"), 30, "slurmdbd", folder)


def _answers(folder: Path, *words: str) -> bool:
    with suppress(RuntimeError):
        Cluster(folder).run(*words)
        return True
    return False


def start(folder: Path = FOLDER) -> Cluster:
    """Bring the cluster up, in some seconds; whatever an earlier one left is ended first.

    Raises:
        TimeoutError: a daemon does not come up; the message has the ends of all logs.
    """
    stop(folder)
    for part in ("munge", "log", "state", "spool", "database"):
        (folder / part).mkdir(parents=True, mode=0o755)
    has_accounting = all(shutil.which(program, path=PATH) for program in ACCOUNTING)
    conf = CONTROLLER.format(
        folder=folder,
        port=PORT,
        accounting=ACCOUNTED.format(folder=folder, port=PORT + 1) if has_accounting else "",
        nodes=f"node[1-{len(NODES)}]",
        first=PORT + 2,
        last=PORT + 1 + len(NODES),
        cpus=CPUS,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
    )
    (folder / "slurm.conf").write_text(conf)
    _name_hosts([*NODES, *([] if _resolves(socket.gethostname()) else [socket.gethostname()])])
    munge = folder / "munge"
    cluster = Cluster(folder)
    cluster.run("mungekey", "--create", f"--keyfile={munge}/key")
    places = [f"--socket={munge}/socket", f"--key-file={munge}/key", f"--pid-file={munge}/pid"]
    places += [f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
    _start(folder, "munged", "munged", "--foreground", "--force", *places)
    until((munge / "socket").exists, 10, "munged", folder)
    if has_accounting:
        _start_database(folder)
    _start(folder, "slurmctld", "slurmctld", "-D")
    for node in NODES:
        start_node(node, folder)
    idle = ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"]
    until(lambda: _answers(folder, *idle) and cluster.run(*idle) == str(len(NODES)), 40, "idle nodes", folder)
    return cluster


def _resolves(name: str) -> bool:
    with suppress(OSError):
        return bool(socket.gethostbyname(name))
    return False


def start_node(node: str, folder: Path = FOLDER) -> None:
    """Start a node's daemon, for the first time or after `stop_node`."""
    _start(folder, f"slurmd-{node}", "slurmd", "-D", "-N", node)


def stop_node(node: str, folder: Path = FOLDER) -> None:
    """End a node's daemon; what runs there goes on unseen until Slurm notices."""
    _end(folder, f"slurmd-{node}")


def stop(folder: Path = FOLDER) -> None:
    """Cancel everything, end every daemon and what jobs left, and delete the folder."""
    if not folder.exists():
        return
    cluster = Cluster(folder)
    if _answers(folder, "scontrol", "ping"):
        for node in NODES:
            _answers(folder, "scontrol", "update", f"nodename={node}", "state=resume")
        _answers(folder, "scancel", "--user=root")
        with suppress(TimeoutError):
            until(lambda: cluster.run("squeue", "--noheader") == "", 20, "the end of all jobs", folder)
    for name in DAEMONS[:2]:
        _end(folder, name)
    for pid in _of_this_cluster(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for name in DAEMONS[2:]:
        _end(folder, name)
    _name_hosts([])
    shutil.rmtree(folder)


@contextmanager
def running() -> Iterator[Cluster]:
    """A cluster while the block lasts; another process that wants one waits for its end."""
    with FOLDER.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield start()
        finally:
            stop()
