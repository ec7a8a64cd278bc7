"""Two ranks of which the first talks to the vLLM server: parity with stock, methods, resume, a server that fails."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from trl import GRPOTrainer

from hf_effi import EffiGRPOTrainer
from hf_effi.errors import VLLMServerError
from tests.engines._vllm_runs import METHODS, logged, served, train_on
from tests.helpers import assert_bitwise_equal, run_distributed, weights_of
from tests.helpers.vllm_gloo import trl_client_on_cpu
from tests.helpers.vllm_server import Fault

GENERATE = "/v1/completions"


@contextlib.contextmanager
def served_to_ranks(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """The server runs in the first rank; no other one knows where."""
    if os.environ["RANK"] == "0":
        with served(*args, **kwargs) as server:
            yield server
    else:
        with trl_client_on_cpu():
            yield SimpleNamespace(url="http://127.0.0.1:1", group_port=1, calls=[])


def one(cls: type = EffiGRPOTrainer, noise: float = 0.2, faults: Any = (), **over: Any) -> Any:
    settings = {"per_device_train_batch_size": 4, "num_generations": 4, **over}
    with served_to_ranks(noise, faults) as server:
        trainer = train_on(server, cls, **settings)
    trainer.server_calls = server.calls
    return trainer


def on_two_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {"weights": {}}
    # Groups of 8 lie on both ranks.
    for name, extra in (("group of a rank", {}), ("group of two", {"num_generations": 8})):
        stock, off, on = (
            one(cls, **extra, **more)
            for cls, more in ((GRPOTrainer, {}), (EffiGRPOTrainer, {"exact_savings": "off"}), (EffiGRPOTrainer, {}))
        )
        found["weights"][name] = [weights_of(trainer.model) for trainer in (stock, off, on)]
        found["calls"] = on.server_calls.count(GENERATE), stock.server_calls == on.server_calls
    found["sequences split"] = weights_of(one(sequence_parallel_size=2).model)
    folder, methods = _agreed_folder(), {**METHODS, "per_device_train_batch_size": 4, "max_steps": 5}
    for mode in ("token_truncate", "sequence_mask"):
        over = {**methods, "vllm_importance_sampling_mode": mode}
        whole = one(folder=folder, save_strategy="steps", save_steps=3, **over)
        resumed = one(resume_from_checkpoint=f"{folder}/checkpoint-3", **over)
        found[mode] = weights_of(whole.model), weights_of(resumed.model), logged(whole, "effi/gen_rounds")
    return found


def test_ranks_agree_and_off_is_stock_to_the_bit() -> None:
    first, second = run_distributed(on_two_ranks, 2, timeout=900.0)
    for name, (stock, off, on) in first["weights"].items():
        assert_bitwise_equal(stock, off, what=f"{name}: off")
        for mine, other in zip((stock, off, on), second["weights"][name], strict=True):
            assert_bitwise_equal(mine, other, what=f"{name}: ranks")
        assert max(float((stock[key] - on[key]).abs().max()) for key in stock) < 1e-4
    whole = first["weights"]["group of a rank"][2]
    for split in (first["sequences split"], second["sequences split"]):
        assert max(float((whole[key] - split[key]).abs().max()) for key in whole) < 1e-4
    assert first["calls"] == (3, True) and second["calls"] == (0, True)
    for mode in ("token_truncate", "sequence_mask"):
        for weights in (first[mode][1], *second[mode][:2]):
            assert_bitwise_equal(first[mode][0], weights, what=f"{mode}: ranks, and resumed inside a block")
        assert max(first[mode][2]) > 1 and first[mode][2] == second[mode][2]


def failing_and_resumed() -> dict[str, Any]:
    from urllib3.util.retry import Retry

    Retry.get_backoff_time = lambda self: 0.0
    saving = {**METHODS, "per_device_train_batch_size": 4, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    found: dict[str, Any] = {"whole": weights_of(one(**saving).model), "said": [], "resumed": []}
    folder = _agreed_folder()
    for fault in (
        Fault(GENERATE, "few", first=3),
        Fault("/start_weight_update", "die", first=2),
        Fault(GENERATE, "hang", first=3),
    ):
        try:
            one(faults=[fault], folder=folder, **saving, ddp_timeout=8 if fault.kind == "hang" else 1800)
        except VLLMServerError as error:
            found["said"].append(str(error))
        resumed = one(folder=folder, resume_from_checkpoint=f"{folder}/checkpoint-2", **saving)
        found["resumed"].append(weights_of(resumed.model))
    return found


def _agreed_folder() -> str:
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=True)
    return broadcast_object_list([tempfile.mkdtemp()])[0]


def test_every_rank_ends_with_the_same_sentence_and_goes_on_from_the_checkpoint() -> None:
    first, second = run_distributed(failing_and_resumed, 2, timeout=900.0)
    assert first["said"] == second["said"] and len(first["said"]) == 3
    for message, says in zip(first["said"], ("completions where", "cannot be reached", "it hangs"), strict=True):
        assert says in message and "goes on from" in message
    for rank in (first, second):
        for resumed in rank["resumed"]:
            assert_bitwise_equal(first["whole"], resumed)


def under_zero3(folder: str) -> dict[str, Any]:
    """Every rank gathers each parameter for the weights that the first one sends."""
    from tests.helpers.cpu_engines import engine_arguments, run_on_cpu

    run_on_cpu("zero3")
    methods = {**METHODS, "per_device_train_batch_size": 4, "max_steps": 5, **engine_arguments("zero3")}
    whole = one(folder=folder, save_strategy="steps", save_steps=3, **methods)
    resumed = one(resume_from_checkpoint=f"{folder}/checkpoint-3", **methods)
    said = ""
    try:
        one(faults=[Fault("/start_weight_update", "error", first=2)], **methods)
    except VLLMServerError as error:
        said = str(error)
    found = {"log_probs": logged(whole, "sampling/sampling_logp_difference/max"), "said": said}
    return found | {name: _whole_weights(run) for name, run in (("whole", whole), ("resumed", resumed))}


def _whole_weights(trainer: Any) -> dict[str, Any]:
    state = trainer.accelerator.get_state_dict(trainer.deepspeed)
    return {name: value.clone() for name, value in state.items()} if trainer.is_world_process_zero() else {}


def test_zero3_sends_whole_weights_and_fails_on_every_rank(tmp_path: Any) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    pytest.importorskip("tests.helpers.cpu_engines", reason="needs the helper that runs DeepSpeed on CPUs")
    first, second = run_distributed(under_zero3, 2, str(tmp_path), timeout=900.0)
    # Noise of 0.2 is far below what stale or partial weights make of log-probs.
    assert max(first["log_probs"]) < 1.5
    assert "EngineCore" in first["said"] and first["said"] == second["said"]
    assert_bitwise_equal(first["whole"], first["resumed"])
