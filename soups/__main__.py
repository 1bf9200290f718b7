"""The command `soups` (soups/cli.py); with experiment=NAME soups of a finished sweep (soups/experiment/stage.py).

Several jobs share a sweep's recipes by share.of=N and share.index=0, ..., N - 1; the processes of torchrun share one
recipe=greedy with cooking.shortcut=speculative.
"""

import sys
from importlib.util import find_spec

from soups.cli import main as command
from soups.errors import refuse


def main() -> None:
    """Words as `experiment=NAME` are settings of a sweep, all others of the command."""
    words = sys.argv[1:]
    if any(word.lstrip("+").startswith("ingredients=") for word in words):
        now = "python -m soups uniform run/*.pt --out soup.pt; --help has the other recipes"
        refuse(f"files are named without ingredients=[...] now: {now}")
    if not words or "=" not in words[0]:
        command()
    elif find_spec("configs") is None or find_spec("soups.experiment") is None:
        refuse(f"{words[0]}: sweeps are made in a clone of the repository; `soups --help` has the commands for files")
    else:
        from soups.experiment.stage import main as stage  # noqa: PLC0415

        stage()


if __name__ == "__main__":
    main()
