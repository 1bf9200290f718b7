"""Where the numbers come from, and how to make them again."""

from collections.abc import Mapping, Sequence
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


def made_by(results: Results) -> Table:
    """Commit, machine and versions of models, soups and tables; a line for each that differ."""
    records = [("model", each) for each in results.done.values()] + [("soup", each) for each in results.soups.values()]
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for what, record in [
        *((what, each.get("provenance") or {}) for what, each in records),
        ("table", results.provenance),
    ]:
        counts = found.setdefault((_commit(record), _machine(record), _versions(record)), {})
        counts[what] = counts.get(what, 0) + 1
    lines = []
    for (commit, machine, versions), counts in found.items():
        named = [
            f"{n} models" if what == "model" else f"{n} soups and ensembles"
            for what, n in counts.items()
            if what != "table"
        ]
        said = ", ".join(named + ["tables"] * ("table" in counts))
        lines.append((text(said[:1].upper() + said[1:]), text(commit, "code"), text(machine), text(versions)))
    return Table("What made the files that this page shows.", ("Part", "Commit", "Machine", "Versions"), tuple(lines))


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
