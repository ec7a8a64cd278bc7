"""Reference models under sequence parallelism: every kind of reference, with every trainer that has one."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer, EffiTrainer, EffiTrainingArguments
from hf_effi.errors import RefusedError
from hf_effi.trainers.mixins import SequenceParallelMixin
from tests.helpers import (
    grpo_args,
    prompt_dataset,
    run_distributed,
    run_grpo,
    save_tiny,
    tiny_gpt2,
    tiny_qwen3,
    tiny_tokenizer,
    weights_of,
)

TRAINERS = ("GRPO", "RLOO", "DPO", "KTO")
#: a second model; the base model below the adapter; a copy of an adapter that was trained before; no reference forward
REFERENCES = ("separate", "base", "adapter", "none")


class LongDPOTrainer(SequenceParallelMixin, DPOTrainer):
    pass


class LongKTOTrainer(SequenceParallelMixin, KTOTrainer):
    pass


class LongRLOOTrainer(SequenceParallelMixin, RLOOTrainer):
    pass


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def policy(folder: str, reference: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if reference != "adapter":
        return model
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def common(**over: Any) -> dict[str, Any]:
    return {"learning_rate": 1e-2, "optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 2, **over}


def run_rollouts(trainer: str, reference: str, folder: str, size: int) -> Any:
    grpo = trainer == "GRPO"
    args = grpo_args(
        tempfile.mkdtemp(),
        EffiGRPOConfig if grpo else RLOOConfig,
        **common(beta=0.0 if reference == "none" else 0.3),
        **({"sequence_parallel_size": size, "num_iterations": 2} if grpo else {}),
    )
    torch.manual_seed(2)
    return run_grpo(
        EffiGRPOTrainer if grpo else LongRLOOTrainer,
        args,
        model=policy(folder, reference),
        peft_config=lora() if reference == "base" else None,
        **({} if grpo else {"sequence_parallel_size": size}),
    )


def run_preferences(trainer: str, reference: str, folder: str, size: int) -> Any:
    args = (DPOConfig if trainer == "DPO" else KTOConfig)(
        tempfile.mkdtemp(),
        **common(per_device_train_batch_size=4 // (world() // size), gradient_checkpointing=False),
        precompute_ref_log_probs=reference == "none",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        logging_steps=1,
    )
    torch.manual_seed(2)
    trainer_class = LongDPOTrainer if trainer == "DPO" else LongKTOTrainer
    made = trainer_class(
        model=policy(folder, reference),
        args=args,
        # Log-probs that are taken ahead are cached beside the files of the dataset, where all ranks find them.
        train_dataset=load_from_disk(f"{folder}/{trainer}"),
        processing_class=tiny_tokenizer(),
        peft_config=lora() if reference == "base" else None,
        sequence_parallel_size=size,
    )
    made.train()
    return made


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def run_one(trainer: str, reference: str, folder: str, size: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    run = run_rollouts if trainer in ("GRPO", "RLOO") else run_preferences
    made = run(trainer, reference, folder, size)
    key = "kl" if trainer in ("GRPO", "RLOO") else "loss"
    return weights_of(made.model), [entry[key] for entry in made.state.log_history if key in entry]


def on_two_ranks(folder: str) -> dict[tuple[str, str, int], Any]:
    """Rollout trainers compare with data parallelism on two ranks, the others with one rank."""
    found = {}
    for trainer in TRAINERS:
        for reference in REFERENCES:
            for size in (1, 2) if trainer in ("GRPO", "RLOO") else (2,):
                found[trainer, reference, size] = run_one(trainer, reference, folder, size)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    model = tiny_qwen3(end_tokens=10, num_attention_heads=4, attn_implementation="sdpa")
    folder = save_tiny(model, tiny_tokenizer(), tmp_path_factory.mktemp("model"))
    rows = prompt_dataset(32)
    prompts, answers = rows["prompt"], rows["answer"]
    pairs = {"prompt": prompts, "chosen": answers, "rejected": answers[1:] + answers[:1]}
    judged = {"prompt": prompts, "completion": answers, "label": [index % 2 == 0 for index in range(32)]}
    for trainer, data in (("DPO", pairs), ("KTO", judged)):
        Dataset.from_dict(data).save_to_disk(f"{folder}/{trainer}")
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[Any]:
    return run_distributed(on_two_ranks, 2, folder)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_training_with_a_reference_is_that_of_unsplit_sequences(ranks, folder, trainer, reference) -> None:
    split, values = ranks[0][trainer, reference, 2]
    if trainer in ("GRPO", "RLOO"):
        whole, expected = ranks[0][trainer, reference, 1]
    else:
        whole, expected = run_one(trainer, reference, folder, 1)
    assert len(values) == (0 if reference == "none" and trainer in ("GRPO", "RLOO") else 2), values
    assert values == pytest.approx(expected, rel=1e-4, abs=1e-6)
    start = policy(folder, reference)
    for name, value in whole.items():
        assert torch.allclose(split[name], value, rtol=1e-4, atol=1e-6), name
    if reference in ("separate", "none"):
        assert any(not torch.equal(whole[name], value) for name, value in weights_of(start).items())


# --- positions that a model makes itself -----------------------------------------------------------------------------


def tiny_opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 97}
    return OPTForCausalLM(
        OPTConfig(**small, word_embed_proj_dim=32, max_position_embeddings=128, dropout=0.0, pad_token_id=0)
    )


class CountsByIds(OPTForCausalLM):
    """Numbers its tokens from the ids and not from the mask, as RoBERTa's decoder does."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if position_ids is None:
            position_ids = (input_ids % 7 != 0).long().cumsum(1)
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


class LooksBack(OPTForCausalLM):
    """Mixes each embedding with the one before: a convolution that no list of layer types names."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        embedded = self.get_input_embeddings()(input_ids)
        mixed = embedded + 0.5 * torch.nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]
        return super().forward(inputs_embeds=mixed, attention_mask=attention_mask, **kwargs)


def left_padded_rows() -> list[dict[str, list[int]]]:
    drawn, rows = torch.Generator().manual_seed(0), []
    for index in range(8):
        ids = torch.randint(3, 97, (12,), generator=drawn).tolist()
        pad = index % 4 * 2
        rows.append(
            {
                "input_ids": [0] * pad + ids + [5] * (6 - pad),
                "attention_mask": [0] * pad + [1] * (18 - pad),
                "labels": [-100] * (pad + 1) + ids[1:] + [5] * (6 - pad),
            }
        )
    return rows


def run_padded(model: Any) -> list[float]:
    args = EffiTrainingArguments(
        tempfile.mkdtemp(),
        **common(max_steps=3, per_device_train_batch_size=4),
        sequence_parallel_size=world(),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = EffiTrainer(model, args, train_dataset=left_padded_rows())
    trainer.train()
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "grad_norm") if key in entry]


def positions_on_two_ranks() -> tuple[list[list[float]], list[str]]:
    refused = []
    for model_class in (CountsByIds, LooksBack):
        with pytest.raises(RefusedError) as error:
            run_padded(model_class(tiny_opt().config))
        refused.append(str(error.value))
    for over, message in (
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
    ):
        with pytest.raises(RefusedError, match=message):
            args = grpo_args(tempfile.mkdtemp(), EffiGRPOConfig, sequence_parallel_size=2, **over)
            run_grpo(EffiGRPOTrainer, args, model=tiny_qwen3(attn_implementation="sdpa"), train=False)
    # RoPE whose frequencies follow the length, under a name that no list has.
    model = tiny_qwen3(
        attn_implementation="sdpa", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    )
    model.config.rope_parameters["rope_type"] = "default"
    with pytest.raises(RefusedError) as error:
        run_padded(model)
    refused.append(str(error.value))
    return [run_padded(tiny_opt()), run_padded(tiny_gpt2())], refused


@pytest.fixture(scope="module")
def positions() -> list[Any]:
    return run_distributed(positions_on_two_ranks, 2)


def test_left_padded_rows_have_the_models_own_positions(positions) -> None:
    for found, true in zip(positions[1][0], (run_padded(tiny_opt()), run_padded(tiny_gpt2())), strict=True):
        assert len(true) == 6 and found == pytest.approx(true, rel=1e-5)


def test_what_passes_along_the_sequence_is_found_by_measuring(positions) -> None:
    by_ids, looks_back, by_length = positions[0][1]
    assert by_ids.startswith("CountsByIds numbers its tokens in a way of its own")
    assert looks_back.startswith("LooksBack split over 2 ranks is not the whole model")
    assert "between a short and a long call" in by_length
