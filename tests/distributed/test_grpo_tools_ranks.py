"""Tools on two ranks of which one calls them more often: no collective may depend on what a rank's rollouts do."""

from __future__ import annotations

import os
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from tests.helpers import ChildFailure, assert_bitwise_equal, grpo_args, run_distributed, tiny_qwen3, weights_of
from tests.helpers.collectives import first_difference

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'


def tool_tokenizer() -> PreTrainedTokenizerFast:
    """Return a character-level tokenizer with Qwen 3's template, which renders tools and whose calls TRL reads."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
    symbols = [*special, *string.printable[:95], "\n", "<unk>"]
    core = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=special[0],
        eos_token=special[2],
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=[special[1]],
    )
    tokenizer.add_tokens([AddedToken(symbol, special=False) for symbol in special[3:]])
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        The sum.
    """
    return a + b


def length(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(row[-1].get("content") or "")) for row in completions]


def train(cls: type, **over: Any) -> Any:
    """Train two updates in which the model of rank 0 calls a tool in every generation, and no other rank's does."""
    tokenizer, rank = tool_tokenizer(), int(os.environ.get("RANK", 0))
    model = tiny_qwen3(vocab_size=len(tokenizer) + 8, max_position_embeddings=4096)
    turns = iter(range(1000))

    def scripted(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        first = next(turns) % 2 == 0
        texts = [
            CALL if rank == 0 and i == 0 and first else "ok" + "1" * (i % 3) + "<|im_end|>"
            for i in range(len(input_ids))
        ]
        rows = [tokenizer(text)["input_ids"] for text in texts]
        width = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([row + [0] * (width - len(row)) for row in rows])], 1)

    model.generate = scripted
    settings = {"max_steps": 2, "num_generations": 4, "max_completion_length": 200, "ddp_timeout": 60, **over}
    args = grpo_args(tempfile.mkdtemp(), GRPOConfig if cls is GRPOTrainer else EffiGRPOConfig, **settings)
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i}+1"}] for i in range(16)]})
    trainer = cls(model, length, args, prompts, processing_class=tokenizer, tools=[add])
    trainer.train()
    return trainer


def stock_and_ours() -> Any:
    stock = train(GRPOTrainer)
    ours = train(EffiGRPOTrainer, exact_savings="off")
    calls = [entry["tools/call_frequency"] for entry in ours.state.log_history if "tools/call_frequency" in entry]
    counted = [entry["effi/rows_over_max_positions"] for entry in ours.state.log_history if "grad_norm" in entry]
    saving = train(EffiGRPOTrainer)
    return weights_of(stock.model), weights_of(ours.model), calls, counted, saving.state.global_step


def test_ranks_whose_rollouts_call_tools_unequally_train_as_stock() -> None:
    for stock, ours, calls, counted, saving_steps in run_distributed(stock_and_ours, 2, timeout=300):
        assert_bitwise_equal(stock, ours)
        assert calls == [1 / 8, 1 / 8] and counted == [0.0, 0.0] and saving_steps == 2


class GathersInEachTurn(EffiGRPOTrainer):
    """What must not be done."""

    def _generate_single_turn(self, prompt_ids: list[Any], *args: Any, **kwargs: Any) -> Any:
        self.accelerator.gather(torch.tensor([len(prompt_ids)]))
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)


def gather_in_each_turn() -> None:
    train(GathersInEachTurn)


def test_a_collective_that_one_rank_runs_more_often_is_named() -> None:
    try:
        run_distributed(gather_in_each_turn, 2, timeout=120)
    except ChildFailure as failure:
        (line,) = [line for line in str(failure).splitlines() if line.startswith("collective ")]
        assert "test_grpo_tools_ranks.py:_generate_single_turn" in line and "rank 1 " in line
    else:
        raise AssertionError("the ranks ran a different number of collectives, and nobody noticed")


def test_where_ranks_differ() -> None:
    one, other = ["a.py:f barrier", "a.py:g gather"], ["a.py:f barrier"]
    assert first_difference([one, one], whole=True) is None
    assert first_difference([one, other], whole=False) is None  # the second may have ended early
    assert first_difference([one, other], whole=True) == "collective 2 differs: rank 0 a.py:g gather, rank 1 none"
