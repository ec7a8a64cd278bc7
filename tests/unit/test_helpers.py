"""The test kit proves itself: a helper that passes everything would hide every defect."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments
from trl import GRPOTrainer

from tests.helpers import (
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    ChildFailure,
    TableReward,
    assert_bitwise_equal,
    binary_hash_reward,
    compare_runs,
    grpo_args,
    kill_and_resume,
    length_reward,
    lm_dataset,
    parity_reward,
    prompt_dataset,
    record_run,
    run_distributed,
    run_grpo,
    run_in_child,
    save_tiny,
    sft_dataset,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)
from tests.helpers._targets import hang, show_environment
from tests.helpers.distributed import ROOT

MODELS = [tiny_qwen3, tiny_llama, tiny_gemma, tiny_gpt2]


# --- tokenizer, models, data ---------------------------------------------------------------------------------------


class TestTokenizer:
    def test_round_trip_is_one_token_a_character(self):
        tokenizer = tiny_tokenizer()
        text = "12 + 3 = 15\n a  b"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert len(tokenizer) == VOCAB_SIZE == 100
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD_ID, EOS_ID)

    def test_pads_on_the_left(self):
        batch = tiny_tokenizer()(["ab", "a"], padding=True)
        assert batch["attention_mask"] == [[1, 1], [0, 1]]
        assert batch["input_ids"][1][0] == PAD_ID

    def test_chat_template_marks_the_answer(self):
        tokenizer = tiny_tokenizer()
        chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
        out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
        marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
        assert tokenizer.decode(marked) == "2<|im_end|>"
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(out["input_ids"]).startswith(prompt)

    def test_shared_unless_fresh(self):
        assert tiny_tokenizer() is tiny_tokenizer()
        assert tiny_tokenizer(fresh=True) is not tiny_tokenizer()


@pytest.mark.parametrize("build", MODELS)
class TestModels:
    def test_small_fp32_and_far_from_uniform(self, build):
        model = build()
        assert 20_000 < sum(p.numel() for p in model.parameters()) < 60_000
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        ids = torch.randint(4, VOCAB_SIZE, (4, 16))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        assert entropy < math.log(VOCAB_SIZE) - 0.3

    def test_seed_decides_and_global_state_stays(self, build):
        before = torch.random.get_rng_state()
        assert_bitwise_equal(build(seed=1), build(seed=1))
        assert torch.equal(before, torch.random.get_rng_state())
        with pytest.raises(AssertionError):
            assert_bitwise_equal(build(seed=1), build(seed=2))

    def test_special_tokens_are_set(self, build):
        model = build()
        for config in (model.config, model.generation_config):
            assert (config.pad_token_id, config.eos_token_id) == (PAD_ID, EOS_ID)
        assert build(end_tokens=3).generation_config.eos_token_id == [EOS_ID, 4, 5, 6]

    def test_left_padding_changes_nothing_but_absolute_positions(self, build):
        model = build().eval()
        ids = torch.randint(4, VOCAB_SIZE, (1, 6))
        padded = torch.cat([torch.full((1, 3), PAD_ID), ids], dim=1)
        mask = torch.tensor([[0] * 3 + [1] * 6])
        with torch.no_grad():
            plain = model(input_ids=ids).logits
            shifted = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
        same = torch.allclose(plain, shifted, atol=1e-4)
        assert same is (build is not tiny_gpt2)


def test_saved_model_loads_offline(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_qwen3(seed=3)
    path = save_tiny(model, tiny_tokenizer(), tmp_path)
    assert_bitwise_equal(model, AutoModelForCausalLM.from_pretrained(path))
    assert AutoTokenizer.from_pretrained(path)("12")["input_ids"] == tiny_tokenizer()("12")["input_ids"]


class TestData:
    def test_prompts_are_distinct_ragged_and_answered(self):
        rows = prompt_dataset(12)
        assert len(set(rows["prompt"])) == 12
        assert len({len(prompt) for prompt in rows["prompt"]}) > 1
        for row in rows:
            left, right = row["prompt"].split(": ")[1].rstrip("=").split("+")
            assert int(left) + int(right) == int(row["answer"])
        chats = prompt_dataset(12, conversational=True)
        assert [chat[0]["content"] for chat in chats["prompt"]] == list(rows["prompt"])

    def test_other_datasets_are_deterministic(self):
        assert sft_dataset(4)[:] == sft_dataset(4)[:]
        assert lm_dataset(4, length=5)[:] == lm_dataset(4, length=5)[:]
        assert {len(ids) for ids in lm_dataset(4, length=5)["input_ids"]} == {5}

    def test_rewards_read_both_formats(self):
        texts = [f"completion {i}" for i in range(64)]
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        for reward in (length_reward, parity_reward, binary_hash_reward):
            assert reward(completions=texts) == reward(completions=chats)
        assert length_reward(completions=["abc"]) == [0.3]
        assert parity_reward(completions=["a", "b", ""]) == [0.0, 1.0, 1.0]
        assert 16 < sum(binary_hash_reward(completions=texts)) < 48

    def test_table_by_prompt_and_occurrence(self):
        reward = TableReward({"p": [1.0, 0.0, None], "q": [5.0]})
        assert reward(prompts=["p", "p", "q"], completions=["", "", ""]) == [1.0, 0.0, 5.0]
        assert reward(prompts=["p", "p", "q"], completions=["", "", ""]) == [None, 1.0, 5.0]
        with pytest.raises(KeyError, match="no row for the prompt 'r'"):
            reward(prompts=["r"], completions=[""])
        rows = TableReward([[1.0], [2.0]])
        assert rows(prompts=["x", "y", "x", "z"], completions=[""] * 4) == [1.0, 2.0, 1.0, 1.0]


# --- comparer ------------------------------------------------------------------------------------------------------


class TestCompare:
    def test_one_ulp_is_found_and_named(self):
        left, right = weights_of(tiny_qwen3()), weights_of(tiny_qwen3())
        assert_bitwise_equal(left, right)
        name = "model.layers.1.mlp.up_proj.weight"
        value = right[name][3, 5]
        right[name][3, 5] = torch.nextafter(value, value + 1)
        with pytest.raises(AssertionError, match=rf"1 of \d+ tensors differ. First: {name}, 1 of 4096 elements"):
            assert_bitwise_equal(left, right)

    def test_signed_zero_nan_dtype_shape_names(self):
        zero = {"w": torch.tensor([0.0])}
        with pytest.raises(AssertionError, match="First: w"):
            assert_bitwise_equal(zero, {"w": torch.tensor([-0.0])})
        assert_bitwise_equal({"w": torch.tensor([float("nan")])}, {"w": torch.tensor([float("nan")])})
        with pytest.raises(AssertionError, match="float32 on the left and .* torch.float64"):
            assert_bitwise_equal(zero, {"w": torch.tensor([0.0], dtype=torch.float64)})
        with pytest.raises(AssertionError, match="names differ"):
            assert_bitwise_equal(zero, {"v": torch.tensor([0.0])})

    def test_runs_differ_by_log_or_by_weight(self):
        from tests.helpers import Run

        def run(loss, weight=1.0, runtime=1.0):
            return Run({"w": torch.tensor([weight])}, [{"loss": loss, "train_runtime": runtime, "step": 1}], 1)

        compare_runs(run(0.5), run(0.5, runtime=2.0))
        with pytest.raises(AssertionError, match=r"log_history\[0\] \(step 1\): loss is 0.5"):
            compare_runs(run(0.5), run(0.25))
        compare_runs(run(0.5), run(0.25), keys=[])
        with pytest.raises(AssertionError, match="First: w"):
            compare_runs(run(0.5), run(0.5, weight=2.0))
        with pytest.raises(AssertionError, match="compares nothing"):
            compare_runs(run(0.5), run(0.5), keys=["accuracy"])


# --- GRPO ----------------------------------------------------------------------------------------------------------


def test_grpo_runs_are_ragged_moving_and_repeatable(tmp_path):
    trainer = run_grpo(GRPOTrainer, grpo_args(tmp_path / "a"))
    again = run_grpo(GRPOTrainer, grpo_args(tmp_path / "b"))
    compare_runs(trainer, again)
    with pytest.raises(AssertionError):
        assert_bitwise_equal(trainer.model, tiny_qwen3(end_tokens=10))
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 3
    assert any(0 < entry["completions/clipped_ratio"] < 1 for entry in logs)
    assert any(entry["frac_reward_zero_std"] < 1 for entry in logs)
    with pytest.raises(AssertionError):
        compare_runs(trainer, run_grpo(GRPOTrainer, grpo_args(tmp_path / "c", seed=8)))


def test_grpo_conversational(tmp_path):
    trainer = run_grpo(
        GRPOTrainer, grpo_args(tmp_path, max_steps=1), train_dataset=prompt_dataset(8, conversational=True)
    )
    assert trainer.state.global_step == 1


# --- processes -----------------------------------------------------------------------------------------------------


def _rank_and_sum(offset, *, scale):
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    value = torch.tensor([float(rank + offset)])
    torch.distributed.all_reduce(value)
    return rank, scale * value.item(), torch.get_num_threads()


def _fail_on_rank_one():
    print(f"hello from rank {os.environ['RANK']}")
    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is unhappy")
    torch.distributed.barrier()


def _train(output_dir, resume=False, **over):
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_strategy": "no",
        "ddp_find_unused_parameters": False,
        **over,
    }
    trainer = Trainer(model=tiny_qwen3(), args=TrainingArguments(**settings), train_dataset=lm_dataset(32))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def _train_and_report(output_dir, batch):
    trainer = _train(output_dir, max_steps=3, per_device_train_batch_size=batch)
    return type(trainer.model_wrapped).__name__, trainer.args.world_size, record_run(trainer)


def _train_with_checkpoints(output_dir, resume):
    trainer = _train(output_dir, resume, save_strategy="steps", save_steps=2)
    begun_at = trainer.state.log_history[0]["step"] if not resume else None
    # A resumed run keeps the old log; what it did itself is what comes after the checkpoint it started from.
    return record_run(trainer), begun_at, os.getpid()


def _table_rewards(prompts_by_rank):
    torch.distributed.init_process_group("gloo")
    mine = prompts_by_rank[torch.distributed.get_rank()]
    return TableReward({"p": [0, 1, 2, 3]})(prompts=mine, completions=mine)


class TestRunDistributed:
    def test_returns_the_value_of_each_rank(self):
        assert run_distributed(_rank_and_sum, 2, 10, scale=2) == [(0, 42.0, 1), (1, 42.0, 1)]

    def test_failure_shows_every_rank_and_does_not_hang(self):
        with pytest.raises(ChildFailure) as failure:
            run_distributed(_fail_on_rank_one, 2, timeout=60)
        text = str(failure.value)
        assert "rank one is unhappy" in text
        assert "hello from rank 0" in text and "hello from rank 1" in text

    def test_timeout_kills_and_shows_output(self):
        with pytest.raises(ChildFailure, match="no end after 8 s(?s:.*)about to hang"):
            run_distributed(hang, 1, timeout=8)

    def test_closures_are_refused(self):
        with pytest.raises(ValueError, match="top level"):
            run_distributed(lambda: 1)

    def test_one_rank_has_no_launcher(self):
        assert run_distributed(show_environment, 1, ["RANK", "OMP_NUM_THREADS"]) == [
            {"RANK": None, "OMP_NUM_THREADS": "1"}
        ]

    def test_table_reward_counts_in_global_order(self):
        assert run_distributed(_table_rewards, 2, [["p", "p"], ["p", "p"]]) == [[0, 1], [2, 3]]

    def test_trainer_runs_real_ddp(self, tmp_path):
        (wrapper, world, one), (_, _, other) = run_distributed(_train_and_report, 2, str(tmp_path / "two"), 4)
        assert (wrapper, world) == ("DistributedDataParallel", 2)
        assert_bitwise_equal(one.weights, other.weights)
        wrapper, world, single = run_distributed(_train_and_report, 1, str(tmp_path / "one"), 8)[0]
        assert world == 1 and wrapper != "DistributedDataParallel"
        # 2 ranks x 4 rows see the same 8 rows per step as 1 rank x 8, so that the runs agree but for rounding.
        for name, tensor in single.weights.items():
            assert torch.allclose(tensor, one.weights[name], atol=1e-3), name


class TestKillAndResume:
    def test_stock_trainer_is_killed_and_resumes(self, tmp_path):
        whole, begun_at, _ = run_in_child(_train_with_checkpoints, tmp_path / "whole")
        assert begun_at == 1
        cut, begun_at, _ = kill_and_resume(_train_with_checkpoints, tmp_path / "cut", kill_after_checkpoint=4)
        assert begun_at is None
        compare_runs(whole, cut, keys=[])

    def test_steps_after_the_checkpoint_are_lost_and_done_again(self, tmp_path):
        cut, _, _ = kill_and_resume(_train_with_checkpoints, tmp_path / "cut", kill_after_checkpoint=2, extra_steps=1)
        assert [entry["step"] for entry in cut.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]

    def test_a_run_that_never_gets_there_fails(self, tmp_path):
        with pytest.raises(ChildFailure, match="ended before step 40"):
            kill_and_resume(_train_with_checkpoints, tmp_path, kill_after_checkpoint=40)

    def test_a_script_is_resumed_by_its_arguments(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "import argparse\n"
            "from tests.unit.test_helpers import _train\n"
            "parser = argparse.ArgumentParser()\n"
            "parser.add_argument('--output_dir')\n"
            "parser.add_argument('--resume_from_checkpoint')\n"
            "args = parser.parse_args()\n"
            "resume = args.resume_from_checkpoint == 'True'\n"
            "trainer = _train(args.output_dir, resume, save_strategy='steps', save_steps=2)\n"
            "trainer.save_model()\n"
        )
        whole = run_in_child(script, tmp_path / "whole")
        assert_bitwise_equal(whole, kill_and_resume(script, tmp_path / "cut", kill_after_checkpoint=2))


def test_helpers_import_under_a_launcher_without_heavy_modules():
    code = "import sys, tests.helpers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
