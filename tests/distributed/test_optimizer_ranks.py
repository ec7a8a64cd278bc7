"""Every optimizer on two ranks: both hold the same weights, and those of one process that sees all rows."""

import pytest
import torch

from tests.helpers import assert_bitwise_equal, run_distributed, weights_of
from tests.helpers.optimizers import OPTIONS, trainer_by

UPDATES = 3
#: A direction without a gradient has one of rounding, which these scale to the size of the others: one process and two
#: differ by whole updates there. The ranks must agree all the same.
AMPLIFIES = {"soap"}
#: Newton and Schulz's iterations run in bf16, where a rounding of the gradient is one of 2^-8 of the update.
TOLERANCE = {"muon": 1e-3, "mars_m": 1e-3}


def trained(folder, rows, names):
    """Return the weights after some updates with each optimizer, `rows` rows on each rank."""
    found = {}
    for name in names:
        over = {"max_steps": UPDATES, "per_device_train_batch_size": rows, "train_sampling_strategy": "sequential"}
        trainer = trainer_by("config", name, f"{folder}/{name}", ddp_find_unused_parameters=False, **over)
        trainer.train()
        found[name] = weights_of(trainer.model)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, names = str(tmp_path_factory.mktemp("ranks")), list(OPTIONS)
    return run_distributed(trained, 2, folder, 2, names), trained(folder + "/one", 4, names)


@pytest.mark.parametrize("optim", OPTIONS)
def test_two_ranks_are_one_process(optim, runs):
    ranks, whole = runs
    assert_bitwise_equal(ranks[0][optim], ranks[1][optim], "ranks")
    if optim in AMPLIFIES:
        return
    for name, weight in whole[optim].items():
        torch.testing.assert_close(
            ranks[0][optim][name], weight, rtol=0, atol=TOLERANCE.get(optim, 2e-5), msg=f"{optim}: {name}"
        )
