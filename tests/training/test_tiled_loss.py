from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from hf_effi import PatchCallback
from hf_effi.errors import RefusedError
from hf_effi.memory.tiled_loss import tile_loss
from tests.helpers import compare_runs, lm_dataset, tiny_gemma, tiny_qwen3
from tests.helpers.sampling import sampler_trainer, stop_and_resume

TILES = partial(tile_loss, num_shards=3)


def masked_rows():
    """Rows whose number of labels differs; every third has none."""
    rows = lm_dataset(24, length=8).to_list()
    return Dataset.from_list(
        [
            {**row, "labels": [-100] * masked + row["labels"][masked:], "row": i}
            for i, row in enumerate(rows)
            for masked in [8 if i % 3 == 0 else i % 7]
        ]
    )


def run(folder, *callbacks, make=tiny_qwen3, **over):
    over = {"max_steps": 6, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, **over}
    trainer = sampler_trainer(
        folder, Trainer, callbacks=callbacks, model=make(tie_word_embeddings=True), train_dataset=masked_rows(), **over
    )
    trainer.train()
    return trainer


def series(trainer, key):
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry])


@pytest.mark.parametrize("over", [{}, {"activation_checkpointing": True}, {"bf16": True}, {"make": tiny_gemma}])
def test_stock_trainer_has_the_same_losses(tmp_path, over):
    plain, tiled = run(tmp_path, **over), run(tmp_path, PatchCallback(TILES), **over)
    assert len(series(plain, "loss")) == 6 and series(plain, "loss").std() > 0.01
    tolerance = 0.03 if "bf16" in over else 1e-5
    torch.testing.assert_close(series(tiled, "loss"), series(plain, "loss"), rtol=0, atol=tolerance)
    torch.testing.assert_close(series(tiled, "grad_norm"), series(plain, "grad_norm"), rtol=5 * tolerance, atol=0)


def test_resume_equals_the_uninterrupted_run(tmp_path):
    def make(folder, callbacks):
        return sampler_trainer(folder, Trainer, callbacks=[*callbacks, PatchCallback(TILES)])

    whole, broken, _ = stop_and_resume(tmp_path, make, step=8)
    compare_runs(whole, broken)


@pytest.mark.parametrize(
    "over",
    [{"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda outputs, labels, **kw: outputs.logits.sum()}],
)
def test_a_loss_outside_of_the_model_is_named(tmp_path, over):
    function = over.pop("compute_loss_func", None)
    trainer = sampler_trainer(
        tmp_path, Trainer, callbacks=[PatchCallback(TILES)], model=tiny_qwen3(), max_steps=1, **over
    )
    trainer.compute_loss_func = function
    with pytest.raises(AttributeError, match="leave out label_smoothing_factor and compute_loss_func"):
        trainer.train()


def test_trl_has_one_already(tmp_path):
    from trl import SFTConfig, SFTTrainer

    from tests.helpers import sft_dataset, tiny_tokenizer

    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=1)
    trainer = SFTTrainer(
        tiny_qwen3(),
        args,
        train_dataset=sft_dataset(),
        processing_class=tiny_tokenizer(),
        callbacks=[PatchCallback(tile_loss)],
    )
    with pytest.raises(RefusedError, match="TRL has fused this model's head already"):
        trainer.train()
