"""What every test run starts from: offline, one thread per process, fixed seeds."""

from __future__ import annotations

import os

# These have to be set before the first import of torch and huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import gc
import random
import sys
from collections.abc import Iterator

import pytest


def pytest_unconfigure() -> None:
    """End the processes that children were forked from; of a session that is killed they end by themselves."""
    if "tests.helpers.servers" in sys.modules:
        sys.modules["tests.helpers.servers"].stop_servers()


@pytest.fixture(autouse=True, scope="module")
def _collected_once() -> Iterator[None]:
    """
    What is alive before a module is not looked at again.

    A Trainer collects garbage at the end of each `train()`: over the two million objects of the imported libraries
    that took a third of a second, five times what the training of a tiny model takes.
    """
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Each test starts from the same random state, so that its result does not depend on the tests before it."""
    random.seed(0)
    # The contract tests that need no model do not pay for importing torch.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny tokenizer; tests that change it make their own with `tiny_tokenizer(fresh=True)`."""
    from tests.helpers import tiny_tokenizer

    return tiny_tokenizer()
