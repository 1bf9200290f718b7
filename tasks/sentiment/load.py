"""The embedded text benchmark: does a sentence speak well of its subject? (tasks/sentiment/README.md)

Reads <folder>/vaderSentiment-3.3.2.tar.gz as the package registry has it: sentences of four sources, each with the
mean of ten or more people's ratings from -4 to 4.
"""

import io
import tarfile
from functools import lru_cache
from pathlib import Path

from configs.data import Sentiment
from configs.errors import UserError
from soups.chance import uniform
from tasks.files import ROOT
from tasks.sentiment.fetch import COMMAND, FILE, FOLDER, is_whole
from tasks.split import Examples
from tasks.texts import Rows, text_split

OUTER = f"{FILE.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER = "hutto_ICWSM_2014/{}_GroundTruth.txt"
SOURCES = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}
CLEAR = 0.5  # of a rating: sentences between are left out, since people did not agree that they say either
SHARES = {"test": (0.0, 0.2), "held_out": (0.2, 0.4), "train": (0.4, 1.0)}  # of movie, by a keyed draw a sentence


def located(folder: Path) -> Path:
    """The archive, in the environment where the task's folder says so; a `UserError` where it is missing or damaged."""
    path = (FOLDER if folder == Path("environment") else ROOT / folder) / FILE
    if not is_whole(path):
        reason = "is missing" if not path.exists() else "is damaged"
        raise UserError(f"{path} {reason}: run {COMMAND}")
    return path


@lru_cache(maxsize=2)
def read(archive: Path, source: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sentences of a source whose rating is clear, and whether it is above 0; of equal sentences the first."""
    with tarfile.open(archive) as outer:
        packed = outer.extractfile(OUTER)
        assert packed is not None  # the digest of the whole was checked
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            file = inner.extractfile(INNER.format(SOURCES[source]))
            assert file is not None
            lines = file.read().decode("utf-8").split("\n")
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            _, rating, sentence = line.removesuffix("\r").split("\t")
            value = float(rating)
        except ValueError:
            raise UserError(f"{archive}, {source}, line {number}: not a number, a rating and a sentence") from None
        if abs(value) > CLEAR:
            found.setdefault(sentence.strip(), int(value > 0))
    return tuple(found), tuple(found.values())


def load_split(task: Sentiment, name: str) -> Examples:
    """One split of the task: train, held_out and test are of movie reviews, the shifts are named by their source."""
    archive = located(task.folder)
    source = "movie" if name in SHARES else name
    if source not in SOURCES or name == "movie":
        raise UserError(f"the sentiment benchmark has {', '.join([*SHARES, *list(SOURCES)[1:]])}, no split {name!r}")
    sentences, labels = read(archive, source)
    low, high = SHARES.get(name, (0.0, 1.0))
    rows = [i for i, text in enumerate(sentences) if low <= uniform("sentiment", text) < high]
    fields = [(sentences[i],) for i in rows]
    return text_split(task, name, Rows(("sentence",), fields, [labels[i] for i in rows], archive))
