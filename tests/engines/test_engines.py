"""
DeepSpeed ZeRO-2 and ZeRO-3, and FSDP2, on two gloo processes beside DDP: the same weights, or a refusal by name.

Each engine is launched once and runs all cases of `runs.py`; the tests look at what came back. The launch files of the
package go through the real `accelerate launch`.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_effi import METHODS, accelerate_config
from tests.engines import runs, table
from tests.engines.runs import Outcome
from tests.helpers import assert_bitwise_equal, run_distributed
from tests.helpers.distributed import ROOT, _free_port, child_environment

KINDS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
WITHIN = 1e-6
Outcomes = Callable[[str], list[dict[str, Outcome]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Outcomes:
    """What an engine's two ranks returned; launched at the first question."""

    @functools.cache
    def of(engine: str) -> list[dict[str, Outcome]]:
        folder = str(tmp_path_factory.mktemp(engine))
        return run_distributed(runs.run_cases, 2, engine, [row.key for row in table.ROWS], folder, timeout=900)

    return of


def assert_same_training(found: Outcome, expected: Outcome) -> None:
    assert not found.refused, found.where
    assert found.updates == expected.updates > 0
    assert found.weights.keys() == expected.weights.keys() and found.weights
    gaps = {name: float((found.weights[name] - weight).abs().max()) for name, weight in expected.weights.items()}
    worst = max(gaps, key=gaps.__getitem__)
    assert gaps[worst] <= WITHIN, f"{worst} is {gaps[worst]:.2e} from DDP's"
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-5), ("learning_rate", 0)):
        assert found.series(name) and found.series(name) == pytest.approx(
            expected.series(name), rel=tolerance, abs=1e-6
        )


def assert_refused(found: Outcome, words: str) -> None:
    assert found.refused, "it trained"
    assert words in found.refused, found.where
    assert found.updates == 0, "it was refused in the middle of a run"


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.key)
@pytest.mark.parametrize("engine", table.ENGINES)
def test_each_cell_of_the_table(outcomes: Outcomes, engine: str, row: table.Row) -> None:
    if row.outcome(engine) == table.REFUSED:
        for rank in outcomes(engine):
            assert_refused(rank[row.key], row.refused[engine])
        return
    reference = "stock_grpo" if row.key in ("exact_savings", "grpo_token_budget", "rollout_savings") else row.key
    found, expected = outcomes(engine)[0][row.key], outcomes("ddp")[0][reference]
    assert_same_training(found, expected)
    assert found.more["kind"] == KINDS[engine]
    assert found.more["sharded"] == (engine in ("zero3", "fsdp2"))


@pytest.mark.parametrize("row", table.TRAINERS, ids=lambda row: row.key)
@pytest.mark.parametrize("engine", table.ENGINES)
def test_resume_gives_the_uninterrupted_run_to_the_bit(outcomes: Outcomes, engine: str, row: table.Row) -> None:
    whole = outcomes(engine)[0][row.key]
    again = whole.more["again"]
    assert again.updates == whole.updates > 3
    assert_bitwise_equal(again.weights, whole.weights)
    for name in ("loss", "learning_rate"):
        assert again.series(name) == whole.series(name)
    files = whole.more["saved"]
    if engine == "fsdp2":
        assert {"pytorch_model_fsdp_0", "optimizer_0"} <= set(files), "saved as shards"
        assert not [name for name in files if name.endswith(".safetensors")]
    elif engine != "ddp":
        assert [name for name in files if name.startswith("global_step")], "the engine's own checkpoint"


@pytest.mark.parametrize("engine", table.ENGINES)
def test_the_cases_do_what_their_names_say(outcomes: Outcomes, engine: str) -> None:
    """Else a schedule, a filter or a saving that an engine switched off would look like parity."""
    first = outcomes(engine)[0]
    wsd = [0.5, 1, 1, 1, 1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5]  # two updates up, two down by the square root
    assert first["Trainer"].series("learning_rate") == pytest.approx([1e-3 * share for share in wsd])
    assert first["EffiTrainer"].series("learning_rate") == first["Trainer"].series("learning_rate")
    rollouts = first["EffiGRPOTrainer"]
    assert min(rollouts.series("effi/rows_generated")) > max(rollouts.series("effi/rows_trained")) > 0
    assert max(rollouts.series("effi/gen_rounds")) > 1, "it refilled"
    assert max(rollouts.series("effi/dropped/pruned")) > 0
    # Under ZeRO-3 TRL's head gathers weights that are no shards yet: nothing can be measured, `auto` leaves all out.
    expected = () if engine == "zero3" else ("trim", "sort", "skip", "pack", "share")
    assert first["exact_savings"].more["savings"] == expected
    assert max(first["rollout_savings"].series("effi/decode_rows_saved")) > 0
    start = runs.tiny_qwen3(num_hidden_layers=3).state_dict()
    moved = [name for name, weight in first["Trainer"].weights.items() if not torch.equal(weight, start[name])]
    assert len(moved) == len(start)


def test_the_norms_of_shards_are_those_of_whole_gradients(outcomes: Outcomes) -> None:
    """Of gradients that were clipped by far: by the raw ones the schedule of a next run is made."""
    whole, shards = (outcomes(engine)[0]["gradient_norms"] for engine in ("ddp", "fsdp2"))
    for name in ("effi/gradient_l1", "effi/gradient_l2"):
        assert shards.series(name) == pytest.approx(whole.series(name), rel=1e-4) and min(whole.series(name)) > 0.5
    assert whole.series("effi/gradient_l2") == pytest.approx(whole.series("grad_norm"), rel=1e-5)


# --- the launch files ------------------------------------------------------------------------------------------------


def launch(kind: str, engine: str, names: list[str], folder: Path, timeout: float = 600) -> list[dict[str, Outcome]]:
    """Run cases under `accelerate launch` with the package's file for two processes; only the precision is changed."""
    folder.mkdir()
    words = ["--config_file", accelerate_config(kind, 2), "--mixed_precision", "no"]
    words += ["--main_process_port", str(_free_port()), "-m", "tests.engines.launched", engine, str(folder), *names]
    loopback = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    with (folder / "output").open("w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, env=child_environment(loopback), stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert code == 0, (folder / "output").read_text()[-6000:]
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize(("kind", "engine"), [("deepspeed", "zero3"), ("fsdp2", "fsdp2")])
def test_the_launch_files_train_as_ddp(outcomes: Outcomes, tmp_path: Path, kind: str, engine: str) -> None:
    """And what an engine cannot do is refused here too, where `args.deepspeed` and `args.fsdp` say nothing."""
    ranks = launch(kind, engine, ["EffiTrainer", "named_grpo", *table.LAUNCHED], tmp_path / kind)
    for name in ("EffiTrainer", "named_grpo"):
        found = ranks[0][name]
        assert_same_training(found, outcomes("ddp")[0][name])
        assert found.more["kind"] == KINDS[engine]
    whole = ranks[0]["EffiTrainer"]
    assert_bitwise_equal(whole.more["again"].weights, whole.weights)
    for rank in ranks:
        for name in table.LAUNCHED:
            (row,) = (row for row in table.ROWS if row.key == name)
            if engine in row.refused:
                assert_refused(rank[name], row.refused[engine])
            elif rank is ranks[0]:  # the only one that has whole weights
                assert_same_training(rank[name], outcomes("ddp")[0][name])


# --- the table itself ------------------------------------------------------------------------------------------------


def test_the_table_has_a_case_a_card_and_a_proof_for_everything() -> None:
    keys = [row.key for row in table.ROWS]
    assert len(set(keys)) == len(keys)
    assert set(keys) == set(runs.CASES)
    assert {row.card for row in table.ROWS if row.card} <= {method.key for method in METHODS}
    for row in table.ROWS:
        assert set(row.refused) <= set(table.ENGINES) - {"ddp"}
        assert bool(row.why) == bool(row.refused), f"{row.key}: say why, where something is refused"
    for setting in table.SETTINGS:
        assert setting.outcome in (table.RUNS, table.REFUSED)
        file, _, function = setting.proof.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), setting.title
