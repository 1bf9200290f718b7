"""Model cards: README.md with the front matter that Hugging Face's hub reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

Z = 1.959963984540054  # of a 95 % interval


def interval(correct: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in [0, 1].

    Args:
        correct: examples that are right.
        n: examples, at least 1, taken as independent.

    Source: Wilson 1927.

    >>> [round(x, 4) for x in interval(50, 100)]
    [0.4038, 0.5962]
    """
    p = correct / n
    middle, half = p + Z**2 / (2 * n), Z * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + Z**2 / n)), min(1.0, (middle + half) / (1 + Z**2 / n))


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    title: str
    library: str  # as the hub calls it
    recipe: str
    about: str  # a sentence or two on network and classes
    use: str  # Python that loads the folder
    sections: dict[str, list[str]]  # heading -> lines, in order
    pipeline: str = ""  # the hub's name of the task; empty where it is not known
    licence: str = "other"  # of the weights, as the hub names licences
    results: Sequence[dict[str, Any]] = ()  # of the front matter's model-index
    more: dict[str, Any] = field(default_factory=dict)  # further front matter

    def write(self, folder: Path) -> None:
        """README.md in a folder."""
        matter: dict[str, Any] = {"license": self.licence, "library_name": self.library}
        if self.pipeline:
            matter["pipeline_tag"] = self.pipeline
        matter |= {"tags": ["model-soup", f"recipe:{self.recipe}"], **self.more}
        if self.results:
            matter["model-index"] = [{"name": self.title, "results": list(self.results)}]
        # JSON is YAML too, and needs no library to be written.
        front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in matter.items())
        lines = [f"# {self.title}", "", f"A model soup, recipe `{self.recipe}`: the average of the weights of"]
        lines[-1] += f" fine-tuned models (Wortsman et al., ICML 2022). {self.about}"
        sections = {"Use": ["```python", self.use.strip(), "```"], **self.sections}
        for heading, text in sections.items():
            lines += ["", f"## {heading}", "", *text]
        (folder / "README.md").write_text(f"---\n{front}---\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
