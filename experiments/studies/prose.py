"""Generate the blocks of README and docs that depend on results, between markers.

    <!-- begin figure2/cpu/summary -->
    ...
    <!-- end -->

A block's name has the study, the preset, and a key of the dict from the report's `prose(folder)`.
A table with a line for each of several folders is the block

    <!-- begin lines table1/paper figure2/cpu -->
    ...
    <!-- end -->

Its lines come from the key `line` of `prose`: the experiment, the paper's result and ours, with
` | ` between them. The experiment becomes a link to its page.
`make tables` writes all blocks. Never edit the text between two markers by hand.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from experiments.studies.catalog import find
from experiments.studies.pages import table

BLOCK = re.compile(r"(<!-- begin ([\w/ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 100
HEADS = ("Experiment", "The paper", "Here")


def written(text: str, results: Path) -> str:
    """Return a page with all blocks generated from a folder of results.

    Raises:
        ValueError: an unknown block, or the folder has no results for it.
    """

    def one(name: str) -> str:
        study, *folders, key = name.split("/")
        found, folder = find(study), results.joinpath(study, *folders)
        texts = found.prose(folder) if folder.is_dir() else {}
        if key not in texts:
            raise ValueError(f"there are no results in {folder} for the block {name}")
        return texts[key]

    def block(match: re.Match) -> str:
        first, *others = match[2].split()
        if first == "lines":
            rows = []
            for name in others:
                what, *found = one(f"{name}/line").split(" | ")
                rows.append((f"[{what}](results/{name}/README.md)", *found))
            return match[1] + "\n".join(table(HEADS, "lll", rows)) + f"\n{match[3]}"
        return f"{match[1]}{wrapped(one(match[2]))}\n{match[3]}"

    return BLOCK.sub(block, text)


def wrapped(text: str) -> str:
    """Wrap paragraphs; leave lists and tables unchanged."""
    parts = (
        part
        if part.startswith(("|", "-"))
        else textwrap.fill(part, WIDTH, break_on_hyphens=False, break_long_words=False)
        for part in text.split("\n\n")
    )
    return "\n\n".join(parts)
