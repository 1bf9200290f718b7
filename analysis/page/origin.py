"""Where the numbers come from, and how to make them again."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.page.cells import Table, text
from analysis.page.files import Results

Record = Mapping[str, Any]


def _commit(record: Record) -> str:
    commit = record.get("commit")
    if not commit:
        return "unknown: not a git checkout"
    return commit + (" with uncommitted changes" if record.get("modified") else "")


def _machine(record: Record) -> str:
    machine = record.get("machine") or {}
    known = [machine.get("processor"), machine.get("capability"), machine.get("system")]
    cores = machine.get("cores")
    return ", ".join(str(part) for part in (*known, cores and f"{cores} cores") if part)


def _versions(record: Record) -> str:
    packages = {"Python": record.get("python"), **(record.get("versions") or {})}
    return ", ".join(f"{package} {version}" for package, version in packages.items() if version)


def _each(what: str, records: Iterable[Record]) -> list[tuple[str, str, str, str]]:
    """What, commit, machine and versions, once for each that differ."""
    counts: dict[tuple[str, str, str], int] = {}
    for record in records:
        key = (_commit(record), _machine(record), _versions(record))
        counts[key] = counts.get(key, 0) + 1
    return [(f"{count} {what}" if count > 1 else what, *key) for key, count in counts.items()]


def made_by(results: Results) -> Table:
    """Commit, machine and versions of models, soups and tables."""
    lines = [
        *_each("models", (record.get("provenance") or {} for record in results.done.values())),
        *_each("soups and ensembles", (soup.get("provenance") or {} for soup in results.soups.values())),
        *_each("tables", [results.provenance]),
    ]
    cells = tuple(
        (text(what.capitalize()), text(commit, "code"), text(machine), text(versions))
        for what, commit, machine, versions in lines
    )
    return Table("What made the files that this page shows.", ("Part", "Commit", "Machine", "Versions"), cells)


def seeds(results: Results) -> list[tuple[str, str]]:
    """Everything that chance hung on."""
    config = results.config
    found = [
        ("Sweep seed", str(results.provenance.get("sweep_seed", config.sweep.seed))),
        ("Bootstrap", f"seed {config.analysis.seed}, {config.analysis.resamples:,} resamples"),
        ("Training seeds", "one for each row, in the table of models"),
    ]
    if "greedy_random_order" in config.recipes:
        found.append(("Random orders", f"{config.cooking.orders}, drawn from the sweep seed"))
    return found


def parts(results: Results, figures: Sequence[str]) -> Table:
    """The command behind each part of the page.

    Args:
        results: of the experiment.
        figures: names of those that are shown and have a command of their own.
    """
    commands, table = results.commands, "table5" if results.config.task.is_text else "table3"
    lines = [
        ("Everything but single figures", "all of these", commands.everything),
        ("Models", "ingredients/*/done.json, manifest.csv", commands.stage("finetune")),
        ("Answers", "logits/*/*.npy", commands.stage("eval")),
        ("Soups and ensembles", "soups/*/soup.json", commands.stage("soups")),
        ("Results and scatter", f"analysis/{table}.csv, figure1.csv", commands.stage("analysis")),
        *((figure, f"analysis/{figure}.*", commands.artefact(figure)) for figure in figures),
        ("This page", "report.html", commands.page),
    ]
    cells = tuple((text(what), text(files, "code"), text(command, "code command")) for what, files, command in lines)
    return Table("Each command skips what is there and unchanged.", ("Part", "Files", "Command"), cells)
