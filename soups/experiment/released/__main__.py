"""The authors' 72 models, CLIP ViT-B/32 fine-tuned on ImageNet (Table 3):

    python -m soups.experiment.released download             model_0.pt to model_71.pt and the held-out split, 33 GB
    python -m soups.experiment.released convert --out DIR    to safetensors: image tower and head
    python -m soups.experiment.released import experiment=released    into a run folder, as rows; needs ImageNet

Then `python reproduce.py experiment=released` evaluates, soups and makes Table 3 and Figure 1 on ImageNet; it imports
by itself what is not imported yet. Downloads continue where they were stopped.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from configs.cli import entry_point
from configs.schema import Experiment
from soups.errors import UserError, one_line_errors
from soups.experiment.released.files import FOLDER, MODELS, MODELS_URL, SPLIT_URL, convert_all, download


def _import(config: Experiment) -> None:
    """All rows of an experiment that names checkpoints of the authors."""
    if config.sweep.imported is None:
        raise UserError(f"the rows of experiment={config.name} are trained, not imported: choose experiment=released")
    # Imported here, since downloading needs none of it, and torch and the models take seconds.
    from finetune.start import check_imports  # noqa: PLC0415
    from finetune.sweep import train_sweep  # noqa: PLC0415
    from store.runs import RunFolder  # noqa: PLC0415
    from store.workers import use_threads  # noqa: PLC0415

    check_imports(config)
    use_threads(config.cluster.threads)
    train_sweep(config)
    print(RunFolder.of(config).root / "manifest.csv")


def _rows(text: str) -> int:
    if not text.isdigit() or int(text) >= MODELS:
        raise argparse.ArgumentTypeError(f"{text} is not a model from 0 to {MODELS - 1}")
    return int(text)


def main() -> None:
    """`import` has settings as every stage; the others have options."""
    if sys.argv[1:2] == ["import"]:
        del sys.argv[1]
        entry_point(_import)()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["download", "convert", "import"])
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where the files are, default {FOLDER}")
    parser.add_argument("--models", type=_rows, nargs="+", default=list(range(MODELS)), help="some of 0 to 71")
    parser.add_argument("--workers", type=int, default=4, help="of download: files at a time, default 4")
    parser.add_argument("--out", type=Path, help="of convert: where safetensors go, default FOLDER/converted")
    parser.add_argument("--models-url", default=MODELS_URL, help="of download: a mirror of the models")
    parser.add_argument("--split-url", default=SPLIT_URL, help="of download: a mirror of the split")
    arguments = parser.parse_args()

    def work() -> None:
        if arguments.what == "convert":
            out = arguments.out or arguments.folder / "converted"
            convert_all(arguments.folder, arguments.models, out, Console())
            return
        if arguments.workers < 1:
            raise UserError("--workers: need at least 1")
        download(
            arguments.folder,
            arguments.models,
            Console(),
            workers=arguments.workers,
            models_url=arguments.models_url,
            split_url=arguments.split_url,
        )

    one_line_errors(work)


if __name__ == "__main__":
    main()
