"""The memory planner against what a real training step of a Trainer holds."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_effi.functional.memory import Switches, memory_table
from hf_effi.functional.saved_bytes import SavedBytes
from hf_effi.memory.layer_modes import LayerModes
from hf_effi.report.plan_memory import plan_memory
from hf_effi.report.trace_memory import TracedModel
from tests.helpers import lm_dataset, tiny_gpt2, tiny_llama, tiny_qwen3

BATCH, LENGTH = 4, 64
#: of what autograd saves in a real step; the trace is exact but for what CPU and fake attention differ in
TOLERANCE = 0.01


class Measuring(Trainer):
    """Counts what autograd saves in each training forward."""

    def compute_loss(self, model, *args, **kwargs):
        with SavedBytes(exclude=model.parameters()) as saved:
            loss = super().compute_loss(model, *args, **kwargs)
        self.saved = saved.total
        return loss


def train(folder, make, mode, optim="adamw_torch"):
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=1,
        per_device_train_batch_size=BATCH,
        gradient_checkpointing=True,
        optim=optim,
    )
    model = make(num_hidden_layers=3, use_cache=False) if make is not tiny_gpt2 else make(n_layer=3, use_cache=False)
    trainer = Measuring(model, args, train_dataset=lm_dataset(BATCH, length=LENGTH))
    model.activation_checkpointing_enable()
    with LayerModes(model, mode):
        trainer.train()
    return trainer


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama, tiny_gpt2])
def test_saved_activations_against_a_real_step(tmp_path, make):
    for mode in ("keep", "checkpoint"):
        trainer = train(tmp_path, make, mode)
        traced = TracedModel(trainer.model.config)
        trace = traced.trace(BATCH, LENGTH)
        planned = memory_table(traced.parameters, trace, Switches(activations=mode)).activations + trace.logits
        assert planned == pytest.approx(trainer.saved, rel=TOLERANCE), mode


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "adamw_8bit"])
def test_parameters_gradients_and_optimizer_are_exact(tmp_path, optim):
    name = {"adamw_8bit": "adamw_bnb_8bit"}.get(optim, optim)
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    trainer = train(tmp_path, tiny_llama, "checkpoint", name)
    planned = plan_memory(trainer.model.config, seq_len=LENGTH, optimizer=optim).rows[0][1]
    parameters = list(trainer.model.parameters())
    assert planned.parameters == planned.gradients == sum(p.numel() * p.element_size() for p in parameters)
    states = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    # bitsandbytes shares two tables of 256 values between all tensors.
    tables = {id(v) for v in states if optim == "adamw_8bit" and v.shape == (256,) and v.dtype == torch.float32}
    held = sum(v.numel() * v.element_size() for v in states if id(v) not in tables)
    assert planned.optimizer == held
