"""Helpers for the pages of studies: Markdown and LaTeX tables, mean ± sd, files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.files import write_text


def table(heads: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown; `sides` has an l or an r for each column."""
    under = ("---:" if side == "r" else "---" for side in sides)
    return [f"| {' | '.join(cells)} |" for cells in (heads, [*under], *rows)]


def latex(
    caption: str,
    sides: str,
    heads: Sequence[str],
    groups: Iterable[tuple[str, Iterable[Sequence[str]]]],
) -> str:
    """A table as LaTeX; it needs the booktabs package.

    Args:
        groups: each a comment and its rows; a rule separates the groups.
    """
    body = []
    for comment, rows in groups:
        body.append(f"\\midrule{f' % {comment}' * bool(comment)}")
        for cells in rows:
            text = f"{' & '.join(cells)} \\\\".replace("±", "$\\pm$")
            text = re.sub(r"beta(\d)", r"$\\beta_\1$", text)
            body.append(re.sub(r"`(.*?)`", r"\\texttt{\1}", text))
    lines = [
        "\\begin{table}",
        f"  \\caption{{{caption}.}}",
        "  \\centering\\small",
        f"  \\begin{{tabular}}{{{sides}}}",
        "    \\toprule",
        f"    {' & '.join(heads).lstrip()} \\\\",
        *(f"    {line}" for line in body),
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def page(*parts: str | Sequence[str]) -> str:
    """A page of paragraphs and of tables as lists of lines; empty parts are left out."""
    texts = (part if isinstance(part, str) else "\n".join(part) for part in parts)
    return "\n\n".join(filter(None, texts)) + "\n"


def captioned(captions: Mapping[str, str]) -> list[str]:
    """Links to figures in the page's folder, each with its caption below."""
    return [part for name, text in captions.items() for part in (f"![{text}]({name}.png)", text)]


def with_sd(mean: float, sd: float, digits: int = 2) -> str:
    """Such as "4.81 ± 0.10"; without the standard deviation if it is NaN."""
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


def diverged(line: Any) -> str:
    """Such as " (1 of 3 diverged)"; empty if no run diverged."""
    return f" ({line.diverged} of {line.n} diverged)" if line.diverged else ""


def csv_of(table: pd.DataFrame, float_format: str | None = "%.6g") -> str:
    return table.to_csv(index=False, lineterminator="\n", float_format=float_format)


def write_all(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write texts to a folder, by file name; returns the paths."""
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]
