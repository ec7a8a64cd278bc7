"""
TRL's vLLM client against a server of our own: stock and ours, the methods under every correction, resume, evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from hf_effi import EffiGRPOTrainer
from tests.engines._vllm_runs import METHODS, MODES, logged, on_tiny_server, served, tiny_model, train, train_on
from tests.helpers import (
    TableReward,
    assert_bitwise_equal,
    prompt_dataset,
    save_tiny,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers.vllm_server import Fault

UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
GENERATE = "/v1/completions"
#: Plain gradient steps, so that weights differ as gradients do.
PLAIN = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def after_opening(server: Any) -> list[str]:
    return [
        call
        for call in server.calls[server.calls.index("/init_weight_transfer_engine") + 1 :]
        if call != "/server_info"
    ]


# --- stock and ours --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"vllm_importance_sampling_correction": False},
        {"vllm_importance_sampling_mode": "token_truncate"},
        {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.1},
        {"vllm_importance_sampling_mode": "sequence_truncate"},
        {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 5},
        {"beta": 0.04, "gradient_accumulation_steps": 2, "loss_type": "grpo"},
        {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
    ],
    ids=lambda over: "-".join(str(value) for value in over.values()) or "default",
)
def test_off_is_stock_to_the_bit_and_savings_keep_the_gradient(tmp_path: Path, over: dict[str, Any]) -> None:
    settings = {"noise": 0.2, **PLAIN, **over}
    model = save_tiny(tiny_model(), tiny_tokenizer(), tmp_path)  # a reference model is loaded by name
    stock = train(GRPOTrainer, model=model, **settings)
    off, on = train(exact_savings="off", model=model, **settings), train(model=model, **settings)
    assert_bitwise_equal(stock.model, off.model)
    assert stock.server.calls == off.server.calls == on.server.calls
    assert sum(logged(on, "effi/tokens_saved")) > 0 and on.exact_savings
    stock, on = weights_of(stock.model), weights_of(on.model)
    for name in stock:
        assert torch.allclose(stock[name], on[name], atol=1e-5), name


def test_new_weights_are_sent_before_each_generation_and_seen_in_its_log_probs() -> None:
    trainer = train(max_steps=3)
    assert after_opening(trainer.server) == [*UPDATE, GENERATE] * 3
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4


@on_tiny_server
def test_log_probs_show_a_server_that_keeps_its_old_weights() -> None:
    """The negative control of the test above: the third and later updates are received and not used."""
    trainer = train(max_steps=3, learning_rate=1e-2, faults=[Fault("/update_weights", "stale", first=2)])
    first, *rest = logged(trainer, "sampling/sampling_logp_difference/max")
    assert first < 1e-4 and min(rest) > 1e-2


def test_a_second_training_of_the_same_trainer_sends_its_weights_again() -> None:
    """Stock remembers the step that it sent weights at, and the second training begins at that step's number again."""
    with served() as server:
        trainer = train_on(server, max_steps=1, learning_rate=1e-1)
        trainer.train()
    assert after_opening(server) == [*UPDATE, GENERATE] * 2
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-4


@pytest.mark.parametrize("over", [{}, METHODS], ids=["plain", "methods"])
def test_adapters_are_merged_into_what_the_server_gets(over: dict[str, Any]) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    settings = {"peft_config": config, "learning_rate": 1e-2, **over}
    ours = train(**settings)
    assert max(logged(ours, "sampling/sampling_logp_difference/max")) < 1e-3
    if not over:
        assert_bitwise_equal(train(GRPOTrainer, **settings).model, train(exact_savings="off", **settings).model)


# --- filter, refill and pruning under the importance correction ------------------------------------------------------


class Records(EffiGRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.trained: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.trained.append(batch)
        return batch


def tokens_of(batch: dict[str, Any], row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    parts = (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask"))
    return tuple(tuple(batch[ids][row][batch[mask][row].bool()].tolist()) for ids, mask in parts)


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("cut", [False, True], ids=["ragged", "refill-of-one-token"])
def test_kept_rows_keep_their_own_log_probs_and_ratios(mode: str | None, cut: bool) -> None:
    """Half of the groups of the first round have no gradient; refill rounds may be one token wide."""
    over = {
        "vllm_importance_sampling_correction": mode is not None,
        **METHODS,
        "steps_per_generation": 1,
        "max_steps": 2,
    }
    over |= {"vllm_importance_sampling_mode": mode} if mode else {}
    faults = [Fault(GENERATE, "cut", first=call, times=1) for call in (2, 4)] if cut else []
    reward = TableReward([[1.0, 0.0, 0.5, 0.0], [0.0] * 4])
    trainer = train(Records, noise=0.3, faults=faults, reward_funcs=reward, **over)
    assert min(logged(trainer, "effi/gen_rounds")) > 1 and len(trainer.trained) == 2
    assert min(logged(trainer, "effi/rows_generated")) > 16 and max(logged(trainer, "effi/rows_trained")) <= 8
    for batch in trainer.trained:
        assert len(batch["advantages"]) == 8
        for row in range(8):
            prompt, completion = tokens_of(batch, row)
            mine = batch["sampling_per_token_logps"][row][: len(completion)]
            assert any(torch.equal(mine, torch.tensor(known)) for known in trainer.server.sampled[prompt, completion])
        assert ("importance_sampling_ratio" in batch) == (mode is not None)
        if mode is not None:
            assert torch.allclose(batch["importance_sampling_ratio"], expected_ratio(batch, mode), rtol=1e-5)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_truncate"])
def test_no_log_probs_of_dropped_rows_are_computed_under_the_correction(mode: str) -> None:
    over = {**METHODS, "steps_per_generation": 1, "max_steps": 2, "exact_savings": "trim,skip"}
    reward = TableReward([[1.0, 0.0, 0.5, 0.0], [0.0] * 4])
    trainer = train(Records, noise=0.3, reward_funcs=reward, vllm_importance_sampling_mode=mode, **over)
    kept = sum(
        int(((batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)) * (batch["advantages"] != 0)).sum())
        for batch in trainer.trained
    )
    # Once for the log-probs that the ratio is formed from, and once for the loss.
    assert sum(logged(trainer, "effi/tokens_real")) == 2 * kept > 0
    assert len(logged(trainer, "sampling/importance_sampling_ratio/mean")) == 2


def expected_ratio(batch: dict[str, Any], mode: str) -> torch.Tensor:
    """TRL's formula on the rows that were kept, with its default clipping from above at 3."""
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * batch["completion_mask"]
    ratio = (difference.sum(1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    return ratio.clamp(max=3.0) if mode.endswith("truncate") else ratio.masked_fill(ratio > 3.0, 0.0)


# --- resume and evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "token_truncate", "sequence_mask"])
def test_a_resume_inside_a_generation_block_meets_a_fresh_server(tmp_path: Path, mode: str | None) -> None:
    over = {"vllm_importance_sampling_correction": mode is not None, **METHODS, "max_steps": 5, "noise": 0.2}
    over |= {"vllm_importance_sampling_mode": mode} if mode else {}
    whole = train(folder=tmp_path, save_strategy="steps", save_steps=3, **over)
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"), **over)
    assert resumed.server.calls.count(GENERATE) < whole.server.calls.count(GENERATE)
    assert_bitwise_equal(whole.model, resumed.model)


def test_an_evaluation_generates_with_the_weights_of_its_step() -> None:
    over = {**METHODS, "max_steps": 4, "learning_rate": 1e-2}
    plain = train(**over)
    watched = train(eval_dataset=prompt_dataset(4, seed=1), eval_strategy="steps", eval_steps=1, **over)
    assert len(logged(watched, "eval_reward")) == 4
    differences = logged(watched, "eval_sampling/sampling_logp_difference/max")
    assert len(differences) == 4 and max(differences) < 1e-4
    # The first evaluation falls into the block of steps 1 and 2, and the second lies before the generation of step 3:
    # both leave the training as it is. (From then on TRL shuffles the rows by a random state that evaluations move, as
    # in stock.)
    for key in ("loss", "grad_norm"):
        assert logged(plain, key)[:2] == logged(watched, key)[:2]
    assert logged(plain, "reward")[:2] == logged(watched, "reward")[:2]
    # A step after an evaluation begins in eval mode; its time was once not counted.
    assert min(logged(watched, "effi/time_train")) > 0


@on_tiny_server
def test_the_server_refuses_what_vllm_refuses() -> None:
    """So that the tests above mean something."""
    with served() as server:
        trainer = train_on(server, train=False, model=tiny_model())
        asked = {
            "prompt": [[5, 6]],
            "n": 1,
            "max_tokens": 2,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
        }
        asked |= {"repetition_penalty": 1.0, "logprobs": 0}

        def said(path: str, body: Any = None) -> str:
            return str(server.answer(path, body or {}))

        assert "must be called before" in said("/update_weights", {"update_info": {}})
        assert "without a matching" in said("/finish_weight_update")
        assert "(200" in said("/start_weight_update") and "already active" in said("/start_weight_update")
        assert "while a weight update is active" in said(GENERATE, asked)
        assert "(200" in said("/finish_weight_update") and "token_id" in said(GENERATE, asked)
        assert "top_p=0.5 is not implemented" in said(GENERATE, {**asked, "top_p": 0.5})
        trainer.vllm_generation.vllm_client.update_model_params(trainer.model)
        assert "prefix cache of other weights" in said(GENERATE, asked)
