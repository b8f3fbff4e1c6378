"""What the site needs beyond Markdown: formulas, code, tables of arguments, the notebook.

Pages link to files of the repository, such as ../results/table1/paper/README.md, so that they work
on a code host too. The site takes these files, and the files that they link to.
"""

from __future__ import annotations

import base64
import html
import importlib
import inspect
import json
import math
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LINK = re.compile(r"(\]\()([^)#\s]+)")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to, and what those link to in turn."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    found: set[str] = set()
    while waiting:
        page = waiting.pop()
        inside = page.startswith("results/")
        path = ROOT / page if inside else ROOT / "docs" / page
        folder = posixpath.dirname(page if inside else f"docs/{page}")
        for _, target in LINK.findall(FENCE.sub("", path.read_text())):
            name = posixpath.normpath(posixpath.join(folder, target))
            if ":" in target or name.startswith(("docs/", "..")) or name in found:
                continue
            if (ROOT / name).is_dir():
                name += "/README.md"
            if (ROOT / name).is_file() and name not in found:
                found.add(name)
                waiting += [name] if name.endswith(".md") else []
    for name in sorted(found):
        files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    for notebook in sorted((ROOT / "docs").glob("*.ipynb")):
        for file, content in page_of(notebook).items():
            files.append(File.generated(config, file, content=content))
    return files


def page_of(notebook: Path) -> dict[str, str | bytes]:
    """The page of a notebook, and its figures beside it, by their places in the site."""
    name = notebook.stem
    links = f'<a href="../{notebook.name}" download>Download the notebook</a>'
    if repository := os.environ.get("GITHUB_REPOSITORY"):  # in a workflow of GitHub
        colab = f"https://colab.research.google.com/github/{repository}/blob/main/docs/"
        links += f' · <a href="{colab}{notebook.name}">Open it in Colab</a>'
    parts: list[str] = []
    files: dict[str, str | bytes] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            png = output.get("data", {}).get("image/png")
            if png:
                figure = f"{name}/figure{len(files)}.png"
                files[figure] = base64.b64decode(png)
                parts.append(f"![The figure that this cell draws]({figure})")
            else:
                parts.append(f"```text\n{''.join(output['text'])}```")
    return {f"{name}.md": "\n\n".join([*parts[:1], links, *parts[1:]]), **files}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where the files are in the site, and fill in what code says."""
    source = page.file.src_uri
    inside = source.startswith("results/")
    folder = posixpath.dirname(source if inside else f"docs/{source}")

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target:
            return match[0]
        name = posixpath.normpath(posixpath.join(folder, target))
        if (ROOT / name).is_dir():
            name += "/README.md"
        name = re.sub(r"\.ipynb$", ".md", name.removeprefix("docs/"))
        return match[1] + posixpath.relpath(name, posixpath.dirname(source) or ".")

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    markdown = "".join(parts)
    markdown = re.sub(r"<!-- source: (\S+) -->", lambda m: source_of(m[1]), markdown)
    return re.sub(r"<!-- arguments: (\w+) -->", lambda m: arguments(m[1]), markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, which browsers draw without a script."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    pattern = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    return re.sub(pattern, drawn, content, flags=re.DOTALL)


def source_of(name: str) -> str:
    """The code of a function, without its docstring."""
    module, _, function = name.rpartition(".")
    found = getattr(importlib.import_module(module), function)
    code = inspect.getsource(found)
    code = re.sub(r'\n    """.*?"""', "", code, count=1, flags=re.DOTALL)
    return f"```python\n{code}```"


def arguments(name: str) -> str:
    """The table of a rule's arguments: hyperparameters and options."""
    from hyperopt import RULES, format_value

    rule = RULES[name]
    lines = ["| Argument | Default | Legal values | Domain | Tuned by default |"]
    lines += ["| --- | ---: | --- | --- | --- |"]
    for hyper in rule.hypers.values():
        high = "∞" if hyper.high == math.inf else format_value(hyper.high)
        tuned = "yes" if hyper.default else "if you give it a value"
        lines.append(
            f"| `{hyper.name}` | `{format_value(hyper.default)}` | "
            f"{format_value(hyper.low)} ≤ value < {high} | `{hyper.domain.name}` | "
            f"{tuned if hyper.tuned else 'no'} |"
        )
    for option in rule.options.values():
        legal = "`True` or `False`" if isinstance(option.default, bool) else "a number"
        if option.low > -math.inf:
            legal = f"value ≥ {format_value(option.low)}"
        lines.append(f"| `{option.name}` | `{option.default}` | {legal} | | constant |")
    return "\n".join(lines)
