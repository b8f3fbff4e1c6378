"""Hydra's launcher `submitit_slurm`, with each job's own end reported.

The plugin's own launcher ends with the first job that fails. The work is done in
`experiments.execution.cluster`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from hydra.core.utils import JobReturn

if find_spec("hydra_plugins.hydra_submitit_launcher"):
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher

    class SlurmLauncher(submitit_launcher.SlurmLauncher):
        def launch(
            self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
        ) -> list[JobReturn]:
            from experiments.execution.cluster import launch

            return launch(self, job_overrides, initial_job_idx)
