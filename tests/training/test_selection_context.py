"""What a selector may read of prompts: the model's own states, without a trace in the run."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_effi.errors import RefusedError
from hf_effi.functional.rollouts import ShuffledPrompts
from hf_effi.trainers.grpo.config import EffiGRPOConfig
from hf_effi.trainers.grpo.context import PromptReader, log_metrics
from hf_effi.trainers.grpo.trainer import EffiGRPOTrainer
from tests.helpers import (
    assert_bitwise_equal,
    grpo_args,
    prompt_dataset,
    run_grpo,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_qwen3,
)

MODELS = {
    "qwen3": tiny_qwen3,
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "gemma": tiny_gemma,
    "gpt2": tiny_gpt2,
    "lora": lambda: get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear")),
    "lora with a head of its own": lambda: get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
}


class Reads(ShuffledPrompts):
    """Chooses as `ShuffledPrompts`, and reads the model for nothing."""

    def attach(self, context: Any) -> None:
        self.context, self.seen = context, []

    def select(self, count: int) -> list[int]:
        for layer in ("last", "mlp"):
            self.seen.append(self.context.read_prompts(range(self.size), lambda states, ids: states.mean(0), layer))
        return super().select(count)

    def metrics(self) -> dict[str, float]:
        return {"reads": len(self.seen), "nothing": float("nan")}


def reader(model: Any = None, tmp_path: Any = "out", budget: int = 40, **kwargs: Any) -> PromptReader:
    args = grpo_args(tmp_path, EffiGRPOConfig)
    return PromptReader(run_grpo(EffiGRPOTrainer, args, model=model, train=False, **kwargs), tokens_per_forward=budget)


def module_that_reads(model: Any, layer: str) -> Any:
    """By name, as the test knows these models."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    if layer == "last":
        return inner.get_output_embeddings()
    return inner.transformer.h[-1].mlp if hasattr(inner, "transformer") else inner.model.layers[-1].mlp


@pytest.mark.parametrize("layer", ["last", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_the_prompt_alone(tmp_path: Any, name: str, layer: str) -> None:
    context = reader(MODELS[name](), tmp_path)
    model, tokenizer = context._host.model, context._host.processing_class
    assert model.training
    rows = [3, 0, 7, 5, 12, 9]
    data = prompt_dataset(16)
    told: dict[tuple[int, ...], torch.Tensor] = {}

    def read(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert states.dtype == torch.float32 and len(states) == len(ids)
        told[tuple(ids.tolist())] = states
        return states[-1]

    found = context.read_prompts(rows, read, layer)
    assert model.training and found.shape == (6, 32) and found.dtype == torch.float32
    for place, row in enumerate(rows):
        ids = tokenizer(data[row]["prompt"])["input_ids"]
        given: list[torch.Tensor] = []
        keep = functools.partial(lambda given, _, args: given.append(args[0][0]), given)
        hook = module_that_reads(model, layer).register_forward_pre_hook(keep)
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([ids]))
        model.train()
        hook.remove()
        assert torch.allclose(told[tuple(ids)], given[0], atol=1e-5), name
        assert torch.equal(found[place], told[tuple(ids)][-1])


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_next_token(tmp_path: Any, name: str) -> None:
    context = reader(MODELS[name](), tmp_path)
    model, data = context._host.model, prompt_dataset(16)
    rows = [3, 0, 7, 5]
    found = context.read_prompts(rows, lambda logits, ids: logits.reshape(-1), "next")
    for place, row in enumerate(rows):
        ids = context._host.processing_class(data[row]["prompt"])["input_ids"]
        with torch.no_grad():
            expected = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(found[place], expected, atol=1e-4)


def test_reading_leaves_no_trace(tmp_path: Any) -> None:
    runs = {}
    for selector in (ShuffledPrompts(16, seed=5), Reads(16, seed=5)):
        model = tiny_gpt2(end_tokens=10, resid_pdrop=0.1)  # draws random numbers in training
        args = grpo_args(tmp_path, EffiGRPOConfig, exact_savings="off", disable_dropout=False)
        runs[type(selector)] = run_grpo(EffiGRPOTrainer, args, model=model, prompt_selector=selector)
    plain, reads = runs[ShuffledPrompts], runs[Reads]
    assert_bitwise_equal(plain.model, reads.model)
    logs = [
        [
            {k: v for k, v in entry.items() if "time" not in k and "runtime" not in k and "per_second" not in k}
            for entry in t.state.log_history
        ]
        for t in (plain, reads)
    ]
    counted = [entry.pop("effi/select/reads", None) for entry in logs[1]]
    assert logs[0] == logs[1]
    assert counted[:3] == [2, 4, 6]
    assert not any("nothing" in key for entry in logs[1] for key in entry)


def test_prompts_are_tokenized_as_generation_does(tmp_path: Any) -> None:
    for conversational in (False, True):
        data = prompt_dataset(16, conversational=conversational)
        context = reader(None, tmp_path, train_dataset=data)
        trainer = context._host
        before = {name: list(values) for name, values in trainer._metrics["train"].items()}
        ids = context.prompt_ids([2, 5])
        assert ids == trainer._tokenize_prompts([data[2]["prompt"], data[5]["prompt"]])[0]
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(before)
        context.prompt_ids([1])
        assert {name: list(values) for name, values in trainer._metrics["train"].items()} == before


def test_prompts_that_are_more_than_their_column_are_refused(tmp_path: Any) -> None:
    context = reader(None, tmp_path)
    context._rows = [{"prompt": "1+1=", "images": [object()]}]
    with pytest.raises(RefusedError, match="here come the column 'images' with it"):
        context.prompt_ids([0])
    context._rows = [{"prompt": "1+1=", "images": None}]
    assert len(context.prompt_ids([0])) == 1
    context._host.rollout_func = lambda prompts, trainer: {}
    with pytest.raises(RefusedError, match="what rollout_func makes of them"):
        context.prompt_ids([0])


def test_results_do_not_depend_on_the_batches(tmp_path: Any) -> None:
    model = tiny_qwen3()
    read = [
        reader(model, tmp_path, budget=budget).read_prompts(range(16), lambda states, ids: states.sum(0))
        for budget in (1, 40, 10_000)
    ]
    for other in read[1:]:
        assert torch.allclose(read[0], other, atol=1e-4)
    assert len(torch.unique(read[0], dim=0)) == 16


def test_what_is_made_of_states_is_not_rounded_in_bf16(tmp_path: Any) -> None:
    args = grpo_args(tmp_path, EffiGRPOConfig, bf16=True)
    context = PromptReader(run_grpo(EffiGRPOTrainer, args, train=False))
    found = context.read_prompts(range(4), lambda states, ids: (states[0] @ states[-1]).reshape(1))
    states = context.read_prompts(range(4), lambda states, ids: torch.cat([states[0], states[-1]]))
    first, last = states.double().chunk(2, dim=1)
    assert torch.allclose(found[:, 0].double(), (first * last).sum(1), rtol=1e-5)


def test_what_it_knows_and_what_it_refuses(tmp_path: Any) -> None:
    context = reader(None, tmp_path)
    assert (context.size, context.group_size, context.seed) == (16, 2, 7)
    assert context.column("level") == [0, 1, 2, 3] * 4
    with pytest.raises(ValueError, match="no column 'levle'. It has: prompt, answer, level"):
        context.column("levle")
    with pytest.raises(ValueError, match="layer='first' is not known. Use one of 'last', 'mlp', 'next'"):
        context.read_prompts([0], lambda states, ids: states[0], "first")
    with pytest.raises(ValueError, match="row 16 is none of the training dataset, which has rows 0 to 15"):
        context.prompt_ids([16])
    with pytest.raises(ValueError, match="no rows were given"):
        context.spread([], lambda rows: torch.zeros(0, 1))
    with pytest.raises(ValueError, match=r"must return shape \(k,\)"):
        context.read_prompts([0, 1, 2], lambda states, ids: ids.float())
    with pytest.raises(ValueError, match="3 rows of numbers were expected.*got shape"):
        context.spread([0, 1, 2], lambda rows: torch.zeros(2, 1))
    assert context.spread([4, 2, 9], lambda rows: torch.tensor(rows).unsqueeze(1)).flatten().tolist() == [4, 2, 9]


def test_a_stream_has_no_columns(tmp_path: Any) -> None:
    context = reader(None, tmp_path, train_dataset=prompt_dataset(16).to_iterable_dataset())
    with pytest.raises(ValueError, match="cannot be read of a streaming dataset. Use a map-style dataset"):
        context.column("level")


def test_a_layer_without_an_mlp_is_refused_by_name(tmp_path: Any) -> None:
    model = tiny_qwen3()

    class Mixes(torch.nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.mlp(states).cumsum(1)

    model.model.layers[-1].mlp = Mixes(model.model.layers[-1].mlp)
    context = reader(model, tmp_path)
    with pytest.raises(RefusedError, match="the MLP of the last layer of Qwen3ForCausalLM.*0 have weights and treat"):
        context.read_prompts([0], lambda states, ids: states[0], "mlp")


def test_names_of_metrics_are_bounded() -> None:
    class Many:
        def metrics(self) -> dict[str, float]:
            return {str(row): 0.0 for row in range(100)}

    log: dict[str, list[float]] = defaultdict(list)
    log_metrics(Many(), log)
    assert len(log) == 64


@pytest.mark.parametrize("numbers", [None, {"a": "many"}, RuntimeError("broken")])
def test_metrics_that_fail_end_no_run(numbers: Any) -> None:
    class Broken:
        def metrics(self) -> Any:
            if isinstance(numbers, Exception):
                raise numbers
            return numbers

    log: dict[str, list[float]] = defaultdict(list)
    log_metrics(Broken(), log)
    assert not log
