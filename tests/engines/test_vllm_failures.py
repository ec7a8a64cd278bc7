"""
A vLLM server that dies, hangs, answers 500 or answers something else: one sentence that says so, and nothing lost.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer
from urllib3.util.retry import Retry

from hf_effi.errors import VLLMServerError
from hf_effi.trainers.grpo.vllm_server import Failure, GuardedClient
from tests.engines._vllm_runs import METHODS, logged, on_tiny_server, served, train, train_on
from tests.helpers import assert_bitwise_equal, prompt_dataset
from tests.helpers.vllm_server import Fault

GENERATE = "/v1/completions"
SAVING = {**METHODS, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
#: what happens in the third generation block at the latest -> what the message says
FAULTS = {
    "dies while it generates": (Fault(GENERATE, "die", first=3), "completions were generated: it cannot be reached"),
    "is gone when weights come": (
        Fault("/start_weight_update", "die", first=2),
        "new weights were sent: it cannot be",
    ),
    "dies while weights are sent": (Fault("/update_weights", "die", first=2), "failed while new weights were sent"),
    "answers 500": (Fault(GENERATE, "error", first=3), '500, {"error": {"message": "EngineCore encountered an issue.'),
    "cannot finish an update": (Fault("/finish_weight_update", "error", first=2), "new weights were sent: Exception"),
    "cannot reset its cache": (Fault("/reset_prefix_cache", "error", first=2), "its prefix cache was reset"),
    "leaves out a completion": (Fault(GENERATE, "few", first=3), "completions where"),
    "mixes up the prompts": (Fault(GENERATE, "other", first=3), "it answered for other prompts than it was sent"),
}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between retries, whose number stays as it is: a minute in a run."""
    monkeypatch.setattr(Retry, "get_backoff_time", lambda self: 0.0)


@pytest.fixture(scope="module")
def whole() -> Any:
    return train(**{**SAVING, "save_strategy": "no"})


#: a relay that dies leaves the vLLM behind it alive, in a transfer that nobody ends
_TINY_ONLY = {"dies while weights are sent"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=on_tiny_server if case in _TINY_ONLY else ()) for case in FAULTS]
)
def test_the_run_ends_with_a_sentence_and_goes_on_from_its_last_checkpoint(
    tmp_path: Path, whole: Any, case: str
) -> None:
    fault, says = FAULTS[case]
    with pytest.raises(VLLMServerError) as caught, served(faults=[fault]) as server:
        train_on(server, folder=tmp_path, **SAVING)
    message = str(caught.value)
    assert f"the vLLM server at {server.url} failed while" in message and says in message
    assert "trainer.train(resume_from_checkpoint=True) goes on from " + str(tmp_path / "checkpoint-") in message
    resumed = train(folder=tmp_path, resume_from_checkpoint=True, **SAVING)
    assert resumed.state.global_step == 4
    assert_bitwise_equal(whole.model, resumed.model)


def test_a_server_that_fails_twice_and_then_answers_is_asked_again(whole: Any) -> None:
    faults = [Fault(GENERATE, "error", first=2, times=2), Fault("/reset_prefix_cache", "error", first=1, times=3)]
    trainer = train(faults=faults, **{**SAVING, "save_strategy": "no"})
    assert trainer.server.calls.count(GENERATE) == whole.server.calls.count(GENERATE) + 2
    assert_bitwise_equal(whole.model, trainer.model)


@pytest.mark.parametrize("endpoint", [GENERATE, "/start_weight_update"])
def test_a_server_that_gave_no_answer_in_time_is_not_asked_again(endpoint: str) -> None:
    says = "no answer within 8 seconds, so it hangs: stop it.*raise ddp_timeout"
    with pytest.raises(VLLMServerError, match=says), served(faults=[Fault(endpoint, "hang")]) as server:
        train_on(server, ddp_timeout=8)
    assert server.calls.count(endpoint) == 1


def test_an_update_that_failed_is_not_sent_again() -> None:
    """Its second try would meet a server that takes no weights any more, and hide what it said first."""
    with (
        pytest.raises(VLLMServerError, match="EngineCore"),
        served(faults=[Fault("/start_weight_update", "error")]) as s,
    ):
        train_on(s)
    assert s.calls.count("/start_weight_update") == 1 and "/update_weights" not in s.calls


def test_without_a_checkpoint_the_message_says_so() -> None:
    with pytest.raises(VLLMServerError, match="train from the start: step 0 was reached and no checkpoint saved"):
        train(faults=[Fault(GENERATE, "die")], save_strategy="no")


def test_completions_that_generation_kwargs_ask_for_differently() -> None:
    with pytest.raises(
        VLLMServerError, match=r"2 completions where 4 were asked for \(2 prompts, 2 each\).*sets? `n`"
    ):
        train(generation_kwargs={"n": 1})


def test_a_failure_of_an_evaluation_ends_it_as_well() -> None:
    over = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    with pytest.raises(VLLMServerError, match="step 1 was reached"):
        train(faults=[Fault(GENERATE, "few", first=2)], eval_dataset=prompt_dataset(4, seed=1), **over)


def test_stock_trains_on_completions_of_other_prompts() -> None:
    """Why the guard is there: the same answer, in TRL, without a word of it."""
    stock = train(GRPOTrainer, faults=[Fault(GENERATE, "other")], max_steps=1)
    assert logged(stock, "sampling/sampling_logp_difference/max")[0] > 0.1


# --- the guard alone -------------------------------------------------------------------------------------------------


class Session:
    def __init__(self) -> None:
        self.mounted: list[str] = []

    def mount(self, prefix: str, adapter: Any) -> None:
        self.mounted.append(prefix)


class Client:
    """The part of TRL's client that the guard calls; `weights` is what arrived before it failed."""

    base_url, model = "http://127.0.0.1:1", "tiny"

    def __init__(self) -> None:
        self.session, self.weights = Session(), []

    def update_named_params(self, metadata: Any, named_params: Any) -> None:
        self.weights.append(next(named_params))
        raise Exception("Request failed: 500, no room")

    def generate(self, prompts: Any, n: int, **kwargs: Any) -> Any:
        raise AssertionError("asked for completions after a failure")


def test_the_rest_of_the_weights_is_gathered_after_a_failure() -> None:
    """Under ZeRO-3 every parameter is a collective, in which the other processes take part until the last."""
    gathered: list[int] = []

    def parameters() -> Any:
        for number in range(5):
            gathered.append(number)
            yield number

    guard = GuardedClient(Client(), 1.0, lambda: "Advice.")
    guard.update_named_params([], parameters())
    assert gathered == [0, 1, 2, 3, 4] and guard.weights == [0] and guard.model == "tiny"
    answer = guard.generate(prompts=[[1]], n=2)
    with pytest.raises(
        VLLMServerError, match="new weights were sent: Exception: Request failed: 500, no room. Advice."
    ):
        answer["completion_ids"][slice(0, 1)]
    with pytest.raises(VLLMServerError):
        list(answer["completion_ids"])


def test_an_error_of_the_weights_themselves_is_not_the_servers() -> None:
    def parameters() -> Any:
        yield torch.zeros(1)
        raise MemoryError("of the gather")

    class Takes(Client):
        def update_named_params(self, metadata: Any, named_params: Any) -> None:
            list(named_params)

    with pytest.raises(MemoryError, match="of the gather"):
        GuardedClient(Takes(), 1.0, str).update_named_params([], parameters())


def test_a_failure_travels_to_the_other_processes() -> None:
    sent = pickle.loads(pickle.dumps(Failure("gone.", OSError("not sent along"))))
    with pytest.raises(VLLMServerError, match=r"^gone\.$"):
        sent[0]
