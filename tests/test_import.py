from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import hvpkit

SCRIPT = """
import json, sys
import torch
before = set(sys.modules)
import hvpkit
print(json.dumps(sorted(set(sys.modules) - before)))
"""
OPTIONAL = {"scipy", "matplotlib", "typer", "rich", "sklearn", "click", "pandas", "tqdm"}


def added_modules() -> list[str]:
    result = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def test_importing_takes_no_optional_package_and_little_beside_torch() -> None:
    added = added_modules()
    own = [name for name in added if name.split(".")[0] == "hvpkit"]
    others = [name for name in added if name not in own]
    assert "hvpkit.curvature" in own
    assert not {name.split(".")[0] for name in others} & OPTIONAL
    assert not [name for name in own if name.split(".")[1:2] in (["cli"], ["plots"], ["zoo"])]
    assert len(others) <= 10, others


@pytest.mark.parametrize("name", ["hvpkit", "hvpkit.train", "hvpkit.zoo", "hvpkit.plots"])
def test_no_module_is_hidden_by_a_public_function_of_its_name(name: str) -> None:
    package = import_module(name)
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    hidden = {
        public for public in package.__all__ if not isinstance(getattr(package, public), ModuleType)
    } & modules
    assert not hidden, f"import {name}.<module> would give the function"


def test_the_top_level_holds_few_modules() -> None:
    assert len([*Path(hvpkit.__file__).parent.glob("*.py")]) <= 9
