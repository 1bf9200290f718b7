"""What finished runs can do without:  python -m slurm.clean experiment=table4_vitg [KIND ...] [delete=true]

Prints the size of each kind of files; with delete=true it deletes the kinds that are named. Weights of rows and soups,
records, tables and figures are never deleted.

states    of rows that are done (also half-written files): nothing needs them
features  that a linear probe was fitted to: a forward pass over train makes them again
decoded   copies of images, of all experiments that share compute.decoded: made again at the next evaluation
resized   copies that training reads, of all experiments that share compute.resized_to: made again by the next training
logits    of finished tables: evaluation makes them again, for hours where models are large
variants  EMA, SWA and other weights beside the row's ingredient, of finished tables: only training makes them again
"""

import sys
from pathlib import Path

from rich.filesize import decimal

from configs.cli import entry_point, parts_of
from configs.errors import UserError
from configs.schema import Experiment, replicate
from store.runs import WEIGHTS, RunFolder, delete_path

AFTER_TABLES = ("logits", "variants")  # which the tables are made from


def removable(config: Experiment) -> dict[str, list[Path]]:
    """Kind -> the files and folders of it that an experiment can do without by now."""
    run, decoded = RunFolder.of(config), config.compute.decoded
    rows = [done.parent for done in sorted((run.root / "ingredients").glob("*/done.json"))]
    found = {
        "states": [file for row in rows for file in (*row.glob("state.pt"), *row.glob(".*.tmp*"))],
        "features": [run.root / "features"] if run.is_done(0) else [],
        "decoded": [decoded] if decoded is not None else [],
        "resized": [config.compute.resized_to],
        "logits": [run.root / "logits"],
        "variants": [file for row in rows for file in row.glob("*.safetensors") if file.name != WEIGHTS],
    }
    if not (run.analysis / "provenance.json").exists():
        found |= {kind: [] for kind in AFTER_TABLES}
    return {kind: [path for path in paths if path.exists()] for kind, paths in found.items()}


def clean(config: Experiment, kinds: tuple[str, ...], *, delete: bool) -> None:
    """Print what there is of each kind, all of them where none is named, and delete what is named."""
    found = removable(config)
    if unknown := [kind for kind in kinds if kind not in found]:
        raise UserError(f"{unknown[0]} is no kind of files that can be deleted; type one of {', '.join(found)}")
    if delete and not kinds:
        raise UserError(f"say what to delete: python -m slurm.clean {', '.join(found)} ... delete=true")
    for kind in kinds or found:
        files = [file for path in found[kind] for file in (path, *path.rglob("*")) if file.is_file()]
        size = decimal(sum(file.stat().st_size for file in files))
        for path in found[kind] if delete else ():
            delete_path(path)
        is_early = not found[kind] and kind in AFTER_TABLES
        hint = " (none before the tables are there: python -m analysis)" if is_early else ""
        print(f"{config.name}: {kind}: {size}{' deleted' if delete else ''}{hint}")
    if not delete:
        print("Nothing was deleted. Next: name kinds, and delete=true")


def main() -> None:
    """Kinds are words without a value; the rest are settings."""
    kinds = tuple(word for word in sys.argv[1:] if "=" not in word and not word.startswith("-"))
    delete = "delete=true" in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in (*kinds, "delete=true")]

    def clean_parts(config: Experiment) -> None:
        for part in parts_of(config, sys.argv[1:]):
            for each in [replicate(part, seed) for seed in part.replicates] or [part]:
                clean(each, kinds, delete=delete)

    entry_point(clean_parts, whole=True)()


if __name__ == "__main__":
    main()
