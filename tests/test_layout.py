"""The architecture, held by reading the imports."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A room may import those of a smaller number, and itself. The library of soups stands alone, below all others.
LAYERS = {
    "soups": 0,
    "configs": 1,
    "store": 2,
    "tasks": 3,
    "models": 4,
    "embedded": 5,
    "eval": 5,
    "finetune": 6,
    "soups.experiment": 6,
    "analysis": 7,
    "slurm": 8,
}
OTHERS = ("soups.experiment",)  # modules in soups/ that are no part of its library
FILES = [path for folder in LAYERS for path in sorted((ROOT / folder).rglob("*.py"))]


def room(module: str) -> str:
    """The room that a module of the project lies in."""
    return "soups.experiment" if module.startswith(OTHERS) else module.split(".", maxsplit=1)[0]


def imported(path: Path) -> set[str]:
    """Names of the project's modules that a file imports."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name for name in names if name.split(".")[0] in LAYERS}


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


def test_imports_point_one_way():
    for path in FILES:
        folder = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name in () if path.name == "__main__.py" else imported(path):  # an entry point may import any stage
            target = room(name)
            assert target == folder or LAYERS[target] < LAYERS[folder], f"{path} imports {name}"


def test_nobody_imports_an_entry_point_or_a_whole_stage():
    for path in (*FILES, ROOT / "reproduce.py"):
        for name in imported(path):
            assert not name.endswith("__main__"), path
            assert name not in ("eval", "soups", "finetune", "analysis"), f"{path}: import a part of {name}"


def does_not_run_on_import(node: ast.AST) -> bool:
    """Whether it is what a module does as a command, or what type checkers alone read."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")


def files_that_it_needs(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the project that a file imports, at its top or later."""
    nodes, needed = [parsed(path)], set()
    while nodes:
        node = nodes.pop()
        nodes += [child for child in ast.iter_child_nodes(node) if not does_not_run_on_import(child)]
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        needed |= {name for name in names if name in known}
    return needed


def test_no_files_import_each_other_in_a_circle():
    known = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    needs = {name: files_that_it_needs(path, known) for name, path in known.items()}
    while free := [name for name, others in needs.items() if not others]:
        for name in free:
            del needs[name]
        needs = {name: others - set(free) for name, others in needs.items()}
    assert not needs  # what is left is a circle, or needs one


def test_no_folder_hides_a_hugging_face_package():
    assert not (ROOT / "datasets").exists()
    assert not (ROOT / "evaluate").exists()


def test_no_module_is_longer_than_400_lines():
    long = [str(path) for path in FILES if len(path.read_text().splitlines()) > 400]
    assert not long
