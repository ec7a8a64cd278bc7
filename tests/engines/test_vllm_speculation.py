"""
Speculative decoding: what TRL passes on to vLLM, what transformers refuses, and, on a real vLLM for CPUs
(`make test-vllm`), the same tokens with n-gram drafts as without, and how many of them are accepted as the policy
changes.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.scripts.vllm_serve import ScriptArguments, build_command

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from tests.contract._sources import ROOT
from tests.engines._vllm_runs import REAL_URL, logged, note, tiny_model
from tests.helpers import grpo_args, prompt_dataset, run_distributed, run_grpo, save_tiny, tiny_qwen3, tiny_tokenizer
from tests.helpers.vllm_real import ENVIRONMENT

#: Drafts are what followed the last two or three tokens before; there is nothing to train.
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}

# --- what is passed on -----------------------------------------------------------------------------------------------


def configs_of_the_page() -> list[dict[str, Any]]:
    """The settings of `docs/vllm.md`, as a shell hands them over."""
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    words = [word for block in blocks if "--speculative" in block for word in shlex.split(block.replace("\\\n", " "))]
    return [json.loads(words[i + 1]) for i, word in enumerate(words) if word.startswith("--speculative")]


def test_the_page_has_settings_that_a_shell_hands_over_whole() -> None:
    found = configs_of_the_page()
    assert len(found) >= 2 and all(config["num_speculative_tokens"] > 0 for config in found)
    (ranges,) = [c["num_speculative_tokens_per_batch_size"] for c in found if len(c) > 4]
    assert all(first <= last and 0 <= tokens <= 4 for first, last, tokens in ranges) and ranges[-1][2] == 0


def test_trl_passes_a_speculative_config_on_to_a_server_and_has_none_colocated() -> None:
    text = json.dumps(NGRAM)
    command = build_command(ScriptArguments(model="m", speculative_config=text))
    assert command[command.index("--speculative-config") + 1] == text
    assert "--speculative-config" not in build_command(ScriptArguments(model="m"))
    assert not [name for name in EffiGRPOConfig.__dataclass_fields__ if "speculative" in name]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM for CPUs: run `make test-vllm`")
def test_vllms_own_parser_takes_the_commands_of_the_page() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for config in configs_of_the_page():
        taken = parser.parse_args(["--speculative-config", json.dumps(config)]).speculative_config
        assert (json.loads(taken) if isinstance(taken, str) else taken) == config


# --- what transformers refuses ---------------------------------------------------------------------------------------


def test_assisted_decoding_of_transformers_takes_one_sequence_and_a_group_is_more(tmp_path: Path) -> None:
    model, tokens = tiny_qwen3(), torch.tensor([[5, 6, 7], [5, 6, 8]])
    with pytest.raises(ValueError, match="assisted generate is only supported for batch_size = 1"):
        model.generate(tokens, attention_mask=torch.ones_like(tokens), prompt_lookup_num_tokens=3, max_new_tokens=4)
    with pytest.raises(ValueError, match="num_return_sequences has to be 1 when doing assisted generate, but is 2"):
        model.generate(
            tokens[:1], prompt_lookup_num_tokens=3, num_return_sequences=2, do_sample=True, max_new_tokens=4
        )
    args = grpo_args(tmp_path, EffiGRPOConfig, generation_kwargs={"prompt_lookup_num_tokens": 3})
    with pytest.raises(ValueError, match="assisted generate is only supported for batch_size = 1"):
        run_grpo(EffiGRPOTrainer, args)


# --- on a real vLLM --------------------------------------------------------------------------------------------------


def counted(llm: Any) -> dict[str, int]:
    """vLLM's counters of draft tokens and of those that were accepted."""
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    names = {"drafted": "num_draft_tokens", "accepted": "num_accepted_tokens"}
    return {key: int(found.get(f"vllm:spec_decode_{name}", 0)) for key, name in names.items()}


def since(llm: Any, before: dict[str, int]) -> dict[str, int]:
    return {key: value - before[key] for key, value in counted(llm).items()}


def colocated(model: str, runs: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """
    Greedy tokens and counters of vLLM in this process before and after updates, for each speculative config.

    TRL has no argument for it: the class that it makes the engine of is given one more keyword.
    """
    import vllm._custom_ops
    from trl.generation import vllm_generation

    vllm._custom_ops._supports_onednn = False  # as in `test_vllm_real.py`
    plain = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32", disable_log_stats=False)
    found = []
    for config in runs:
        vllm_generation.LLM = plain if config is None else functools.partial(plain, speculative_config=config)
        found.append(_speculates(model))
    return found


def _speculates(model: str) -> dict[str, Any]:
    settings = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1}
    settings |= {"vllm_max_model_length": 256, "max_completion_length": 32, "learning_rate": 1e-2}
    args = grpo_args(tempfile.mkdtemp(), EffiGRPOConfig, **settings)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trainer = run_grpo(EffiGRPOTrainer, args, model=policy, train=False)
    generation = trainer.vllm_generation
    prompts = [tiny_tokenizer()(text)["input_ids"] for text in prompt_dataset(8)["prompt"]]
    found: dict[str, Any] = {"greedy": [], "greedy_counts": []}

    def greedy() -> None:
        generation.sync_weights()
        generation.temperature, before = 0.0, counted(generation.llm)
        found["greedy"].append(generation.generate(prompts=prompts, images=None, num_generations=1)[1])
        generation.temperature = 1.0
        found["greedy_counts"].append(since(generation.llm, before))

    greedy()
    with torch.no_grad():  # the same update in every run
        for parameter in trainer.model.parameters():
            places = torch.arange(1, parameter.numel() + 1, dtype=torch.float32)
            parameter.add_(0.05 * torch.sin(places * 12.9898).view_as(parameter))
    greedy()
    before = counted(generation.llm)
    trainer.train()
    found["training_counts"] = since(generation.llm, before)
    found["log_probs_apart"] = max(logged(trainer, "sampling/sampling_logp_difference/max"))
    return found


@pytest.mark.skipif(REAL_URL not in os.environ, reason="needs vLLM for CPUs: run `make test-vllm`")
def test_drafts_by_n_grams_change_no_token_and_are_accepted_after_updates_too(tmp_path: Path) -> None:
    model = save_tiny(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    # The second runner of vLLM had no n-grams when this was written.
    environment = {**ENVIRONMENT, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    ((without, drafted),) = run_distributed(colocated, 1, model, [None, NGRAM], timeout=1500.0, env=environment)
    assert without["greedy"] == drafted["greedy"] and without["greedy"][0] != without["greedy"][1]
    assert all(counts["drafted"] == 0 for counts in without["greedy_counts"])
    before, after = drafted["greedy_counts"]
    note(what="n-gram drafts, greedy: before and after an update", before=before, after=after)
    note(what="n-gram drafts while training", **drafted["training_counts"], log_probs=drafted["log_probs_apart"])
    for counts in (before, after, drafted["training_counts"]):
        assert 0 < counts["drafted"] and counts["accepted"] <= counts["drafted"]
    # Nothing that drafts has weights of the policy before the update: the drafts are as good as its text repeats.
    assert after["accepted"] > 0
    # vLLM's log-probs are those of the trainer's weights, also of tokens that were drafts.
    assert max(without["log_probs_apart"], drafted["log_probs_apart"]) < 1e-3
