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
from pathlib import Path

import pytest

from tests.helpers import cpu_times

#: the rooms of the tests, the dearest files first: what comes last decides how long one process waits for the other
ROOMS = ("engines", "distributed", "zoo", "training", "unit", "contract")


def pytest_configure(config: pytest.Config) -> None:
    cpu_times.register(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by their room; the tests of a file, and the files of a room, keep their order."""
    here = Path(__file__).parent

    def room(item: pytest.Item) -> int:
        folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        return ROOMS.index(folder) if folder in ROOMS else len(ROOMS)

    items.sort(key=room)


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


@pytest.fixture(autouse=True)
def _shared_tokenizer() -> Iterator[None]:
    """A test that changes what all tests share fails itself, and not one that comes after it."""
    yield
    helpers = sys.modules.get("tests.helpers.tokenizer")
    changed = [] if helpers is None else helpers.restore_shared()
    assert not changed, (
        f"this test changed {', '.join(changed)} of the shared tokenizer: use tiny_tokenizer(fresh=True)"
    )


@pytest.fixture(autouse=True)
def _shared_progress_bars() -> Iterator[None]:
    """A test that turns progress bars off for all that come after it fails itself."""
    yield
    off = []
    hf_logging = sys.modules.get("transformers.utils.logging")
    if hf_logging is not None and not hf_logging.is_progress_bar_enabled():
        hf_logging.enable_progress_bar()
        off.append("transformers")
    datasets = sys.modules.get("datasets")
    if datasets is not None and datasets.are_progress_bars_disabled():
        datasets.enable_progress_bars()
        off.append("datasets")
    assert not off, f"this test left the progress bars of {' and '.join(off)} turned off"


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny tokenizer; tests that change it make their own with `tiny_tokenizer(fresh=True)`."""
    from tests.helpers import tiny_tokenizer

    return tiny_tokenizer()
