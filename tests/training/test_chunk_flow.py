import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import Qwen3ForCausalLM, Trainer, TrainingArguments

from bench._counters import LiveBytes
from hf_effi._compat import CACHE_ARGUMENT
from hf_effi.errors import RefusedError
from hf_effi.memory.chunk_flow import ChunkFlow
from hf_effi.trainers.mixins.chunk_flow import ChunkFlowMixin
from tests.helpers import compare_runs, lm_dataset, record_run, sft_dataset, tiny_gemma, tiny_llama, tiny_qwen3
from tests.helpers.long_sequence import assert_equal_gradients, gradients, in_double
from tests.helpers.sampling import StopAt


class ChunkTrainer(ChunkFlowMixin, Trainer):
    """The thin subclass that a user writes."""


def double_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """A loss in fp64: that of transformers is in fp32."""
    labels = inputs.pop("labels")
    shifted = inputs.pop("shift_labels", None)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:] if shifted is None else shifted
    logits = model(**inputs).logits
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum") / num_items_in_batch


def rows(lengths=(21, 3, 8, 13, 1, 30, 5, 9)):
    found = [
        row["input_ids"][: lengths[i % len(lengths)]] for i, row in enumerate(lm_dataset(16, length=30).to_list())
    ]
    return Dataset.from_list(
        [{"input_ids": row, "labels": [-100] * (i % 3) + row[i % 3 :], "attention_mask": [1] * len(row)} for i,
            row in enumerate(found)]
    )  # fmt: skip


def collate(batch):
    width = max(len(row["input_ids"]) for row in batch)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in batch])
        for key, fill in fills.items()
    }


def make(folder, chunk_flow=None, cls=ChunkTrainer, model=None, callbacks=(), **over):
    settings = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2, "max_steps": 4, "seed": 7,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }  # fmt: skip
    extra = {} if cls is Trainer else {"chunk_flow": chunk_flow}
    return cls(
        model or tiny_qwen3(), TrainingArguments(**{**settings, **over}), data_collator=collate, train_dataset=rows(),
        callbacks=list(callbacks), **extra,
    )  # fmt: skip


def series(trainer, key):
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry])


def test_without_chunk_flow_it_is_the_stock_trainer_to_the_bit(tmp_path):
    trainers = [make(tmp_path, cls=cls) for cls in (Trainer, ChunkTrainer)]
    for trainer in trainers:
        trainer.train()
    compare_runs(*trainers)


@pytest.mark.parametrize("chunk_flow", [ChunkFlow(8), ChunkFlow(8, 3), ChunkFlow(5, 2), ChunkFlow(100)], ids=str)
def test_losses_and_gradient_norms_are_those_of_whole_rows(tmp_path, chunk_flow):
    plain, ours = make(tmp_path), make(tmp_path, chunk_flow)
    for trainer in (plain, ours):
        trainer.train()
    assert series(plain, "loss").std() > 0.01
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(series(ours, key), series(plain, key), rtol=1e-5, atol=1e-5)


def sliding(**over):
    return tiny_qwen3(
        layer_types=["sliding_attention", "full_attention"], use_sliding_window=True, sliding_window=6, **over
    )


def varlen():
    from hf_effi.attention.varlen import register_varlen_attention

    model = tiny_qwen3()
    model.set_attn_implementation(register_varlen_attention())
    return model


def with_lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_qwen3(), LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False))


@pytest.mark.parametrize(
    ("build", "tolerance"),
    [
        (tiny_qwen3, 1e-12),
        (tiny_llama, 1e-12),
        (sliding, 1e-12),
        (with_lora, 1e-12),
        (varlen, 1e-12),
        (tiny_gemma, 1e-4),
    ],
)
def test_gradients_in_double(tmp_path, monkeypatch, build, tolerance):
    monkeypatch.setattr(Trainer, "compute_loss", double_loss)
    model = build() if build is tiny_gemma else in_double(build())  # its eager attention is in fp32
    found = {}
    for chunk_flow in (None, *(ChunkFlow(size, live) for size in (4, 7) for live in (1, 2, 9))):
        trainer = make(tmp_path, chunk_flow, model=model)
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.training_step(model, collate(rows().to_list()[:6]), torch.tensor(50))
        found[chunk_flow] = loss, gradients(model)
    expected, wanted = found.pop(None)
    for loss, grads in found.values():
        torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=0)
        assert_equal_gradients(wanted, grads, tolerance)


class OfACheckpoint(Qwen3ForCausalLM):
    """Code that came with a checkpoint: it keeps the name that the cache had when it was written."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, labels=None, **kwargs
    ):
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
            **{CACHE_ARGUMENT: past_key_values}, **kwargs,
        )  # fmt: skip


def test_code_of_a_checkpoint_gets_its_cache_by_its_own_name(tmp_path):
    def train(chunk_flow):
        model = tiny_qwen3()
        model.__class__ = OfACheckpoint
        trainer = make(tmp_path, chunk_flow, model=model)
        trainer.train()
        return series(trainer, "loss")

    torch.testing.assert_close(train(ChunkFlow(5, 2)), train(None), rtol=0, atol=1e-5)


def test_activations_are_bounded_by_the_live_chunks(tmp_path):
    row = collate([{"input_ids": [5] * 512, "labels": [5] * 512, "attention_mask": [1] * 512}])

    def peak(chunk_flow):
        model = tiny_qwen3()
        trainer = make(tmp_path, chunk_flow, model=model)
        trainer.current_gradient_accumulation_steps = 1
        with LiveBytes() as memory:
            trainer.training_step(model, dict(row), torch.tensor(511))
        return memory.peak - sum(weight.numel() * 4 for weight in model.parameters())

    whole = peak(None)
    one, two, four = (peak(ChunkFlow(64, live)) for live in (1, 2, 4))
    print(one, two, four, whole)
    assert one < two < four < whole
    assert one < 0.5 * whole


def test_resume_equals_the_uninterrupted_run(tmp_path):
    def run(folder, callbacks, **kwargs):
        trainer = make(tmp_path / folder, ChunkFlow(8, 2), callbacks=callbacks, max_steps=6)
        trainer.train(**kwargs)
        return trainer

    whole = record_run(run("whole", []))
    run("broken", [StopAt(4)])
    resumed = record_run(run("broken", [], resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4")))
    for record in (whole, resumed):
        record.log_history = [entry for entry in record.log_history if "train_runtime" not in entry]
    compare_runs(whole, resumed)


def test_evaluation_is_untouched(tmp_path):
    plain, ours = make(tmp_path), make(tmp_path, ChunkFlow(4))
    assert plain.evaluate(rows())["eval_loss"] == ours.evaluate(rows())["eval_loss"]


@pytest.mark.parametrize("packing", [False, True])
def test_sft(tmp_path, packing):
    from trl import SFTConfig, SFTTrainer

    from tests.helpers import tiny_tokenizer

    class ChunkSFTTrainer(ChunkFlowMixin, SFTTrainer):
        pass

    def train(chunk_flow):
        args = SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
            max_steps=4, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2, packing=packing,
            max_length=32, gradient_accumulation_steps=2, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = ChunkSFTTrainer(
            tiny_qwen3(),
            args,
            train_dataset=sft_dataset(32),
            processing_class=tiny_tokenizer(),
            chunk_flow=chunk_flow,
        )
        trainer.train()
        return series(trainer, "loss"), series(trainer, "num_tokens")

    plain, tokens = train(None)
    ours, our_tokens = train(ChunkFlow(6, 2))
    assert plain.std() > 0.01
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert torch.equal(our_tokens, tokens)


def with_prompt(config):
    return get_peft_model(tiny_qwen3(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"activation_checkpointing": True}, "gradient checkpointing empties the cache"),
        ({"model": lambda: with_prompt(PrefixTuningConfig)}, "PEFT's prompt learning"),
        ({"model": lambda: with_prompt(PromptTuningConfig)}, "PEFT's prompt learning"),
        (
            {"model": lambda: tiny_qwen3(attention_dropout=0.1)},
            r"relative difference of .*{'config.attention_dropout': 0.1",
        ),
        ({"label_smoothing_factor": 0.1}, "the loss has to be the model's"),
        ({"chunk_flow": 512}, r"chunk_flow=512 must be a ChunkFlow\(chunk_size"),
    ],
)
def test_what_is_not_exact_is_named(tmp_path, over, message):
    model = over.pop("model", tiny_qwen3)()
    with pytest.raises(ValueError, match=message):
        make(tmp_path, over.pop("chunk_flow", ChunkFlow(4)), model=model, **over)


def test_means_over_chunks_are_refused(tmp_path):
    trainer = make(tmp_path, ChunkFlow(4))
    trainer.model_accepts_loss_kwargs = False
    with pytest.raises(RefusedError, match="no num_items_in_batch"):
        trainer.train()
