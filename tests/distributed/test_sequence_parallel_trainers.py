"""Sequence parallelism through `trainer.train()`: the same loss and grad_norm series on 1, 2 and 4 ranks."""

from __future__ import annotations

import itertools
import os
import tempfile
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer, EffiSFTConfig, EffiSFTTrainer, EffiTrainer, EffiTrainingArguments
from hf_effi.errors import RefusedError
from hf_effi.parallel import attention_scope, gathered_forward, make_sequence_group
from hf_effi.samplers import QualityAscendingSampler
from hf_effi.trainers.mixins import SequenceParallelMixin
from tests.helpers import (
    grpo_args,
    lm_dataset,
    prompt_dataset,
    run_distributed,
    run_grpo,
    save_tiny,
    sft_dataset,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)

ROWS = 8  # a step, on any number of ranks


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def settings(size: int, **over: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": ROWS // 2 // (world() // size),
        "per_device_eval_batch_size": ROWS // 2 // world(),
        "gradient_accumulation_steps": 2,
        "sequence_parallel_size": size,
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "include_num_input_tokens_seen": "all",
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        **over,
    }


def rows_of_uneven_labels(size: int = 32, length: int = 13) -> Dataset:
    """An odd length, and prompts of different length: some shards have no label."""
    data = lm_dataset(size, length=length)
    labels = [
        [-100] * (index % (length - 2)) + row[index % (length - 2) :] for index, row in enumerate(data["labels"])
    ]
    return data.remove_columns("labels").add_column("labels", labels)


def model_of(**over: Any) -> torch.nn.Module:
    return tiny_llama(num_attention_heads=8, attn_implementation="sdpa", **over)


def run_trainer(size: int, sampler: bool = False, **over: Any) -> dict[str, Any]:
    data = rows_of_uneven_labels()
    args = EffiTrainingArguments(**settings(size, **over))
    trainer = EffiTrainer(
        model_of(),
        args,
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        train_sampler=QualityAscendingSampler([(7 * index) % 32 for index in range(32)]) if sampler else None,
    )
    found = series(trainer)
    return found | {"totals": [trainer.state.num_input_tokens_seen, trainer.state.total_flos]}


def run_sft(size: int, lora: bool = False, model: Any = None, **over: Any) -> dict[str, Any]:
    data = sft_dataset(64)
    over = {"max_length": 21, "gradient_checkpointing": True, "per_device_eval_batch_size": 1, **over}
    args = EffiSFTConfig(**settings(size, **over))
    trainer = EffiSFTTrainer(
        model or model_of(),
        args=args,
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules="all-linear", init_lora_weights=False) if lora else None,
    )
    return series(trainer)


def run_four_bit(size: int, folder: str, **over: Any) -> dict[str, Any]:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return run_sft(size, lora=True, model=loaded(folder, quantization_config=quantization, device_map="cpu"), **over)


class LongDPOTrainer(SequenceParallelMixin, DPOTrainer):
    pass


class LongKTOTrainer(SequenceParallelMixin, KTOTrainer):
    pass


class LongRLOOTrainer(SequenceParallelMixin, RLOOTrainer):
    pass


class LongRewardTrainer(SequenceParallelMixin, RewardTrainer):
    pass


def preferences(paired: bool) -> Dataset:
    rows = prompt_dataset(64)
    answers = rows["answer"]
    if paired:
        return Dataset.from_dict({"prompt": rows["prompt"], "chosen": answers, "rejected": answers[1:] + answers[:1]})
    labels = [index % 2 == 0 for index in range(64)]
    return Dataset.from_dict({"prompt": rows["prompt"], "completion": answers, "label": labels})


def run_preferences(size: int, trainer_class: type, config_class: type, model: Any, **over: Any) -> Any:
    data = preferences(paired=trainer_class is not LongKTOTrainer)
    own = settings(size, **over)
    del own["sequence_parallel_size"]  # a stock config: the size goes to the constructor
    trainer = trainer_class(
        model=model,
        args=config_class(**own),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=tiny_tokenizer(),
        sequence_parallel_size=size,
    )
    return series(trainer)


def loaded(folder: str, **over: Any) -> torch.nn.Module:
    """The reference model is loaded from where the policy came from."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **over)


def run_dpo(size: int, folder: str, **over: Any) -> Any:
    return run_preferences(size, LongDPOTrainer, DPOConfig, loaded(folder), **over)


def run_kto(size: int, folder: str, **over: Any) -> Any:
    return run_preferences(size, LongKTOTrainer, KTOConfig, loaded(folder), **over)


def run_reward(size: int, **over: Any) -> Any:
    config = model_of().config
    config.num_labels = 1
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).float()
    return run_preferences(size, LongRewardTrainer, RewardConfig, model, learning_rate=0.01, **over)


def series(trainer: Any) -> dict[str, Any]:
    trainer.train()
    logs = trainer.state.log_history
    keys = ("loss", "grad_norm", "eval_loss", "num_tokens", "mean_token_accuracy", "rewards/margins", "rewards/kl")
    return {key: [float(entry[key]) for entry in logs if key in entry] for key in keys}


LOCAL = {
    "average_tokens_across_devices": False,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 1,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}
#: name -> (run, settings, sizes). With two groups, LOCAL averages the groups' own means, and KTO pairs rows inside its
#: own batch, as two data-parallel ranks do: only one group is one rank.
RUNS = {
    "Trainer": (run_trainer, {"gradient_checkpointing": True}, (2, 4)),
    "Trainer, local counts": (run_trainer, LOCAL, (4,)),
    "SFT": (run_sft, {}, (4,)),
    "SFT, packed": (run_sft, {"packing": True, "eval_packing": False}, (2, 4)),
    "SFT, LoRA, DFT": (run_sft, {"lora": True, "loss_type": "dft", "max_grad_norm": 0.01}, (2,)),
    "SFT, LoRA on 4 bit": (run_four_bit, {"eval_strategy": "no"}, (2,)),
    "DPO": (run_dpo, {"gradient_checkpointing": True}, (2,)),
    "Reward": (run_reward, {}, (2,)),
    "KTO": (run_kto, {"eval_strategy": "no"}, (4,)),
}


def run_all(folder: str) -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    for name, (run, over, sizes) in RUNS.items():
        where = {"folder": folder} if run in (run_dpo, run_kto, run_four_bit) else {}
        for size in sizes if world() > 1 else (1,):
            found[name, size] = run(size, **over, **where)
    return found


def on_four_ranks(folder: str, output: str) -> tuple[Any, ...]:
    registry = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    found = run_all(folder), run_rounds(), run_resumed(output), run_logits(), run_refused()
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == registry
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny(model_of(), tiny_tokenizer(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ranks(folder, tmp_path_factory) -> list[Any]:
    return run_distributed(on_four_ranks, 4, folder, str(tmp_path_factory.mktemp("runs")))


def assert_same_series(found: dict[str, Any], true: dict[str, Any], what: Any, tolerance: float = 1e-5) -> None:
    for key, values in true.items():
        assert found[key] == pytest.approx(values, rel=tolerance, abs=1e-6), (what, key, found[key], values)
    assert len(true["loss"]) == 3 and true["grad_norm"][0] > 0.01, (what, true)


def test_series_are_those_of_one_rank(folder, ranks) -> None:
    true = run_all(folder)
    for (name, size), found in ranks[0][0].items():
        # TRL keeps the adapters of a quantized model, and so their gradients, in bf16.
        assert_same_series(found, true[name, 1], (name, size), 3e-3 if "4 bit" in name else 1e-5)
    assert all(rank[0] == ranks[0][0] for rank in ranks)


def run_pair(size: int) -> list[dict[str, Any]]:
    return [run_trainer(size, sampler=True), run_sft(size, packing=True, eval_packing=False)]


def architectures() -> dict[str, float]:
    """The largest error of gathered logits, relative to the largest logit, on packed and on left-padded rows."""
    group, found = make_sequence_group(2), {}
    sliding = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}
    models = {
        "qwen3": tiny_qwen3(attn_implementation="sdpa"),
        "qwen3, sliding window": tiny_qwen3(attn_implementation="sdpa", **sliding),
        "gpt2": tiny_gpt2(attn_implementation="sdpa"),
    }
    ids = torch.arange(3, 25).view(2, 11)
    packed = {"position_ids": torch.cat([torch.arange(6), torch.arange(5)]).expand(2, -1)}
    padded = {"attention_mask": (torch.arange(11) >= torch.tensor([[0], [3]])).long()}
    for (name, model), inputs in itertools.product(models.items(), (packed, padded)):
        with torch.no_grad():
            true = model(ids, **inputs, use_cache=False).logits
            with attention_scope(["sdpa"]), gathered_forward([model], group, "sum"):
                error = (model(ids, **inputs).logits - true).abs() / true.abs().max()
        real = inputs.get("attention_mask", torch.ones_like(ids)) != 0
        found[f"{name}, {next(iter(inputs))}"] = float(error[real].max())
    return found


def on_two_ranks() -> tuple[list[dict[str, Any]], dict[str, float]]:
    return run_pair(2), architectures()


def test_two_ranks_with_a_sampler_packing_and_other_architectures() -> None:
    pair, errors = run_distributed(on_two_ranks, 2)[1]
    for found, true in zip(pair, run_pair(1), strict=True):
        assert_same_series(found, true, "two ranks")
    assert len(errors) == 6 and max(errors.values()) < 1e-5, errors


def run_resumed(output: str) -> list[dict[str, torch.Tensor]]:
    """Weights after 4 steps: in one go at P=4, and from the checkpoint at step 2 of that run at P=4, 2 and 1."""
    found = []
    for size, checkpoint in ((4, None), (4, 2), (2, 2), (1, 2)):
        own = settings(size, max_steps=4, eval_strategy="no", save_strategy="steps", save_steps=2, optim="adamw_torch")
        args = EffiTrainingArguments(**own | {"output_dir": output, "learning_rate": 1e-3})
        trainer = EffiTrainer(model_of(), args, train_dataset=rows_of_uneven_labels(64))
        trainer.train(resume_from_checkpoint=f"{output}/checkpoint-{checkpoint}" if checkpoint else None)
        found.append(weights_of(trainer.model))
    return found


def test_a_checkpoint_goes_on_at_any_size(ranks) -> None:
    whole, *resumed = ranks[0][2]
    for weights in resumed:
        for name, value in whole.items():
            assert torch.allclose(weights[name], value, rtol=1e-4, atol=1e-6), name


def run_logits() -> list[Any]:
    """What `predict` returns with and without splitting: whole logits and labels of all rows, once each."""
    found = []
    for size in (1, 4):
        args = EffiTrainingArguments(**settings(size, per_device_eval_batch_size=2, eval_strategy="no"))
        output = EffiTrainer(model_of(), args).predict(rows_of_uneven_labels(7))
        found.append((output.predictions, output.label_ids, output.metrics["test_loss"]))
    return found


def test_predictions_are_whole_and_in_order(ranks) -> None:
    (logits, labels, loss), (split_logits, split_labels, split_loss) = ranks[0][3]
    assert logits.shape[:2] == (7, 13) and split_logits == pytest.approx(logits, rel=1e-4, abs=1e-5)
    assert (labels == split_labels).all() and split_loss == pytest.approx(loss, rel=1e-5)


class OwnBatches(EffiTrainer):
    """Gives every rank another batch, as a sampler or collator that knows its rank would."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            batch["input_ids"] = batch["input_ids"] + self.args.process_index
        return batches, count


def run_refused() -> list[str]:
    messages = []
    for trainer_class, size, kind in ((EffiTrainer, 8, ValueError), (OwnBatches, 2, RefusedError)):
        over = {"per_device_train_batch_size": 2, "eval_strategy": "no"}
        with pytest.raises(kind) as error:
            args = EffiTrainingArguments(**settings(4) | over | {"sequence_parallel_size": size})
            trainer_class(model_of(), args, train_dataset=rows_of_uneven_labels()).train()
        messages.append(str(error.value))
    return messages


def test_ranks_that_do_not_fit_are_named(ranks) -> None:
    sizes, batches = ranks[1][4]
    assert sizes == "sequence_parallel_size=8 does not divide the 4 processes. Choose one of 1, 2, 4."
    assert batches.startswith("The ranks [0, 1] share their sequences and got different batches")


def run_rounds() -> list[Any]:
    """GRPO with evaluation, and RLOO, which leaves gradient accumulation to the Trainer."""
    trainers = [(EffiGRPOTrainer, size) for size in (1, 2, 4)] + [(LongRLOOTrainer, size) for size in (1, 2)]
    return [run_one_rollout_trainer(*what) for what in trainers]


def run_one_rollout_trainer(trainer_class: type, size: int) -> Any:
    grpo = trainer_class is EffiGRPOTrainer
    args = grpo_args(
        tempfile.mkdtemp(),
        EffiGRPOConfig if grpo else RLOOConfig,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.5,
        num_iterations=2,  # takes old log-probs
        max_steps=4,
        per_device_eval_batch_size=2,
        **({"sequence_parallel_size": size, "eval_strategy": "steps", "eval_steps": 3} if grpo else {"beta": 0.0}),
    )
    model = tiny_qwen3(end_tokens=10, num_attention_heads=8, attn_implementation="sdpa")
    where = {} if grpo else {"sequence_parallel_size": size}
    trainer = run_grpo(trainer_class, args, model=model, eval_dataset=prompt_dataset(8), **where)
    return weights_of(trainer.model), trainer.state.log_history


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_rounds_are_data_parallel_training(ranks, trainer) -> None:
    """Rollouts, metrics, counters and weights are those of four data-parallel ranks, with the savings on."""
    (stock, logs), *others = ranks[0][1][:3] if trainer == "GRPO" else ranks[0][1][3:]
    for weights, history in others:
        for name, value in stock.items():
            assert torch.allclose(weights[name], value, rtol=1e-4, atol=1e-6), name
        for entry, true in zip(history, logs, strict=True):
            # Rows are dealt by cost over as many ranks as there are: padded to those beside them, and TRL's entropy is
            # a mean of the means of micro-batches.
            apart = ("time", "per_second", "tokens_forward", "tokens_saved", "pad_ratio", "rows_moved")
            apart += ("slowest_over_mean", "entropy")
            same = {k: v for k, v in true.items() if not any(part in k for part in apart)}
            assert {k: entry[k] for k in same} == pytest.approx(same, rel=1e-4, abs=1e-5, nan_ok=True)
