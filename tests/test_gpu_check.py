"""The functions of `make gpu-check`, with device=cpu."""

import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import Finding
from test_figure2 import cifar

from experiments.cli import guarded
from experiments.studies.figure2.runs import HE

__all__ = ["cifar"]
CPU = torch.device("cpu")
STACK = "Adam(1e-3) / SGD(1e-6)"


@pytest.mark.compiler
def test_a_step_is_counted_and_compared() -> None:
    assert gpu_check.synchronizations(STACK, CPU, steps=2).found == "0"
    finding = gpu_check.captured(STACK, CPU, steps=2)
    assert finding.good and finding.found == "0 apart"


def test_a_synchronization_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(optimizer: object) -> None:
        import warnings

        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(gpu_check.HyperOptimizer, "step", step)
    finding = gpu_check.synchronizations(STACK, CPU, steps=2)
    assert (finding.found, finding.good) == ("2", False)


def test_a_differing_captured_step_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    class Wrong:
        def __init__(self, parameters: object, stack: str) -> None:
            self.p = next(iter(parameters))  # type: ignore[call-overload]
            self.size = float(len(made))
            made.append(self.p)

        @torch.no_grad()
        def step(self) -> None:
            self.p.add_(self.size)

    monkeypatch.setattr(gpu_check, "HyperOptimizer", Wrong)
    assert gpu_check.captured(STACK, CPU, steps=2).good is False


@pytest.mark.slow
def test_steps_are_timed_beside_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "STACKS", {"a tower": STACK})
    for found in (gpu_check.step_times(CPU, 1), gpu_check.whole_times(CPU, 1, batch=2)):
        assert len(found) == 2 and "a tower" in found[1].what


def test_figure_2_is_trained_in_bf16(cifar: Path, tmp_path: Path) -> None:
    few = ("trainer.batch_size=10", "trainer.compile=false", f"data.root={cifar}")
    finding = gpu_check.figure2(HE, "cpu", *few, f"store={tmp_path}")
    assert finding.good and "in bf16, 2 epochs, He et al.'s schedule" in finding.what
    (run,) = tmp_path.glob("*/config.json")
    assert '"autocast": true' in run.read_text()


def test_the_page_names_the_device_and_the_failures() -> None:
    found = [Finding("a", "1", True), Finding("b", "2", False), Finding("c", "3")]
    text = gpu_check.page(CPU, found)
    assert text.startswith("# Checked on ") and "| a | 1 | yes |\n| b | 2 | **no** |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", f"results={tmp_path}"])
    assert guarded(gpu_check.main) == 2
    assert capsys.readouterr().err == "error: torch sees no GPU; make gpu-check needs one\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_wrong() -> None:
    device = torch.device("cuda")
    for stack in gpu_check.STACKS.values():
        assert gpu_check.synchronizations(stack, device).good
        assert gpu_check.captured(stack, device).good
