from __future__ import annotations

import json
import subprocess
import sys

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
    assert not [name for name in own if name.split(".")[1:2] in (["cli"], ["plots"], ["demo"], ["zoo"])]
    assert len(others) <= 10, others
