"""`FusedLMHead` through `trainer.train()`: the curve of TRL's own head, rows that are skipped, and an exact revert."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer, SFTConfig, SFTTrainer

import hf_effi.kernels.lm_head as lm_head
from hf_effi import EffiGRPOConfig, EffiGRPOTrainer, patch
from hf_effi.errors import RefusedError
from hf_effi.kernels import FusedLMHead, _lm_head_tiles
from tests.helpers import grpo_args, run_grpo, sft_dataset, tiny_gemma, tiny_llama, tiny_tokenizer, weights_of
from tests.helpers.patches import state_of


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(lm_head, "ROW_CHUNK", 16)
    monkeypatch.setattr(lm_head, "VOCABULARY_TILE", 32)


def sft(folder, model=None, **over):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    config = over.pop("peft_config", None)
    return SFTTrainer(
        model or tiny_llama(),
        SFTConfig(**{**settings, **over}),
        train_dataset=sft_dataset(16),
        processing_class=tiny_tokenizer(),
        peft_config=config,
    )


def curve(trainer):
    keys = ("loss", "entropy", "mean_token_accuracy")
    return [[row[key] for key in keys if key in row] for row in trainer.state.log_history if "loss" in row]


def assert_close_runs(ours, stock, tolerance=1e-4):
    torch.testing.assert_close(torch.tensor(curve(ours)), torch.tensor(curve(stock)), rtol=tolerance, atol=tolerance)
    theirs = weights_of(stock.model)
    for name, weight in weights_of(ours.model).items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=5e-3, msg=name)


@pytest.mark.parametrize("grad_in_forward", [False, True])
@pytest.mark.parametrize("maker", [tiny_llama, tiny_gemma])
def test_sft_gives_the_same_curve(tmp_path, maker, grad_in_forward):
    stock = sft(tmp_path / "stock", maker())
    stock.train()
    ours = sft(tmp_path / "ours", maker())
    before, head = ours.model.__dict__["forward"], FusedLMHead(grad_in_forward=grad_in_forward)
    with patch(ours.model, {"LMHead": head}) as handle:
        ours.train()
    assert "FusedLMHead" in str(handle)
    assert_close_runs(ours, stock)
    assert head.counters.rows > 0 and head.counters.recomputed == 0
    assert ours.model.__dict__["forward"] is before, "the head of TRL is back"


def test_other_losses_are_honoured_with_the_gradient_in_the_forward(tmp_path):
    stock = sft(tmp_path / "stock", loss_type="dft")
    stock.train()
    ours, head = sft(tmp_path / "ours", loss_type="dft"), FusedLMHead(grad_in_forward=True)
    with patch(ours.model, {"LMHead": head}):
        ours.train()
    assert_close_runs(ours, stock)
    assert head.counters.recomputed == 4


def test_peft_with_a_frozen_head(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    stock = sft(tmp_path / "stock", peft_config=config)
    torch.manual_seed(0)
    ours = sft(tmp_path / "ours", peft_config=config)
    ours.model.load_state_dict(stock.model.state_dict())
    stock.train()
    with patch(ours.model, {"LMHead": FusedLMHead()}) as handle:
        ours.train()
    assert [row.name for row in handle] == ["base_model.model"]
    assert_close_runs(ours, stock)


def test_mixed_precision_wraps_the_patch_and_still_lets_it_go(tmp_path):
    stock = sft(tmp_path / "stock", bf16=True)
    stock.train()
    ours, head = sft(tmp_path / "ours", bf16=True), FusedLMHead()
    with patch(ours.model, {"LMHead": head}):
        ours.train()
    assert_close_runs(ours, stock, tolerance=2e-2)
    counted = head.counters.rows
    ours.model.train()
    batch = {name: t[:1] for name, t in next(iter(ours.get_train_dataloader())).items()}
    ours.model(**batch, fused_lm_head=True).loss.backward()
    assert head.counters.rows == counted > 0, "reverted: the forward that accelerate wrapped calls TRL's again"


def test_grpo_gives_the_same_curve_and_skips_rows(tmp_path):
    stock = run_grpo(GRPOTrainer, grpo_args(tmp_path / "stock"))
    ours = run_grpo(GRPOTrainer, grpo_args(tmp_path / "ours"), train=False)
    head = FusedLMHead()
    with patch(ours.model, {"LMHead": head}):
        ours.train()
    assert_close_runs(ours, stock)
    assert 0 < head.counters.rows_skipped < head.counters.rows, "completions of groups with equal rewards"


def test_the_field_of_an_effi_trainer(tmp_path):
    stock = run_grpo(EffiGRPOTrainer, grpo_args(tmp_path / "stock", EffiGRPOConfig))
    args = grpo_args(tmp_path / "ours", EffiGRPOConfig, kernel_patch={"LMHead": "hf_effi"})
    assert_close_runs(run_grpo(EffiGRPOTrainer, args), stock)


def test_a_model_without_the_head_is_refused():
    with pytest.raises(RefusedError, match="trainer.model"):
        patch(tiny_llama(), {"LMHead": FusedLMHead()})


@pytest.mark.parametrize("bad", [{"column_eps": -1.0}, {"filter_weight": True}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FusedLMHead(**bad)


def test_a_wrong_head_is_refused_at_apply(tmp_path, monkeypatch):
    trainer = sft(tmp_path)
    before = state_of(trainer.model)
    monkeypatch.setattr(_lm_head_tiles, "add_product", lambda total, left, right: None)
    with pytest.raises(RefusedError, match="gradient"):
        patch(trainer.model, {"LMHead": FusedLMHead()})
    assert state_of(trainer.model) == before
