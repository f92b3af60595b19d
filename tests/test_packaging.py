"""What a user gets from the built wheel, and what importing it costs."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from pathlib import Path

import pytest
from timing import ratio

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"mmadapters": "mmadapters", "tasks": "mmadapters/tasks", "configs": "mmadapters/configs"}
BUILT_FROM = ("pyproject.toml", "setup.py", "LICENSE", "README.md", "tests", *FOLDERS)
ZOO_DATA = {".safetensors", ".json", ".md", ".txt"}
HEAVY = {"datasets", "matplotlib", "open_clip", "torchaudio", "transformers"}
UV = (sys.executable, "-m", "uv")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy of the tree, so that no earlier build or install shows through."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    build = ("build", "--wheel", "--no-build-isolation", "--offline", "--python", sys.executable)
    run(*UV, *build, "--out-dir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    install = ("pip", "install", "--offline", "--no-deps", "--python", sys.executable)
    run(*UV, *install, "--target", str(target), str(wheel))
    return target


def run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_installed(installed: Path, *command: str) -> str:
    """Run with `installed` before the checkout, from a folder that holds no packages."""
    return run(*command, env={**os.environ, "PYTHONPATH": str(installed)}, cwd=installed / "bin")


def files_of_packages(*suffixes: str) -> set[str]:
    """Every such file of the tree, by its path in the wheel."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
    }


def test_wheel_holds_every_module(contents: set[str]) -> None:
    assert {"mmadapters/tasks/cli/app.py", "mmadapters/configs/__init__.py"} <= contents
    assert files_of_packages(".py") - contents == set()


def test_wheel_holds_the_zoo_and_every_config(contents: set[str]) -> None:
    zoo = {path for path in files_of_packages(*ZOO_DATA) if path.startswith("mmadapters/zoo/")}
    assert any(path.endswith(".safetensors") for path in zoo)
    assert (zoo | files_of_packages(".yaml")) - contents == set()


def test_wheel_adds_one_name_to_site_packages(wheel: Path, contents: set[str]) -> None:
    dist_info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {path.split("/")[0] for path in contents} == {"mmadapters", dist_info}
    assert f"{dist_info}/licenses/LICENSE" in contents


def test_installed_wheel_imports_from_where_it_is_installed(installed: Path) -> None:
    names = ["mmadapters", "mmadapters.zoo", "mmadapters.tasks.cli.app", "mmadapters.configs"]
    program = f"""
import importlib, json, mmadapters
files = [importlib.import_module(name).__file__ for name in {names}]
print(json.dumps([mmadapters.__version__, files]))
"""
    version, files = json.loads(run_installed(installed, sys.executable, "-c", program))
    assert all(Path(file).is_relative_to(installed) for file in files), files
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version == project["version"]


def test_import_leaves_heavy_libraries_alone(installed: Path) -> None:
    program = "import json, sys, mmadapters; print(json.dumps(list(sys.modules)))"
    modules = json.loads(run_installed(installed, sys.executable, "-c", program))
    assert HEAVY.intersection(modules) == set()


def test_help_answers_in_the_time_of_five_imports_of_its_libraries(installed: Path) -> None:
    """That is a second where a process that imports Typer and Rich takes 0.2."""
    command, libraries = str(installed / "bin" / "mmadapters"), "import typer, rich.console"

    def answer() -> None:
        assert "Usage" in run_installed(installed, command, "--help")

    reference = partial(run_installed, installed, sys.executable, "-c", libraries)
    assert ratio(answer, reference, repeats=5) < 5
