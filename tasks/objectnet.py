"""ObjectNet's classes that ImageNet has too, from the mapping files in the data set's own folder."""

from pathlib import Path

from configs.errors import UserError
from tasks.files import lines, read_json

BORDER = 2  # pixels at each edge of its images that its authors marked, to be cut before any use


def overlap(mappings: Path, size: int) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Folders of ObjectNet's images whose objects are ImageNet classes, with the ids of these; and the other folders.

    Four files are chained: folder -> ObjectNet's label -> names of ImageNet classes, separated by semicolons -> line,
    from 0, in the list of names -> class id of PyTorch. The published files give 113 folders and 125 class ids. The
    order of the folders, which is by name, is the order of the reported classes.

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
        if label not in folder_of_label:
            raise UserError(f"{labels_path} has no entry {label!r}: restore ObjectNet's mappings from its archive")
        found[folder_of_label[label]] = tuple(ids)
    return {folder: found[folder] for folder in sorted(found)}, set(label_of_folder) - set(found)
