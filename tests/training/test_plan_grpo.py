"""`hf-effi plan grpo`: from a data sheet, and from runs that it makes on this machine."""

import dataclasses
import json

import pytest
import torch

from hf_effi.cli import main
from hf_effi.functional.grpo_expected import Lengths
from hf_effi.functional.grpo_plan import GRPOChoices, GRPOShape
from hf_effi.report import measure_grpo, plan_grpo
from tests.helpers.models import tiny_qwen3

CARD = ["--tflops", "100", "--gb-per-second", "1000"]
RUN = ["--prompts", "4", "--group-size", "4", "--prompt-length", "32", "--completion-length", "p0=4,p50=16,p100=64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_qwen3().config.save_pretrained(path)
    return str(path)


def test_a_card_gives_the_split_and_the_savings(folder, capsys):
    call = ["plan", "grpo", folder, *CARD, *RUN, "--pass-rates", "0:1,0.5:1,1:1"]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dead_share"] == pytest.approx((2 + 0.125) / 3)
    stock, *others = found["outcomes"]
    assert stock["seconds_of_update"] == pytest.approx(sum(stock["seconds"].values()))
    assert stock["bounds"][0] < stock["seconds_of_update"] < stock["bounds"][1]
    assert stock["seconds"]["gen"] > 0 and stock["seconds"]["logp"] == 0
    assert all(one["seconds"]["train"] <= stock["seconds"]["train"] * 1.001 for one in others[:3])
    filtered = next(one for one in others if one["filter_rounds"])
    assert filtered["live_groups"] > stock["live_groups"] and filtered["seconds"]["gen"] > stock["seconds"]["gen"]
    assert {row["setting"] for row in found["suggestions"]} and all(row["reason"] for row in found["suggestions"])
    assert main([*call, "--num-iterations", "2", "--beta", "0.1", "--reward-seconds", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "groups without a gradient: 70.8%" in text and "beta=0 (another objective" in text
    assert "the split of stock: generate" in text and "the reference model" in text.lower()


def test_rewards_are_counted(folder):
    shape = GRPOShape(2, 2, 2, Lengths((8,), (1,)), Lengths((8,), (1,)))
    card = plan_grpo.DataSheet(100, 1000)
    plan = plan_grpo.plan_grpo(folder, shape, card=card, reward_seconds=2.0)
    assert plan.outcomes[0].seconds["reward"] == pytest.approx(8.0)


def test_this_machine_is_measured(folder, capsys, monkeypatch):
    points = (measure_grpo.Point(2, 2, 2, 4, 3), measure_grpo.Point(2, 2, 4, 6, 6, savings=("pack", "share")))
    monkeypatch.setattr(measure_grpo, "POINTS", points)
    monkeypatch.setattr(measure_grpo.measure_device, "__kwdefaults__", {
        **measure_grpo.measure_device.__kwdefaults__, "points": points, "cycles": 2,
    })  # fmt: skip
    assert main(["plan", "grpo", folder, *RUN, "--measure", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "2 short runs" in found["source"] and len(found["measured"]["points"]) == 2
    assert found["outcomes"][0]["seconds"]["gen"] > 0
    assert set(found["measured"]["speeds"]) == {"gen", "reward", "logp", "train", "update"}


def test_a_run_with_filter_is_timed(tmp_path, folder):
    shape = GRPOShape(2, 2, 4, Lengths((4, 6), (1, 1)), Lengths((3,), (1,)), ((0.0, 1.0), (0.5, 1.0)))
    config = tiny_qwen3().config
    before = config.to_dict()
    model = measure_grpo.random_model(config, "float32", 0)
    seconds = measure_grpo.timed_run(model, shape, GRPOChoices(filter_rounds=2), tmp_path, cycles=2)
    assert seconds["gen"] > 0 and seconds["train"] > 0 and seconds["update"] >= 0
    assert config.to_dict() == before  # a model and its trainer write into a copy
    with pytest.raises(ValueError, match="dtype='int8' is not known"):
        measure_grpo.random_model(config, "int8", 0)
    for over, message in (({"budget_seconds": 0}, "budget_seconds=0"), ({"cycles": 1}, "cycles=1")):
        with pytest.raises(ValueError, match=message):
            measure_grpo.measure_device(config, None, **over)


def test_costs_are_those_of_the_trainer(folder):
    model = tiny_qwen3()
    size, costs = plan_grpo.model_size(model.config, "float32", on_card=False)
    from hf_effi.trainers.grpo.packed import costs_of

    assert costs == costs_of(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert plan_grpo.model_size(model.config, "float32", on_card=True)[1] == dataclasses.replace(costs, per_call=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no device: give --card"),
        (["--tflops", "100"], "no device: give --card"),
        (["--card", "h100", "--measure"], "--measure is this machine"),
        (["--measure", "1", "--efficiency", "0.5"], "efficiency=0.5"),
        (["--measure", "0"], "budget_seconds=0.0 must be above 0"),
        ([*CARD, "--pass-rates", "0.5"], "'0.5' does not tell pass rates"),
        ([*CARD, "--completion-length", "abc"], "'abc' does not tell lengths"),
        ([*CARD, "--micro-batch", "3"], "micro_batch=3 does not divide the 16 rows"),
        ([*CARD, "--reward-seconds", "-1"], "reward_seconds=-1.0"),
        ([*CARD, "--filter-rounds", "0"], "filter_rounds=0 must be at least 1"),
        ([*CARD, "--dtype", "int8"], "dtype='int8' is not known"),
    ],
)
def test_what_is_refused(folder, capsys, options, message):
    assert main(["plan", "grpo", folder, *RUN, *options]) == 2
    assert message in capsys.readouterr().err


def test_one_device():
    with pytest.raises(ValueError, match="give one device"):
        plan_grpo.plan_grpo("x", GRPOShape(1, 2, 2, Lengths((8,), (1,)), Lengths((8,), (1,))))
