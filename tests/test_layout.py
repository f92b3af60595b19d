"""The house: one-way floors, no circles, small rooms, private names that stay private, plain words.

Imports are read from the code (`ast`), lazy and type-only ones included; nothing is run.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"mmadapters": "mmadapters", "tasks": "mmadapters.tasks"}
MOST_FILES, MOST_LINES = 15, 430
UNLIMITED = {"mmadapters/methods"}  # a file for each family of methods

# From the ground up: a room imports from itself and from rooms before it. Rooms in one line are
# neighbours, which do not import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("mmadapters.errors", "mmadapters.suggest", "mmadapters.files", "mmadapters.low_rank"),
    ("mmadapters.limits",),
    ("mmadapters.composition",),
    ("mmadapters.sites",),
    ("mmadapters.methods", "mmadapters.injectors"),
    ("mmadapters.adapters",),
    ("mmadapters.plans",),
    ("mmadapters.model",),
    ("mmadapters.trunk",),
    ("mmadapters.zoo",),
    ("mmadapters.backbones",),
    ("mmadapters",),
    ("mmadapters.__main__",),
    ("mmadapters.tasks.config",),
    ("mmadapters.tasks.core",),
    ("mmadapters.tasks.data",),
    ("mmadapters.tasks.encoders",),
    (
        "mmadapters.tasks.asr",
        "mmadapters.tasks.captioning",
        "mmadapters.tasks.classification",
        "mmadapters.tasks.retrieval",
        "mmadapters.tasks.segmentation",
        "mmadapters.tasks.vqa",
    ),
    ("mmadapters.tasks.registry",),
    ("mmadapters.tasks.artifact",),
    ("mmadapters.tasks.reports",),
    ("mmadapters.tasks.training",),
    ("mmadapters.tasks.bench", "mmadapters.tasks.zoo"),
    ("mmadapters.tasks.jobs",),
    ("mmadapters.tasks.cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Words that only their author knows, or that mean several things, and names that say nothing.
RIDDLES = ("gaze", "noted", "enough", "awake", "heavy", "settle", "undrawn", "found", "own")


@dataclass(frozen=True)
class Import:
    """`name` is None where a whole module is imported."""

    line: int
    module: str
    name: str | None
    level: int


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def place(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def room(self) -> str:
        """The longest name of a room that the module lies in."""
        parts = self.name.split(".")
        names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next(name for name in names if name in FLOOR)


@cache
def modules() -> dict[str, Module]:
    known = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in inside if part != "__init__")))
            known[name] = Module(name, path, ast.parse(path.read_text()))
    return known


def imports(module: Module) -> Iterator[Import]:
    """Yields the imports of this project in a module, wherever in the file they stand."""
    package = module.name.split(".")
    if module.path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mmadapters":
                    yield Import(node.lineno, alias.name, None, 0)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join((*above, *filter(None, [node.module])))
            if source.split(".")[0] != "mmadapters":
                continue
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                if whole in modules():
                    yield Import(node.lineno, whole, None, node.level)
                else:
                    yield Import(node.lineno, source, alias.name, node.level)


def every_import() -> Iterator[tuple[Module, Import]]:
    for module in modules().values():
        for known in imports(module):
            yield module, known


def listed(faults: list[str]) -> str:
    return f"{len(faults)} faults:\n" + "\n".join(faults)


def test_library_does_not_know_the_application() -> None:
    faults = [
        f"{module.place}:{known.line} imports {known.module}"
        for module, known in every_import()
        if not module.name.startswith("mmadapters.tasks")
        and known.module.startswith("mmadapters.tasks")
    ]
    texts = [
        f"{module.place}:{node.lineno} names {node.value!r}"
        for module in modules().values()
        if not module.name.startswith("mmadapters.tasks")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"mmadapters\.tasks[\w.:]*", node.value)
    ]
    assert not faults + texts, listed(faults + texts)


def test_rooms_import_from_lower_floors_alone() -> None:
    faults = []
    for module, known in every_import():
        there = modules()[known.module].room if known.module in modules() else known.module
        here = module.room
        if there != here and FLOOR[there] >= FLOOR[here]:
            faults.append(f"{module.place}:{known.line} {here} imports {there}")
    assert not faults, listed(faults)


def test_no_circle_between_files() -> None:
    graph = {name: set() for name in modules()}  # type: dict[str, set[str]]
    for module, known in every_import():
        if known.module != module.name:
            graph[module.name].add(known.module)
    left = {name: set(needs) for name, needs in graph.items()}
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    # What is left is in a circle or above one: take away what nothing in the rest needs.
    while top := [name for name in left if not any(name in needs for needs in left.values())]:
        for name in top:
            del left[name]
    faults = [f"{name} <-> {', '.join(sorted(left[name] & left.keys()))}" for name in left]
    assert not faults, listed(faults)


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def test_private_names_stay_in_their_module() -> None:
    faults = [
        f"{module.place}:{known.line} imports {known.module} {known.name or ''}"
        for module, known in every_import()
        if known.module != module.name
        and (private(known.name or "x") or any(map(private, known.module.split("."))))
    ]
    for module in modules().values():
        taken = {
            alias.asname or alias.name
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        own = private_attributes(module.tree)
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Attribute) or not private(node.attr):
                continue
            base = node.value
            if isinstance(base, ast.Name) and base.id in ("self", "cls"):
                continue
            if isinstance(base, ast.Name) and base.id in taken:
                known_here = next(
                    (k for k in imports(module) if (k.name or k.module.split(".")[-1]) == base.id),
                    None,
                )
                if known_here is not None:
                    faults.append(f"{module.place}:{node.lineno} {base.id}.{node.attr}")
                continue
            if node.attr in all_private_attributes() and node.attr not in own:
                faults.append(f"{module.place}:{node.lineno} uses {ast.unparse(node)}")
    assert not faults, listed(faults)


def private_attributes(tree: ast.Module) -> set[str]:
    """Private names that the classes of a module define, as methods or as `self._name = …`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                    names.add(part.name)
                elif (
                    isinstance(part, ast.Attribute)
                    and isinstance(part.ctx, ast.Store)
                    and isinstance(part.value, ast.Name)
                    and part.value.id == "self"
                ):
                    names.add(part.attr)
    return {name for name in names if private(name)}


@cache
def all_private_attributes() -> frozenset[str]:
    """Those of all modules, without the names that torch's own modules have too."""
    from torch import nn

    names = set().union(*(private_attributes(module.tree) for module in modules().values()))
    return frozenset(names - set(vars(nn.Module())) - set(dir(nn.Module)))


def test_rooms_hold_few_files_and_files_few_lines() -> None:
    folders = Counter(module.path.parent for module in modules().values())
    faults = [
        f"{folder.relative_to(ROOT)}/ holds {count} files, at most {MOST_FILES}"
        for folder, count in folders.items()
        if count > MOST_FILES and folder.relative_to(ROOT).as_posix() not in UNLIMITED
    ]
    for module in modules().values():
        lines = len(module.path.read_text().splitlines())
        if lines > MOST_LINES:
            faults.append(f"{module.place} has {lines} lines, at most {MOST_LINES}")
    assert not faults, listed(faults)


def test_application_imports_itself_relatively() -> None:
    faults = [
        f"{module.place}:{known.line} {known.module}"
        for module, known in every_import()
        if module.name.startswith("mmadapters.tasks")
        and known.module.startswith("mmadapters.tasks")
        and not known.level
    ]
    assert not faults, listed(faults)


def test_public_classes_have_names_of_their_own() -> None:
    places: dict[str, list[str]] = {}
    for module in modules().values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module.place)
    shared = ("Options", "Vocabulary")
    faults = [
        f"{name}: {', '.join(files)}"
        for name, files in places.items()
        if len(files) > 1 and name not in shared and not name.endswith("Config")
    ]
    assert not faults, listed(faults)


def docstrings(module: Module) -> Iterator[tuple[int, str]]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(module.tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def test_docstrings_name_their_subject_first() -> None:
    riddle = re.compile(r"(What|Of|Whether what|How what) ")
    faults = [
        f"{module.place}:{line} {text.splitlines()[0]}"
        for module in modules().values()
        for line, text in docstrings(module)
        if riddle.match(text)
    ]
    assert not faults, listed(faults)


def names_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that a module gives: to variables, arguments, attributes, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def test_names_say_what_they_hold() -> None:
    words = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
    faults = [
        f"{module.place}:{line} {name}"
        for module in modules().values()
        for line, name in names_in(module.tree)
        if (name in RIDDLES[-2:]) or {w.lower() for w in words.findall(name)} & {*RIDDLES[:-2]}
    ]
    assert not faults, listed(faults)


@pytest.mark.parametrize("room", FLOOR)
def test_every_room_is_there(room: str) -> None:
    assert room in modules(), f"{room} is in the order of the floors, but not in the house"
