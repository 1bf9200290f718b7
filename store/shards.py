"""Bytes of many examples, made once by any number of processes, in few files that are mapped into memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import xxhash

from soups.files.atomic import replacing
from store.runs import lock

SHARD = 2048  # examples in a file: about 60 MB of JPEG copies with a shorter side of 256
GROUP = 64  # examples that are in memory together while a file is written
SCHEMA = pa.schema([("content", pa.binary()), ("digest", pa.uint64())])


@dataclass(frozen=True)
class Shards:
    """The bytes of N examples; file k holds those from SHARD x k on, and is written once, whole or not at all."""

    folder: Path  # named by everything that the bytes depend on
    n: int

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:05d}.arrow"

    def write(self, number: int, content: Callable[[int], bytes], remedy: str, *, wait: bool = True) -> None:
        """Write a shard that is missing, unless another process is writing it, which may be waited for.

        `content` gives the bytes of an example, `remedy` what to type where the folder's file system has no locks.
        """
        path = self.path(number)
        if path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("a") as held:
            if not lock(held, remedy, wait=wait):
                return
            for half_written in self.folder.glob(f".{path.stem}.*.tmp.arrow"):  # of a process that was killed
                half_written.unlink()
            if not path.exists():
                with replacing(path) as temporary, pa.ipc.new_file(str(temporary), SCHEMA) as writer:
                    for first in range(number * SHARD, min((number + 1) * SHARD, self.n), GROUP):
                        last = min(first + GROUP, (number + 1) * SHARD, self.n)
                        contents = [content(index) for index in range(first, last)]
                        digests = [xxhash.xxh3_64_intdigest(each) for each in contents]
                        columns = [pa.array(contents, pa.binary()), pa.array(digests, pa.uint64())]
                        writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
            path.with_suffix(".lock").unlink(missing_ok=True)  # whoever waits for it looks for the file first

    def read(self, index: int) -> pa.Buffer:
        """The bytes of an example, where they lie in the file; a ValueError where it is missing or damaged."""
        number, place = divmod(index, SHARD)
        try:
            batch = _opened(self.path(number))[place // GROUP]
            content = batch.column(0)[place % GROUP].as_buffer()
            recorded = batch.column(1)[place % GROUP].as_py()
        except (OSError, pa.ArrowException, IndexError) as error:
            raise ValueError(str(error)) from None
        if xxhash.xxh3_64_intdigest(content) != recorded:
            raise ValueError("its content is not what was written")
        return content

    def delete(self, number: int) -> None:
        """Delete the file of a shard, so that it is made anew."""
        self.path(number).unlink(missing_ok=True)
        _opened.cache_clear()


@cache
def _opened(path: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]
