"""Check every split of a task before anything is trained on it:  python -m tasks.check task=imagenet

Prints for each split how many images and classes it has, where they are and a digest, and decodes a few of them; for
texts how many there are of each class, and one of them. Then it says which splits have examples in common, by their
content. Ends with OK, or with what is wrong and exit status 2.
"""

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from configs.cli import typed_right
from configs.data import Task
from configs.errors import UserError
from configs.registered import CONFIGS
from configs.schema import parse_task
from soups.errors import one_line_errors
from tasks.files import Files
from tasks.held_out import noun
from tasks.load import class_names, load_annotations, load_split
from tasks.overlaps import overlaps, refused
from tasks.split import ImageSplit
from tasks.texts import TextRows


def _reported_classes(task: Task, images: ImageSplit) -> str:
    """The number of classes that a split reports, e.g. 113 over 125 of 1,000."""
    if images.space is None:
        return f"{task.size:,}"
    network = len({i for several in images.space.ids for i in several})
    over = "" if network == len(images.space) else f" over {network:,}"
    return f"{len(images.space):,}{over} of {task.size:,}"


def describe(task: Task, name: str) -> str:
    """One line about a split, of which the first, the middle and the last image have been decoded.

    Raises:
        UserError: as `load_split`; an image that cannot be decoded, or no example.
    """
    split = load_split(task, name)
    n, digest = len(split), split.digest[:12]
    if n == 0:
        raise UserError(f"split {name!r} has no example")
    if isinstance(split.stored, TextRows):
        counts = torch.bincount(split.labels, minlength=task.size).tolist()
        of_each = ", ".join(f"{count:,} {option}" for count, option in zip(counts, class_names(task), strict=True))
        first = " | ".join(split.stored.fields[0])
        return f"{name}: {n:,} texts ({of_each}), e.g. {first[:80]!r}, digest {digest}"
    assert isinstance(split, ImageSplit)  # of every other kind
    sizes = sorted({"{}x{}".format(*split.pil(row).size) for row in sorted({0, n // 2, n - 1})})
    groups = f", {len(split.group_names)} groups" if split.groups is not None else ""
    where = split.stored.root if isinstance(split.stored, Files) else task.folder
    classes = _reported_classes(task, split)
    return f"{name}: {n:,} images, classes {classes}{groups}, e.g. {' '.join(sizes)} pixels, {where}, digest {digest}"


def _print_overlaps(task: Task) -> list[str]:
    """Print how many examples stand in two splits; returns what of that is refused."""
    try:
        shared = overlaps(task)
    except UserError as error:
        return [str(error)]
    for each in shared:
        print(f"{each.first} and {each.second}: {each.count:,} of the latter's {each.n:,} {noun(task)} stand in both")
    if not shared:
        print(f"no two splits have {noun(task)} of equal content")
    return refused(task, shared)


def check(task: Task) -> None:
    """Print a line about each split, the class names, the annotations and overlaps; all problems come at the end.

    Raises:
        UserError: one or more splits cannot be used, or they share more examples than `task.overlap_allowed`.
    """
    problems: list[str] = []
    splits = [task.train, task.held_out, *task.reported]
    for name in splits:
        try:
            print(describe(task, name), flush=True)
        except UserError as error:
            print(f"{name}: cannot be used", flush=True)
            problems.append(str(error))
    try:
        names = class_names(task)
        print(f"class names: {', '.join(names if len(names) < 4 else (*names[:2], '...', names[-1]))}")
        for name, right in load_annotations(task).items():
            print(f"annotations {name}: {int(right.any(dim=1).sum()):,} images, {int(right.sum()):,} answers")
    except UserError as error:
        problems.append(str(error))
    problems = problems or _print_overlaps(task)  # which reads all splits
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    print(f"OK: {len(splits)} splits")


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def main(cfg: DictConfig) -> None:
    """Check the task that the command line composes, as `check`."""
    if OmegaConf.is_missing(cfg, "name"):
        cfg.name = "check"  # no experiment is needed
    typed = HydraConfig.get().overrides.task
    one_line_errors(lambda: check(parse_task(cfg, typed)))


if __name__ == "__main__":
    typed_right(main)()
