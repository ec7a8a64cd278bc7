"""`hf-effi demo --quick` end to end, and the exactness of taking turns."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch

from hf_effi import cli
from hf_effi.demo.alternation import _Cancelled, alternate
from hf_effi.demo.arms import ARMS, choose_arms
from hf_effi.report.comparison import BASELINE, summarize
from hf_effi.report.result_record import check_record


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The output folder of one quick run."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert cli.main(["demo", "--quick", "--output-dir", str(folder)]) == 0
    return folder


def test_output_folder_is_complete(demo):
    for name in ("model/model.safetensors", "model/tokenizer.json", "model/README.md", "report.html", "results.json"):
        assert (demo / name).stat().st_size > 100, name
    check_record(json.loads((demo / "results.json").read_text()), "results.json")


def test_model_reloads_and_answers(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    ids = tokenizer("1+2=", return_tensors="pt")["input_ids"]
    output = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert output.shape[1] > ids.shape[1]


def test_card_has_recipe_and_table(demo):
    card = (demo / "model" / "README.md").read_text()
    recipe = json.loads(card.split("```json\n")[1].split("\n```")[0])
    assert recipe["trainer"] == "EffiGRPOTrainer"
    assert (
        recipe["arguments"]["prune_rate"] == next(arm for arm in ARMS if arm.key == "everything").options["prune_rate"]
    )
    assert "hf-effi demo" in card and "| held-out accuracy, sampled |" in card


def test_records_are_sane(demo):
    rows = json.loads((demo / "results.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == [arm.key for arm in ARMS]
    by_arm = {row["arm"]: row for row in rows}
    for row in rows:
        assert row["rows"]["generated"] == row["rows"]["trained"] + sum(row["rows"]["dropped"].values())
        assert row["tokens"]["forwarded"] >= row["tokens"]["real"] > 0
        assert [point["step"] for point in row["curve"]] == [0, 2, 4, 6] and row["steps"] == 4
        assert all(0 <= point["sampled"] <= 1 for point in row["curve"])
        total = row["curve"][2]["cpu_seconds"]
        assert 0 < total <= sum(row["cpu_seconds"].values()) * 1.01
    stock, exact = by_arm[BASELINE], by_arm["exact"]
    assert stock["rows"]["dropped"] == {}
    # Each generation is forwarded three times: once for the old log-probs, and in two optimizer steps.
    assert stock["tokens"]["real"] == 3 * stock["tokens"]["generated"]
    assert exact["tokens"]["forwarded"] < stock["tokens"]["forwarded"]
    assert exact["rows"]["generated"] == stock["rows"]["generated"] == 64
    assert by_arm["everything"]["rows"]["trained"] < exact["rows"]["generated"]
    assert by_arm["random"]["rows"]["dropped"].keys() <= {"pruned", "zero_variance", "zero_gradient", "uneven"}


def test_exact_savings_follow_the_stock_curve(demo):
    """Same data, same sampling, same gradient: the curve is the stock one but for rounding."""
    rows = {row["arm"]: row for row in json.loads((demo / "results.json").read_text())["rows"]}
    for ours, theirs in zip(rows["exact"]["curve"], rows[BASELINE]["curve"], strict=True):
        assert ours["sampled"] == pytest.approx(theirs["sampled"], abs=0.1)


def test_a_second_run_reads_the_finished_seed(demo):
    before = (demo / "cache" / "seed-0.json").stat().st_mtime_ns
    old = json.loads((demo / "results.json").read_text())["rows"]
    assert cli.main(["demo", "--quick", "--output-dir", str(demo)]) == 0
    assert (demo / "cache" / "seed-0.json").stat().st_mtime_ns == before
    assert json.loads((demo / "results.json").read_text())["rows"] == old


def test_taking_turns_does_not_change_a_run(demo, tmp_path):
    """An arm alone gives, to the bit, the curve it gives beside its siblings."""
    from hf_effi.demo.measure import Accuracy
    from hf_effi.demo.run import DemoSettings, run_arms
    from hf_effi.demo.task import held_out_problems

    settings = replace(DemoSettings().quick(), steps=4)
    held_out = held_out_problems(settings.held_out_per_length, settings.min_terms, settings.max_terms)
    (alone,) = run_arms(
        choose_arms([]),
        settings,
        demo / "base",
        start=Accuracy(0, 0, 0, 0),
        held_out=held_out,
        seed=0,
        output_dir=tmp_path,
    )
    beside = json.loads((demo / "results.json").read_text())["rows"][0]
    assert beside["arm"] == alone["arm"] == BASELINE
    clocks = {"cpu_seconds", "wall_seconds"}
    for ours, theirs in zip(alone["curve"][1:], beside["curve"][1:], strict=True):
        assert {k: v for k, v in ours.items() if k not in clocks} == {
            k: v for k, v in theirs.items() if k not in clocks
        }
    assert alone["tokens"] == beside["tokens"]


def test_table_has_every_arm_and_measure(demo):
    from hf_effi.demo.table import render_table, table_cells

    rows = summarize(json.loads((demo / "results.json").read_text())["rows"])
    text = render_table(rows)
    for words in ("TRL GRPOTrainer", "at equal wall-clock", "tokens forwarded per real token", "control"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120
    header, body = table_cells(rows)
    assert all(len(line) == len(header) == len(ARMS) + 1 for line in body)


def test_jobs_alternate_and_keep_their_own_random_numbers():
    def draws(job):
        torch.manual_seed(1)
        numbers = []
        for _ in range(3):
            numbers.append(torch.rand(1).item())
            job.pause()
        return numbers

    order, results = [], {}
    for name, job in alternate({"a": draws, "b": draws}):
        order.append(name)
        if job.finished:
            results[name] = job.result
    torch.manual_seed(1)
    alone = [torch.rand(1).item() for _ in range(3)]
    assert results == {"a": alone, "b": alone}
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_a_failing_job_ends_its_siblings():
    ended = []

    def waits(job):
        try:
            while True:
                job.pause()
        except _Cancelled:
            ended.append(True)
            raise

    def fails(job):
        job.pause()
        raise RuntimeError("on purpose")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="on purpose"):
        for _ in alternate({"waits": waits, "fails": fails}):
            pass
    assert ended == [True] and threading.active_count() == before


def test_unknown_arm():
    with pytest.raises(ValueError, match="everything"):
        choose_arms(["nope"])
    assert [arm.key for arm in choose_arms(["exact"])] == [BASELINE, "exact"]


def test_a_smoke_test_has_no_goals(demo, capsys):
    """It learns nothing: a goal that it misses says nothing."""
    result = json.loads((demo / "results.json").read_text())
    assert result["headline"] and all(
        figure["goal"] is None and figure["met"] is None for figure in result["headline"]
    )
    page = (demo / "report.html").read_text()
    assert "goal" not in page.split('<div class="cards">')[1].split("<h2>")[0]
    assert "A smoke test: every part ran once, and nothing was learned." in page
