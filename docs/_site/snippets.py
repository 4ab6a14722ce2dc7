"""The Python blocks of a page: found, run in order in one namespace, and their pictures kept."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[re.Match[str]]:
    """Return the blocks of a page that are fenced as ``python``, in order."""
    return list(BLOCK.finditer(text))


def run(text: str, name: str) -> Iterator[tuple[re.Match[str], bytes | None]]:
    """Run each block after the other, and yield it with the picture that it left, if any.

    An error names the page and the line in it.
    """
    from matplotlib import pyplot as plt

    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(text):
        indent, code = block.groups()
        line = text.count("\n", 0, block.start(2))
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        exec(compile("\n" * line + code, name, "exec"), namespace)
        picture = None
        if plt.get_fignums():
            file = io.BytesIO()
            plt.gcf().savefig(file, format="png", dpi=120, transparent=True)
            plt.close("all")
            picture = file.getvalue()
        yield block, picture
