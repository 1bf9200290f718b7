"""Data on the node's own disk: a shared file system serves one archive to a node, and not a million files to each job.

The first job on a node unpacks it, the others wait for that one or find it done.
"""

import os
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

from configs.errors import UserError
from configs.schema import Experiment
from soups.files.atomic import digest_of, replacing
from store.runs import lock

ARCHIVES = ".tar, .tar.gz, .tar.bz2, .tar.xz or .zip"


def staged(config: Experiment) -> Experiment:
    """The experiment with its data, or its smaller copies, on this machine's disk; itself where none are named."""
    if config.cluster.stage is None:
        return config
    source = config.cluster.stage.resolve()
    variables = (os.environ.get(name) for name in ("SLURM_TMPDIR", "TMPDIR"))
    disk = config.cluster.stage_to or Path(next((value for value in variables if value), "/tmp"))
    if config.compute.resized is not None and source == config.compute.resized_to.resolve():
        if not any(source.glob("*/index.json")):
            raise UserError(f"cluster.stage={source} has no finished copies: python -m tasks.resized makes them")
        compute = replace(config.compute, resized_to=_unpacked(source, disk, source.name))  # type: ignore[type-var]
        return replace(config, compute=compute)  # type: ignore[type-var]  # mypy does not know pydantic's
    folder = _unpacked(source, disk, config.task.folder.name)
    kept = {} if config.task.listings is None else {"listings": folder.parent / "listings"}
    task = replace(config.task, folder=folder, **kept)  # type: ignore[type-var]  # of pydantic
    return replace(config, task=task)  # type: ignore[type-var]  # mypy does not know pydantic's


def _unpacked(source: Path, disk: Path, name: str) -> Path:
    """The folder `name` on a local disk with what the source holds, which one process unpacks and all share."""
    try:
        seen = source.stat()
    except OSError as error:
        raise UserError(f"cluster.stage={source}: {error.strerror}") from None
    key = digest_of([str(source), seen.st_size, seen.st_mtime_ns])[:16]
    home = disk / f"model-soups-{os.getuid()}-{key}"
    if home.exists():
        return home / name
    disk.mkdir(parents=True, exist_ok=True)
    with (disk / f"{home.name}.lock").open("a") as file:
        lock(file, "type cluster.stage_to=FOLDER of another local disk", wait=True)
        if home.exists():
            return home / name
        size = seen.st_size if source.is_file() else sum(each.lstat().st_size for each in source.rglob("*"))
        free = shutil.disk_usage(disk).free
        if size > free:
            raise UserError(
                f"cluster.stage={source} has {size / 1e9:,.1f} GB, and {disk} has {free / 1e9:,.1f} GB left: type "
                "cluster.stage_to=FOLDER of a larger local disk, or cluster.stage=null"
            )
        print(f"unpacking {source} to {home}", flush=True)
        for half_unpacked in disk.glob(f".{home.name}.*.tmp"):
            shutil.rmtree(half_unpacked, ignore_errors=True)
        try:
            with replacing(home, sync=False, folder=True) as temporary:
                _unpack(source, temporary / name)
                os.sync()  # all files at once, so that a machine that goes down leaves none empty under the final name
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
            why = str(error)[:200]  # of a folder, it may name every file
            raise UserError(f"cluster.stage={source} cannot be unpacked ({why}): make it anew") from None
    return home / name


def _unpack(source: Path, folder: Path) -> None:
    """Copy or unpack the source; from an archive with one folder of this name, the content of that folder."""
    if source.is_dir():
        shutil.copytree(source, folder)
        return
    folder.mkdir(parents=True)
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            archive.extractall(folder)
    elif tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
            # tarfile takes an archive that was cut off between two files for a whole one.
            assert archive.fileobj is not None  # since it is open
            archive.fileobj.seek(archive.offset)
            if len(archive.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                raise EOFError("it is cut off")
    else:
        raise UserError(f"cluster.stage={source} is neither a folder nor an archive ({ARCHIVES})")
    if [each.name for each in folder.iterdir()] == [folder.name]:
        folder.rename(folder.with_name("around"))
        (folder.with_name("around") / folder.name).rename(folder)
        folder.with_name("around").rmdir()
