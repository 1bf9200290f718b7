"""ObjectNet's classes that ImageNet has too, from the mapping files in the data set's own folder."""

from pathlib import Path

from configs.errors import UserError
from tasks.files import lines, read_json

BORDER = 2  # pixels at each edge of its images that its authors marked, to be cut before any use


def _entry(table: dict[str, object], key: str, path: Path) -> object:
    if key not in table:
        raise UserError(f"{path} has no entry {key!r}: restore ObjectNet's mappings from its archive")
    return table[key]


def overlap(mappings: Path, size: int) -> dict[str, tuple[int, ...]]:
    """Folders of ObjectNet's images whose objects are ImageNet classes, and which; sorted by folder.

    Four files are chained: folder -> ObjectNet's label -> names of ImageNet classes, separated by semicolons -> line,
    from 0, in the list of names -> class id of PyTorch. The published files give 113 folders and 125 class ids. The
    order of the folders is the order of the reported classes.

    Args:
        mappings: the folder `mappings` of ObjectNet's archive.
        size: how many classes the network has; they must be ImageNet's 1,000.

    Raises:
        UserError: a file is missing or does not fit the others, or the network is not over 1,000 classes.

    Source: Barbu et al. 2019 and the README of its archive.
    """
    if size != 1000:
        raise UserError(f"ObjectNet's mapping is onto ImageNet's 1,000 classes, but task.num_classes={size}")
    labels_path, names_path = mappings / "folder_to_objectnet_label.json", mappings / "imagenet_to_label_2012_v2"
    imagenet_path, ids_path = mappings / "objectnet_to_imagenet_1k.json", mappings / "pytorch_to_imagenet_2012_id.json"
    label_of_folder, imagenet_of_label = read_json(labels_path), read_json(imagenet_path)
    id_of_line = {line: int(number) for number, line in read_json(ids_path).items()}
    if sorted(id_of_line.values()) != list(range(size)):
        raise UserError(f"{ids_path} does not number 1,000 classes: restore ObjectNet's mappings from its archive")
    lines_of_name: dict[str, list[int]] = {}
    for line, name in enumerate(lines(names_path)):
        lines_of_name.setdefault(name, []).append(line)

    folder_of_label = {label: folder for folder, label in label_of_folder.items()}
    found = {}
    for label, names in imagenet_of_label.items():
        ids = []
        for name in (name.strip() for name in names.split(";")):
            places = lines_of_name.get(name, [])
            if len(places) != 1:
                raise UserError(f"{imagenet_path}: {name!r} of {label!r} stands {len(places)} times in {names_path}")
            ids.append(id_of_line[places[0]])
        found[str(_entry(folder_of_label, label, labels_path))] = tuple(ids)
    return {folder: found[folder] for folder in sorted(found)}


def all_folders(mappings: Path) -> set[str]:
    """Every folder of ObjectNet's images, of the overlap or not."""
    return set(read_json(mappings / "folder_to_objectnet_label.json"))
