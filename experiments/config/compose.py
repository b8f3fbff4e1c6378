"""Compose a config from command-line overrides, by Hydra."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.cli import one_line
from experiments.config.overrides import check_overrides, protect_notation
from experiments.config.schema import CONFIGS, Config, to_config


def compose(overrides: Sequence[str]) -> Config:
    """Return the config of a command line with these overrides.

    Raises:
        ValueError: an unknown key or value, in one line.
    """
    GlobalHydra.instance().clear()
    overrides = protect_notation(overrides)
    check_overrides(overrides)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return to_config(hydra_compose("config", overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from None
