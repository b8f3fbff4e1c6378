"""TensorBoard, MLflow, and several loggers at once log exactly the store's records."""

import math
from pathlib import Path
from typing import Any

import pytest
from test_wandb import START, Cut, config, cut_at, table

from experiments.config.compose import compose
from experiments.config.schema import Config
from experiments.records.loggers.catalog import find, loggers
from experiments.training.trainer import train

KINDS = ("tensorboard", "mlflow")
pytestmark = pytest.mark.filterwarnings("ignore")


def history(kind: str, store: Path, name: str) -> dict[str, dict[int, list[float]]]:
    """All values of each metric, by step."""
    found: dict[str, dict[int, list[float]]] = {}
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(store / name / "tensorboard"), {"scalars": 0})
        events.Reload()
        points = [
            (tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)
        ]
    else:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{store}/mlflow.db")
        (run,) = client.search_runs(["1"], f"tags.hash = '{name}'")
        metrics = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
        points = [(m.key, m.step, m.value) for history in metrics for m in history]
    for key, step, value in points:
        found.setdefault(key, {}).setdefault(step, []).append(value)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_is_logged_once(tmp_path: Path, kind: str) -> None:
    pytest.importorskip(kind)
    wanted = config(tmp_path, f"logger={kind}")
    with pytest.raises(Cut):
        train(wanted, cut_at(20))
    name = train(wanted)["hash"]
    found = history(kind, tmp_path, name)
    expected: dict[str, dict[int, float]] = {key: {0: value} for key, value in START.items()}
    for file in ("hyperparameters", "hypergradients", "curves"):
        for step, row in table(tmp_path / name / f"{file}.csv").items():
            for key, value in row.items():
                expected.setdefault(key, {})[step] = value
    for key in expected.keys() - {"step"}:
        assert all(len(values) == 1 for values in found[key].values())
        own = {step: values[0] for step, values in found[key].items() if step or key in START}
        assert own.keys() == expected[key].keys(), key
        assert all(math.isclose(own[s], expected[key][s], rel_tol=1e-6) for s in own)


def test_several_loggers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    name = train(config(tmp_path, "logger=[csv,wandb,tensorboard]", "trainer.epochs=1"))["hash"]
    assert any((tmp_path / name / "tensorboard").iterdir())
    assert any((tmp_path / name / "wandb").glob("offline-run-*"))
    single: Config = config(tmp_path, "logger=tensorboard")
    assert find(single).kinds == (loggers()["tensorboard"],)  # type: ignore[attr-defined]
    several: Any = find(compose(["logger=[csv, wandb]"]))
    assert several.kinds == (loggers()["csv"], loggers()["wandb"])
    with pytest.raises(ValueError, match=r"logger.name='wanb' is not one of csv, mlflow, tensor"):
        find(compose(["logger=[csv,wanb]"]))


@pytest.mark.parametrize("when", ["of", "log", "finish"])
def test_a_logger_that_fails_is_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
) -> None:
    def fail(*arguments: Any) -> None:
        raise ConnectionError("no such server\nand more")

    monkeypatch.setattr(loggers()["mlflow"], when, fail)
    name = train(config(tmp_path, "logger=[mlflow,tensorboard]", "trainer.epochs=1"))["hash"]
    assert capsys.readouterr().err == "mlflow failed and is left out of this run: no such server\n"
    assert 16 in history("tensorboard", tmp_path, name)["train_loss"]
