"""What MkDocs does beside its own: pages from files elsewhere and from notebooks, pictures, and no network."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import mathml
import snippets

ROOT = Path(__file__).parents[2]

ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "ARCHITECTURE.md": "architecture.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Files of the repository, and the pages that they are."""

DISPLAY_MATH, INLINE_MATH = re.compile(r"\$\$([^$]+)\$\$"), re.compile(r"\$([^$]+)\$")
"""Formulas of notebooks."""

OUTSIDE = re.compile(
    r"<(?:script|link|img|iframe)\b(?![^>]*rel=\"?(?:canonical|prev|next))[^>]*(?:src|href)=\"?(?:https?:)?//"
)
"""A tag that makes a browser load something from elsewhere."""


def on_config(config: Any) -> Any:
    """Let fences and inline code named ``math`` be formulas."""
    fences, inline = (
        config.mdx_configs.setdefault(f"pymdownx.{name}", {}) for name in ("superfences", "inlinehilite")
    )
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": mathml.fence}]
    inline["custom_inline"] = [{"name": "math", "class": "math", "format": mathml.inline}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from files elsewhere."""
    for source, target in ELSEWHERE.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        text = re.sub(r"(?<![\[(`/])docs/(\w+(?:/\w+)?)\.md", r"[\1](\1.md)", text)
        files.append(File.generated(config, target, content=text))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(json.loads(notebook.read_text()), notebook.stem)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def notebook_page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Return the Markdown of an executed notebook, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text = DISPLAY_MATH.sub(r"```math\n\1\n```", source.replace(".ipynb)", ".md)"))
            parts.append(INLINE_MATH.sub(lambda match: f"`#!math {' '.join(match[1].split())}`", text))
            continue
        parts.append(f"```py\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![what the code above draws]({name})")
            elif "text/html" in data:
                parts.append(f'<div class="output">{"".join(data["text/html"])}</div>')
            else:
                text = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts), pictures


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Draw the pictures of a page whose head says ``pictures: true``, each below the block that draws it."""
    if not page.meta.get("pictures"):
        return markdown
    parts, end = [], 0
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for number, (block, picture) in enumerate(snippets.run(markdown, page.file.src_path)):
            parts.append(markdown[end : block.end()])
            end = block.end()
            if picture:
                name = f"pictures/{Path(page.file.src_path).stem}_{number}.png"
                files.append(File.generated(config, name, content=picture))
                parts.append(f"\n\n![what the code above draws]({name})\n")
    return "".join([*parts, markdown[end:]])


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads anything from elsewhere: the site works without a network."""
    if found := OUTSIDE.search(output):
        raise PluginError(f"{page.file.src_path} loads from elsewhere: {found[0]}")
    return output
