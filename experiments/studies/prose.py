"""What README and docs say of results: blocks that are written from the results, between markers.

    <!-- begin figure2/cpu/summary -->
    ...
    <!-- end -->

A block is named by its study, the study's preset, and a key of what `prose(folder)` of its report
returns. `make tables` writes all blocks; what stands between two markers is never edited by hand.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from experiments.studies.catalog import find

BLOCK = re.compile(r"(<!-- begin ([\w/]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 100


def written(text: str, results: Path) -> str:
    """A page with all its blocks written from a folder of results.

    Raises:
        ValueError: a block that no study knows, or that the folder has no results for.
    """

    def block(match: re.Match) -> str:
        study, *folders, key = match[2].split("/")
        found, folder = find(study), results.joinpath(study, *folders)
        texts = found.prose(folder) if folder.is_dir() else {}
        if key not in texts:
            raise ValueError(f"there are no results in {folder} for the block {match[2]}")
        return f"{match[1]}{wrapped(texts[key])}\n{match[3]}"

    return BLOCK.sub(block, text)


def wrapped(text: str) -> str:
    """Paragraphs in lines that fit; lists and tables as they are."""
    parts = (
        part
        if part.startswith(("|", "-"))
        else textwrap.fill(part, WIDTH, break_on_hyphens=False, break_long_words=False)
        for part in text.split("\n\n")
    )
    return "\n\n".join(parts)
