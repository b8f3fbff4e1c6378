"""Shared by the tests of studies: a study's runs, and its command in this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.config.identity import run_hash
from experiments.config.schema import Config
from experiments.execution.outcome import Outcome
from experiments.records.store import RunStore
from experiments.studies import study
from experiments.studies.study import Study
from experiments.training.trainer import train


def planned(asked: Study, *arguments: str) -> list[tuple[Any, Config]]:
    """The cells and configs of a study's first part."""
    part = next(asked.parts(asked.request(arguments)))
    return [run for batch in part.batches for run in batch]


def execute(
    asked: Study, folder: Path, *arguments: str, stop_after: int | None = None, draw: bool = True
) -> list[dict[str, Any]]:
    """A study's command in this process; returns the summaries of the runs that it has made.

    Args:
        folder: of the store, as `runs`, and of the results.
        stop_after: how many runs are made before it is interrupted.
        draw: whether it draws.
    """
    made: list[dict[str, Any]] = []

    def run_all(configs: Sequence[Config], workers: int | None) -> list[Outcome]:
        outcomes = []
        for config in configs:
            if len(made) == stop_after:
                raise KeyboardInterrupt
            new = RunStore(config.store).summary(run_hash(config)) is None
            outcomes.append(Outcome(config, train(config)))
            made.extend([outcomes[-1].summary or {}] * new)
        return outcomes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "run_all", run_all)
        if not draw:
            patch.setattr(Study, "draw", lambda self, folder: [])
        places = (f"store={folder}/runs", f"results={folder}/results")
        given = {argument.partition("=")[0] for argument in arguments}
        more = [place for place in places if place.partition("=")[0] not in given]
        try:
            assert asked.main([*more, *arguments]) == 0
        except KeyboardInterrupt:
            assert len(made) == stop_after
    return made


def written(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their paths in it."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
