"""The experiment files, and what must be typed to compose those that leave something to their users."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml"))
TYPED = {
    "own_images": ("task.folder=images", "task.num_classes=3"),
    "own_text": ("task.folder=texts", "task.num_classes=2", "task.options=[a,b]", "task.template='{text}'"),
}
