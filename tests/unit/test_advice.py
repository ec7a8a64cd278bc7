"""Published settings and findings as numbers: every row of the table, and the edges of every function."""

import json
import math

import pytest
import torch

from hf_effi import cli
from hf_effi.functional import advice
from hf_effi.functional.optimizer_table import OPTIMIZERS, SIZES, TABLE, recommend_optimizer
from hf_effi.functional.weight_norms import WeightNorm, weight_norm_report, weight_norms

BAD_NUMBERS = [0, -1, math.nan, math.inf, True, "3", None]


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_row_is_returned_for_its_own_run():
    for row in TABLE:
        found = recommend_optimizer(row.parameters, row.tokens, row.optimizer)
        assert (
            found.row is row and found.inside and found.sentence.startswith(f"{row.optimizer} as tuned for {row.size}")
        )


def test_the_table_is_that_of_the_source():
    assert len({(row.optimizer, row.size, row.ratio) for row in TABLE}) == len(TABLE) == 60
    assert OPTIMIZERS == ("adamw", "nadamw", "muon", "mars", "soap")
    assert SIZES == {  # 32 layers of 3 width ffn + 4 width^2, with ffn = 4 width
        name: 32 * 16 * width**2 for name, width in {"130M": 512, "300M": 768, "520M": 1024, "1.2B": 1536}.items()
    }
    losses = {(row.optimizer, row.size, row.ratio): row.loss for row in TABLE if row.loss is not None}
    for (optimizer, size, ratio), loss in losses.items():
        assert loss < losses.get((optimizer, size, ratio // 2), math.inf), "more tokens, lower loss"
        assert loss <= losses["adamw", size, ratio] + 0.01, "none is far behind AdamW"
    for row in TABLE:
        assert (
            2e-3 <= row.learning_rate <= 1.6e-2
            and row.batch_sequences in (128, 256)
            and row.weight_decay in (0.1, 0.2)
        )
        assert {"adamw": set(), "nadamw": set(), "mars": {"gamma"}}.get(row.optimizer, set(row.extra)) == set(
            row.extra
        )
        assert row.warmup_steps > 0 or row.optimizer == "muon"


def test_golden_row():
    row = recommend_optimizer(134_000_000, 2_700_000_000, "adamw").row
    assert (row.learning_rate, row.betas, row.eps, row.weight_decay) == (8e-3, (0.9, 0.98), 1e-20, 0.1)
    assert (row.warmup_steps, row.batch_sequences, row.max_grad_norm, row.loss) == (2000, 128, 1.0, 3.529)


def test_without_a_name_the_lowest_loss_of_the_nearest_cell():
    assert recommend_optimizer(134_000_000, 2_700_000_000).row.optimizer == "muon"  # 3.464
    assert recommend_optimizer(134_000_000, 10_700_000_000).row.optimizer == "soap"  # 3.295, Muon 3.296
    assert recommend_optimizer(1_200_000_000, 193_000_000_000).row.optimizer == "muon", "no losses there"


@pytest.mark.parametrize(
    ("parameters", "tokens", "inside"),
    [
        (134_217_728, 2_684_354_560, True),
        (200_000_000, 4_000_000_000, True),
        (80_000_000, 2_684_354_560, False),  # 1.68 times smaller
        (2_000_000_000, 24_000_000_000, False),  # larger than the table
        (134_217_728, 1_000_000_000, False),  # too few tokens
        (134_217_728, 10**12, False),
        (1, 1, False),
    ],
)
def test_what_is_outside_says_so_and_is_not_scaled(parameters, tokens, inside):
    found = recommend_optimizer(parameters, tokens, "adamw")
    assert found.inside is inside and found.sentence.startswith("Outside the table") is not inside
    assert found.row in TABLE and found.steps >= 1


def test_arguments_of_a_trainer():
    adamw = recommend_optimizer(300_000_000, 6_000_000_000, "adamw").training_arguments()
    assert adamw == {
        "learning_rate": 8e-3, "weight_decay": 0.1, "warmup_steps": 2000, "max_grad_norm": 1.0, "max_steps": 11444,
        "lr_scheduler_type": "cosine", "adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-10,
    }  # fmt: skip
    muon = recommend_optimizer(300_000_000, 6_000_000_000, "muon")
    assert (
        muon.lr_schedule["lr_scheduler_type"] == "warmup_stable_decay"
        and "adam_beta1" not in muon.training_arguments()
    )
    assert muon.lr_schedule["lr_scheduler_kwargs"]["num_decay_steps"] == round(0.8 * 11444)
    assert recommend_optimizer(520_000_000, 10**10, "muon").lr_schedule == {"lr_scheduler_type": "linear"}


@pytest.mark.parametrize("value", [*BAD_NUMBERS, 1.5])
@pytest.mark.parametrize("name", ["parameters", "tokens"])
def test_sizes_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* whole number of at least 1"):
        recommend_optimizer(**{"parameters": 1, "tokens": 1, name: value})


def test_an_optimizer_that_is_not_in_the_table():
    with pytest.raises(
        ValueError, match="'lion' is not in the table. Choose one of adamw, nadamw, muon, mars, soap.$"
    ):
        recommend_optimizer(1, 1, "lion")
    with pytest.raises(ValueError, match="'prodigy'.*behind a calibrated NAdamW.*calibrated_nadamw"):
        recommend_optimizer(1, 1, "prodigy")


def test_the_command_says_the_same(capsys):
    assert cli.main(["plan", "optimizer", "--params", "300M", "--tokens", "6B", "--optimizer", "adamw"]) == 0
    text = capsys.readouterr().out
    assert "learning rate          0.008" in text and "11,444 updates" in text and "1,500,000,000 by One Epoch" in text
    assert "goes" not in text
    words = ["plan", "optimizer", "--params", "0.3B", "--tokens", "6B", "--unique-tokens", "500M"]
    assert cli.main(words) == 0
    assert "goes 12 times over its data: compare weight decays 0.4, 0.8, 1.6, 3.2" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["inside"] and data["weight_decay_grid"] == [0.4, 0.8, 1.6, 3.2] and data["optimizer"] == "muon"


# --- the other findings ----------------------------------------------------------------------------------------------


def test_repeated_data():
    assert advice.weight_decay_grid(4.0, 1.0) == () and advice.weight_decay_grid(4.01, 1.0) == (0.4, 0.8, 1.6, 3.2)
    assert advice.weight_decay_grid(1, 1) == ()
    with pytest.raises(ValueError, match="unique_tokens=2 is more than tokens=1"):
        advice.weight_decay_grid(1, 2)


def test_one_epoch():
    assert advice.size_one_epoch(tokens=20).parameters == 1 and advice.size_one_epoch(tokens=1).parameters == 1
    assert advice.size_one_epoch(parameters=1).tokens == 20
    assert advice.size_one_epoch(parameters=10, tokens_per_parameter=5).tokens == 50
    round_trip = advice.size_one_epoch(tokens=advice.size_one_epoch(parameters=123_456).tokens)
    assert round_trip.parameters == 123_456
    for wrong in ({}, {"parameters": 1, "tokens": 20}):
        with pytest.raises(ValueError, match="exactly one"):
            advice.size_one_epoch(**wrong)
    with pytest.raises(ValueError, match="tokens=0.5 must be at least 1"):
        advice.size_one_epoch(tokens=0.5)


def test_sft_before_dpo():
    assert advice.sft_learning_rate(2e-5) == 2e-5
    assert [advice.sft_learning_rate(1e-4, "dpo", factor=f) for f in (*advice.SFT_FACTORS, 1)] == pytest.approx(
        [5e-5, 2.5e-5, 1e-5, 1e-4]
    )
    with pytest.raises(ValueError, match=r"factor=0.5 acts only with next_stage='dpo'"):
        advice.sft_learning_rate(1e-4, factor=0.5)
    with pytest.raises(ValueError, match="next_stage='grpo' must be 'dpo'"):
        advice.sft_learning_rate(1e-4, "grpo")
    with pytest.raises(ValueError, match="factor=1.5 must be a number above 0 and up to 1"):
        advice.sft_learning_rate(1e-4, "dpo", factor=1.5)


def test_large_batches():
    preset = advice.large_batch_seq2seq(128, 28, 8)
    assert preset["gradient_accumulation_steps"] * 128 * 28 * 8 == advice.LARGE_BATCH_TOKENS == 458_752
    assert preset["fp16"] and not preset["bf16"] and preset["max_grad_norm"] == preset["weight_decay"] == 0.0
    assert not any(advice.large_batch_seq2seq(128, 28, 8, precision="no")[name] for name in ("fp16", "bf16"))
    assert advice.large_batch_seq2seq(128, 28, 128)["gradient_accumulation_steps"] == 1, "the paper's 128 GPUs"
    for wrong, sentence in (
        ({"rows_per_device": 0}, "rows_per_device=0 must be a whole number"),
        ({"devices": 1.0}, "devices=1.0 must be a whole number"),
        ({"tokens_per_row": math.nan}, "tokens_per_row=nan must be a number above 0"),
        ({"tokens_per_update": 25_000}, "from 229,376 to 917,504.*uses 5e-4"),
        ({"precision": "fp8"}, "precision='fp8' must be"),
        ({"rows_per_device": 10**5}, "more than tokens_per_update=458,752. Lower rows_per_device"),
    ):
        with pytest.raises(ValueError, match=sentence):
            advice.large_batch_seq2seq(**{"rows_per_device": 128, "tokens_per_row": 28, "devices": 8, **wrong})


def test_calibrated_nadamw():
    preset = advice.calibrated_nadamw(1)
    assert preset["warmup_steps"] == 0 and preset["max_steps"] == 1 and preset["lr_scheduler_type"] == "cosine"
    assert 1 - preset["adam_beta1"] == pytest.approx(0.06733926164)
    with pytest.raises(ValueError, match="total_steps=0"):
        advice.calibrated_nadamw(0)


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_numbers_above_zero(value):
    for call in (
        lambda: advice.sft_learning_rate(value),
        lambda: advice.weight_decay_grid(value, 1.0),
        lambda: advice.size_one_epoch(parameters=1, tokens_per_parameter=value),
    ):
        with pytest.raises(ValueError, match=r"must be a number above 0"):
            call()


# --- norms -----------------------------------------------------------------------------------------------------------


def test_norms_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    model[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    before = weight_norms(model)
    assert before == {"0.weight": 5.0}, "vectors are left out"
    model[0].weight.data.mul_(0.5)
    report = weight_norm_report(model, before)
    (matrix,) = report.matrices
    assert (matrix.ratio, matrix.effective_lr_factor, matrix.update_factor) == (0.5, 4.0, 2.0)
    assert report.furthest is matrix and "0.weight" in str(report) and "4.000" in str(report)
    assert weight_norm_report(model, model).matrices[0].ratio == 1.0


def test_norms_at_the_edges():
    assert weight_norm_report(torch.nn.LayerNorm(2), {}).matrices == () and weight_norms(torch.nn.LayerNorm(2)) == {}
    assert weight_norm_report(torch.nn.LayerNorm(2), {}).furthest is None
    assert str(weight_norm_report(torch.nn.LayerNorm(2), {})).startswith("matrix")
    assert WeightNorm("w", 0.0, 0.0).ratio == 1.0 and WeightNorm("w", 1.0, 0.0).ratio == math.inf
    assert WeightNorm("w", 0.0, 1.0).effective_lr_factor == math.inf
    low = torch.nn.Linear(2, 1, bias=False).bfloat16()
    low.weight.data.fill_(2e38)
    assert weight_norms(low)["weight"] == math.inf, "beyond fp32, not NaN"
    with pytest.raises(ValueError, match="other matrices, such as weight"):
        weight_norm_report(torch.nn.Linear(2, 2), {})
    empty = torch.nn.Linear(2, 2)
    empty.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="weight is empty here, as it is under ZeRO-3"):
        weight_norms(empty)
