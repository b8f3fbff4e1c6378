"""The hashes of runs must never change, because they name the stored runs."""

import pytest

from experiments.config.compose import compose
from experiments.config.identity import run_hash
from experiments.config.resolve import resolve

HASHES = {
    "": "a7262f96d274017e",
    "experiment=table1_a2_sgd_sgd": "a7262f96d274017e",
    "experiment=table1_b8_adam-lr_adam seed=2": "f45e6af844877ad8",
    "experiment=figure2 seed=1": "a90d1a360ebb3654",
    "experiment=figure2 schedule=he": "a021cf79e0a63528",
    "experiment=figure2 precision=bf16": "b2a3d778ed3a9082",
    "experiment=figure3": "f9219c1dcd8888ca",
    "experiment=char_rnn": "932823b412921c68",
    "experiment=char_rnn schedule=exponential": "69919b8c2415a006",
    "experiment=char_rnn data.validation=true": "2921b804555c544e",
    "experiment=char_rnn_tower": "41016302362d7c2b",
    "experiment=softmax": "3dc7867024185829",
    "experiment=surface": "8407ef5a94c9f0cc",
    "experiment=tables_v1": "9dd2851bf930383a",
}


@pytest.mark.parametrize("overrides", HASHES)
def test_the_hashes_of_stored_runs_stay(overrides: str) -> None:
    config = compose([*overrides.split(), "device=cpu"])
    assert run_hash(resolve(config, config.data.name)) == HASHES[overrides]
