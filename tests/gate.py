"""Make processes wait after a checkpoint, so that a test can harm them at that point."""

from __future__ import annotations

import os
from pathlib import Path

# Python imports this first in each process. A run waits until its release or a signal.
WAITS = """
import os, select, signal
replace, made = os.replace, []

def waiting(source, target, **options):
    replace(source, target, **options)
    folder, name = os.path.split(target)
    if name == "checkpoint.pt":
        made.append(name)
        gate = os.path.join(os.environ["GATE"], os.path.basename(folder))
        if len(made) == int(os.environ["GATE_AT"]) and not os.path.exists(gate + ".open"):
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write)
            open(gate + ".waits", "w").close()
            while not (os.path.exists(gate + ".open") or select.select([read], [], [], 0.05)[0]):
                pass
            signal.set_wakeup_fd(-1)
            os.remove(gate + ".waits")

os.replace = waiting
"""


class Gate:
    """Runs wait here, by hash.

    Attributes:
        environment: for the processes that wait.
    """

    def __init__(self, folder: Path, at: int = 1) -> None:
        """Args: at: the number of the checkpoint after which a process waits."""
        self.folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(WAITS)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.environment = {"GATE": str(folder), "GATE_AT": str(at), "PYTHONPATH": path}

    def waits(self, name: str) -> bool:
        return (self.folder / f"{name}.waits").exists()

    def waiting(self) -> list[str]:
        return [path.stem for path in self.folder.glob("*.waits")]

    def open(self, name: str) -> None:
        """Release a run, now and at later checkpoints."""
        (self.folder / f"{name}.open").touch()
