"""Hydra's launcher `pool`, the default: the jobs of a sweep through the pool of this machine.

Hydra finds launchers in packages of this name alone; the work is done in
`experiments.execution.sweep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


class PoolLauncher(Launcher):
    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        from experiments.execution.sweep import launch

        composed = [self.loader.load_sweep_config(self.config, list(job)) for job in job_overrides]
        return launch(composed)


ConfigStore.instance().store(
    group="hydra/launcher",
    name="pool",
    node={"_target_": "hydra_plugins.hyperopt_pool.PoolLauncher"},
    provider="hyperopt",
)
