"""The names that `import mmadapters` offers."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest

import mmadapters

RENAMED = {"FrozenPrefix": "FrozenTrunk", "TowerPrefix": "TowerTrunk"}


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    for name in mmadapters.__all__:
        getattr(mmadapters, name)
    # Python makes imported submodules attributes of the package.
    importlib.import_module("mmadapters.model.store")
    assert dir(mmadapters) == sorted(mmadapters.__all__)
    assert len(set(mmadapters.__all__)) == len(mmadapters.__all__)


def test_dir_is_the_same_before_anything_is_used() -> None:
    program = (
        "import sys, mmadapters\n"
        "print(*dir(mmadapters))\n"
        "assert 'torch' not in sys.modules, 'names alone must not import torch'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == sorted(mmadapters.__all__)


def test_helpers_of_the_package_are_private() -> None:
    public = {name: value for name, value in vars(mmadapters).items() if not name.startswith("_")}
    for name in public.keys() - {*mmadapters.__all__}:
        module = public[name]
        assert isinstance(module, types.ModuleType), name
        assert module.__name__ == f"mmadapters.{name}"


def test_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from mmadapters import *", names)
    assert names.keys() - {"__builtins__"} == {*mmadapters.__all__}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_name_still_works_and_warns_with_the_new_one(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"mmadapters.{old} .* mmadapters.{new}"):
        value = getattr(mmadapters, old)
    assert value is getattr(mmadapters, new)
    with pytest.warns(DeprecationWarning, match=new) as caught:
        exec(f"from mmadapters import {old}", {})
    assert {warning.filename for warning in caught} == {"<string>"}
    assert old not in dir(mmadapters)
    assert old not in vars(mmadapters)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'mmadapters' has no attribute 'FrozenRoot'"):
        mmadapters.FrozenRoot  # noqa: B018
