"""Look at every split of a task before anything is trained on it:  python -m tasks.check task=imagenet

Prints for each split how many images and classes it has, where they are and a digest, and decodes a few of them; of
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
from tasks.load import class_names, load_annotations, load_split
from tasks.overlaps import overlaps, refused
from tasks.parts import noun
from tasks.split import Examples, ImageSplit
from tasks.texts import TextSplit


def _classes(task: Task, images: Examples) -> str:
    """What a split reports, e.g. 113 over 125 of 1,000."""
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
    examples = load_split(task, name)
    if len(examples) == 0:
        raise UserError(f"split {name!r} has no example")
    if isinstance(examples, TextSplit):
        return _describe_texts(task, examples)
    assert isinstance(examples, ImageSplit)  # of every other kind
    return _describe_images(task, name, examples)


def _describe_texts(task: Task, texts: TextSplit) -> str:
    counts = torch.bincount(texts.labels, minlength=task.size).tolist()
    of_each = ", ".join(f"{n:,} {option}" for n, option in zip(counts, class_names(task), strict=True))
    first = " | ".join(texts.fields[0])
    return f"{texts.name}: {len(texts):,} texts ({of_each}), e.g. {first[:80]!r}, digest {texts.digest[:12]}"


def _describe_images(task: Task, name: str, images: ImageSplit) -> str:
    sizes = set()
    for row in sorted({0, len(images) // 2, len(images) - 1}):
        sizes.add("{}x{}".format(*images.pil(row).size))
    groups = f", {len(images.group_names)} groups" if images.groups is not None else ""
    where = images.stored.root if isinstance(images.stored, Files) else task.folder
    return (
        f"{name}: {len(images):,} images, classes {_classes(task, images)}{groups}, e.g. {' '.join(sorted(sizes))} "
        f"pixels, {where}, digest {images.digest[:12]}"
    )


def _common(task: Task) -> list[str]:
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
    if not problems:  # all splits can be read
        problems = _common(task)
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    print(f"OK: {len(splits)} splits")


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def main(cfg: DictConfig) -> None:
    """As `check`, of the task that the command line composes."""
    if OmegaConf.is_missing(cfg, "name"):
        cfg.name = "check"  # no experiment is needed
    typed = HydraConfig.get().overrides.task
    one_line_errors(lambda: check(parse_task(cfg, typed)))


if __name__ == "__main__":
    typed_right(main)()
