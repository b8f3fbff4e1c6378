"""Print means over finished runs, grouped by columns of their tidy CSV.

    python -m experiments.summarise
    python -m experiments.summarise stack.rule=SGD stack.height=0,1,2 by=stack.height,0.lr
    python -m experiments.summarise data=mnist show=test_error,learned.0.lr csv=tidy.csv store=runs
    python -m experiments.summarise by=stack.height over=0.lr,stack

Each column=values selects the runs with one of these values: diverged=false; schedule.name=null
selects an empty column. A column may be given twice. Each line of the output is the mean ± standard
deviation over the runs of one group.

    show  columns to average; by default the test error in percent or the test perplexity, and
          train_loss in nats
    by    columns that define the groups; by default every setting that differs, except the seed
    over  settings that may differ within a group, as the seed may; other differences are an error
    csv   a file for the selected runs, one line each; a .json beside it has their provenance

The columns are the keys of a run's config (model, data, stack, stack.rule, stack.height, seed,
trainer.epochs, ...), the initial hyperparameters of each level (0.lr, 0.momentum, 1.lr, ...), and
the results: test_error (with trainer.l2 also objective; for a text test_loss,
test_bits_per_character, test_perplexity), train_loss, diverged, epochs, steps, and the final values
(learned.0.lr, ...).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.cli import asked_for_help, guarded
from experiments.config.baselines import parse
from experiments.files import write_json, write_text
from experiments.records.provenance import provenance
from experiments.records.tidy import JUDGED_BY, RESULTS, is_known, read_summaries, tidy_csv
from hyperopt import did_you_mean


@dataclass(frozen=True)
class Options:
    """Options of the command, beside the values of columns."""

    store: str = "runs"
    by: str = ""
    over: str = ""
    show: str = ""
    csv: str = ""


def select(table: pd.DataFrame, wanted: dict[str, list[str]]) -> pd.DataFrame:
    """Select the lines with one of the given values in each column.

    1e-2 equals 0.01; null selects an empty cell.
    """
    for column, values in wanted.items():
        table = table[table[column].map(_canonical).isin([_canonical(value) for value in values])]
    return table


def _canonical(value: Any) -> str:
    text = str(value).lower()
    if text in ("nan", "none", "null"):
        return "null"
    try:
        return str(float(text))
    except ValueError:
        return text


def settings_that_differ(table: pd.DataFrame) -> list[str]:
    """Name the settings in which the runs differ: the stack, but not the columns read from it."""
    own = [c for c in table if c not in RESULTS and not c.startswith(("learned.", "stack."))]
    read_from_stack = [c for c in own if c.partition(".")[0].isdigit()]
    candidates = [c for c in own if c not in ("hash", "seed", *read_from_stack)]
    return [c for c in candidates if table[c].nunique(dropna=False) > 1]


def means(table: pd.DataFrame, by: Sequence[str], show: Sequence[str]) -> pd.DataFrame:
    """One line for each combination of `by`: how many runs, how many diverged, mean ± sd of `show`.

    The standard deviation is the sample's. Missing values of diverged runs are ignored.
    """
    lines = []
    groups = table.groupby(list(by), dropna=False, sort=True) if by else [((), table)]
    for key, runs in groups:
        line: dict[str, Any] = dict(zip(by, key, strict=True))
        line |= {"n": len(runs), "diverged": int(runs.diverged.sum())}
        for name in show:
            values = pd.to_numeric(runs[name], errors="coerce").astype(float)
            line[name] = _with_sd(values.mean(), values.std(ddof=1))
        lines.append(line)
    return pd.DataFrame(lines)


def check_alike(table: pd.DataFrame, by: Sequence[str], over: Sequence[str]) -> None:
    """Raise a ValueError if the runs of a group differ in a setting."""
    groups = [runs for _, runs in table.groupby(list(by), dropna=False)] if by else [table]
    settings = settings_that_differ(table)
    mixed = {
        name: len(runs[name].drop_duplicates())
        for runs in groups
        for name in settings_that_differ(runs)
        if name in settings and name not in over
    }
    if mixed:
        told = ", ".join(f"{name} ({count} values)" for name, count in mixed.items())
        raise ValueError(
            f"runs in one group differ in {told}; name these in by=, choose one value of each, or "
            f"average over them with over={','.join([*over, *mixed])}"
        )


def why_empty(table: pd.DataFrame, by: Sequence[str], show: Sequence[str]) -> Iterator[str]:
    """Explain each empty mean in a sentence."""
    groups = [runs for _, runs in table.groupby(list(by), dropna=False)] if by else [table]
    for name in show:
        empty = [runs for runs in groups if runs[name].isna().all()]
        diverged = sum(bool(runs.diverged.all()) for runs in empty)
        if diverged:
            yield f"{name} is empty in {diverged} of {len(groups)} lines, whose runs all diverged"
        if (rest := len(empty) - diverged) and name.startswith("learned."):
            yield f"{name} is empty in {rest} of {len(groups)} lines, where nothing tunes it"
        elif rest:
            yield f"{name} is empty in {rest} of {len(groups)} lines, whose runs lack it"


def check_numbers(table: pd.DataFrame, show: Sequence[str]) -> None:
    """Raise a ValueError for a column that is not numeric."""
    for name in show:
        values = table[name].dropna()
        if values.dtype == bool or pd.to_numeric(values, errors="coerce").isna().any():
            raise ValueError(
                f"show={name} has no mean: it has values such as {values.iloc[0]}; "
                "name it in by= for a line for each value"
            )


def _with_sd(mean: float, sd: float) -> str:
    if pd.isna(mean):
        return ""
    return f"{mean:.4g}" if pd.isna(sd) else f"{mean:.4g} ± {sd:.2g}"


def _arguments(arguments: Sequence[str]) -> tuple[Options, dict[str, list[str]]]:
    own: dict[str, str] = {}
    wanted: dict[str, list[str]] = {}
    known = [f.name for f in fields(Options)]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} does not have the form column=value; see --help")
        if key in known:
            own[key] = value
        elif key == "stack":  # its notation contains commas
            wanted.setdefault(key, []).append(str(parse(value)))
        else:
            wanted.setdefault(key, []).extend(value.split(","))
    return Options(**own), wanted


def main() -> int:
    if asked_for_help(__doc__, Options):
        return 0
    options, wanted = _arguments(sys.argv[1:])
    if Path(options.csv).suffix == ".json":
        raise ValueError(f"csv={options.csv} must not end in .json; give a name such as tidy.csv")
    summaries = [*filter(is_known, read_summaries(Path(options.store)))]
    if not summaries:
        raise ValueError(f"there is no finished run in store={options.store}")
    text = tidy_csv(summaries)
    table = pd.read_csv(io.StringIO(text))
    by, over, show = (
        [name for name in text.split(",") if name]
        for text in (options.by, options.over, options.show)
    )
    show = show or [*(name for name in JUDGED_BY if name in table), "train_loss"]
    for name in (*wanted, *by, *over, *show):
        if name not in table:
            known = (*table.columns, *(f.name for f in fields(Options)))
            hint = did_you_mean(name, known)
            if name == "stack.lr":
                hint = "each level has its own: 0.lr is that of the lowest, then 1.lr, ..."
            raise ValueError(f"the runs have no column {name!r}; {hint}")
    table = select(table, wanted)
    if table.empty:
        asked = " ".join(f"{key}={','.join(values)}" for key, values in wanted.items())
        raise ValueError(f"of {len(summaries)} runs in {options.store} none has {asked}")
    by = by or [name for name in settings_that_differ(table) if name not in over]
    check_numbers(table, show)
    check_alike(table, by, over)
    if options.csv:
        kept = set(table.hash)
        selected = [summary for summary in summaries if summary["hash"] in kept]
        path = Path(options.csv)
        write_text(path, tidy_csv(selected))
        write_json(path.with_suffix(".json"), provenance(selected))
        print(f"{len(table)} runs are in {path}")
    print(means(table, by, show).to_string(index=False))
    for reason in why_empty(table, by, show):
        print(reason, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
