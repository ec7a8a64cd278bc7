"""Comparisons by hand-computed values; the page is self-contained and shows the numbers of its JSON."""

from __future__ import annotations

import json
import re

import pytest

from hf_effi.report.comparison import BASELINE, compare, first_reached, mean_curve, smoothed, summarize, value_at
from hf_effi.report.page import as_points, as_times, render_page
from hf_effi.report.result_card import front_matter, markdown_table, render_card
from hf_effi.report.result_record import check_record, headline, make_record


def curve(accuracies, seconds_a_step, rows_a_step=10):
    """One point per step."""
    return [
        {
            "step": step,
            "cpu_seconds": step * seconds_a_step,
            "wall_seconds": 2 * step * seconds_a_step,
            "rows_generated": step * rows_a_step,
            "greedy": value,
            "greedy_ci": 0.02,
            "sampled": value,
            "sampled_ci": 0.01,
        }
        for step, value in enumerate(accuracies)
    ]


def run(arm, accuracies, seconds_a_step, seed=0):
    points = curve(accuracies, seconds_a_step)
    steps = len(points) - 1
    seconds = {"generation": 0.25, "reward": 0.0, "logprobs": 0.25, "training": 0.4, "other": 0.1}
    return {
        "arm": arm,
        "title": f"title of {arm} <&>",
        "control": False,
        "options": None if arm == BASELINE else {"prune_rate": 0.5},
        "seed": seed,
        "steps": steps,
        "settings": {
            "steps": steps,
            "held_out_per_length": 4,
            "min_terms": 2,
            "max_terms": 4,
            "samples_per_prompt": 2,
        },
        "curve": points,
        "cpu_seconds": {name: share * steps * seconds_a_step for name, share in seconds.items()},
        "wall_seconds": {name: share * steps * seconds_a_step * 2 for name, share in seconds.items()},
        "rows": {"generated": 60, "trained": 45, "dropped": {"zero_variance": 15}},
        "tokens": {"generated": 500, "forwarded": 1234, "real": 1000},
    }


LINE = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_smoothing_keeps_a_straight_line_but_for_its_end():
    assert smoothed(curve(LINE, 1.0)) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55])


def test_value_and_crossing_interpolate():
    points = curve(LINE, 2.0)
    assert value_at(points, "cpu_seconds", 5.0) == pytest.approx(0.25)
    assert value_at(points, "cpu_seconds", 99.0) == pytest.approx(0.55)
    assert first_reached(points, "cpu_seconds", 0.25) == pytest.approx(5.0)
    assert first_reached(points, "step", 0.56) is None


def test_an_arm_of_half_the_time_is_twice_as_fast():
    ratios = compare(run("ours", LINE, 1.0), run(BASELINE, LINE, 2.0))
    assert ratios["cpu_seconds_to_target_ratio"] == pytest.approx(0.5)
    assert ratios["wall_seconds_to_target_ratio"] == pytest.approx(0.5)
    assert ratios["rows_generated_to_target_ratio"] == pytest.approx(1.0)
    assert ratios["step_speedup"] == pytest.approx(2.0)
    assert ratios["accuracy_gain_equal_steps"] == ratios["accuracy_gain_equal_prompts"] == pytest.approx(0.0)
    # At 6 s: ours is at its end (0.55 smoothed), the baseline at step 3.
    assert ratios["accuracy_gain_equal_cpu_seconds"] == pytest.approx(0.25)


def test_an_arm_that_goes_on_reaches_the_target_later_and_is_compared_at_equal_steps():
    # Both are compared after 5 of 6 points, where the smoothed baseline has 0.5; ours is 0.02 behind and goes on.
    baseline = {**run(BASELINE, LINE, 1.0), "steps": 5}
    ours = {**run("ours", [value - 0.02 * bool(value) for value in [*LINE, 0.7, 0.8]], 0.5), "steps": 5}
    ratios = compare(ours, baseline)
    assert ratios["cpu_seconds_to_target_ratio"] == pytest.approx(0.5 * 5.2 / 5)
    assert ratios["accuracy_gain_equal_steps"] == pytest.approx(-0.02)
    assert summarize([baseline, ours])["ours"]["sampled"] == pytest.approx(0.48)


def test_a_baseline_that_is_done_early_gets_its_own_crossing_not_its_end():
    plateau = [0.0, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    ratios = compare(run("ours", plateau, 1.0), run(BASELINE, plateau, 1.0))
    assert ratios["cpu_seconds_to_target_ratio"] == pytest.approx(1.0)


def test_an_arm_that_never_gets_there_says_so():
    ratios = compare(run("ours", [0.0] * 7, 0.1), run(BASELINE, LINE, 1.0))
    assert ratios["cpu_seconds_to_target_ratio"] is None
    assert as_times(None) == "not reached"


def test_summary_is_the_median_over_seeds_and_a_miss_counts_as_infinitely_slow():
    records = [run(BASELINE, LINE, 2.0, seed) for seed in range(3)]
    records += [run("ours", LINE, 1.0, 0), run("ours", LINE, 0.5, 1), run("ours", [0.0] * 7, 1.0, 2)]
    row = summarize(records)["ours"]
    assert row["cpu_seconds_to_target_ratio"] == pytest.approx(0.5)
    assert row["cpu_seconds_to_target_ratio_range"] == [pytest.approx(0.25), None]
    assert row["seeds"] == 3 and row["tokens_forwarded_per_real_token"] == pytest.approx(1.234)
    assert mean_curve(records, BASELINE)[3]["sampled"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "value, goal, met", [(1.6, ">= 1.6", True), (0.3, "<= 0.2", False), (None, "> 0", False), (1.0, None, None)]
)
def test_headline(value, goal, met):
    assert headline("x", value, goal)["met"] is met


def test_headline_refuses_a_goal_it_cannot_read():
    with pytest.raises(ValueError, match="1.6"):
        headline("x", 1.0, "at least 2")


def result(seeds=(0, 1)):
    records = [run(arm, LINE, pace, seed) for seed in seeds for arm, pace in ((BASELINE, 2.0), ("ours", 1.0))]
    figures = [headline("accuracy_gain", 0.1234, "> 0"), headline("ratio_to_baseline", None, "<= 0.4")]
    return make_record("demo", "hf-effi demo", seeds, figures, records)


def test_record_passes_its_own_check_and_survives_json():
    record = result()
    check_record(json.loads(json.dumps(record)), "demo.json")
    del record["seeds"]
    with pytest.raises(ValueError, match="demo.json: missing seeds"):
        check_record(record, "demo.json")


def test_record_with_a_wrong_verdict_is_refused():
    record = result()
    record["headline"][0]["met"] = False
    with pytest.raises(ValueError, match="accuracy_gain"):
        check_record(record, "demo.json")


def test_page_is_self_contained():
    page = render_page(result())
    assert page.count("<svg ") == 5
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"url\((?!#)", page) and "@import" not in page and "<script" not in page
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "#0a0b0c" not in page and "var(--series-0)" in page  # colours follow the page's theme
    assert "title of ours &lt;&amp;&gt;" in page and "title of ours <&>" not in page


def test_page_shows_the_numbers_of_its_json():
    record = result()
    page, rows = render_page(record), summarize(record["rows"])
    shown = dict(re.findall(r'data-headline="(\w+)">([^<]+)<', page))
    assert shown == {"accuracy_gain": "0.123", "ratio_to_baseline": "not reached"}
    table = page[page.index("<table>") : page.index("</table>")]
    cells = {
        re.sub("<.*?>", "", line.split("</th>")[0]): re.findall(r"<td>(.*?)</td>", line)
        for line in re.findall(r"<tr><th>(.*?)</tr>", table)
    }
    assert cells["Gain at equal CPU time"] == [
        as_points(row["accuracy_gain_equal_cpu_seconds"]) for row in rows.values()
    ]
    assert cells["Step speed-up"] == ["1.00x", "2.00x"]
    assert cells["Tokens forwarded per real token"] == ["1.23", "1.23"]


def test_card_reads_back():
    arguments = {"trainer": "EffiGRPOTrainer", "arguments": {"prune_rate": 0.5}}
    card = render_card(
        name="demo",
        summary="A policy.",
        tags=["hf_effi", "grpo"],
        arguments=arguments,
        table=markdown_table(["arm", "value"], [["a|b", "1"]]),
        command="hf-effi demo",
        versions={"trl": "1.16.0"},
        metrics={"sampled accuracy": 0.5},
    )
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert data.tags == ["hf_effi", "grpo"] and data.library_name == "transformers"
    assert data.eval_results[0].metric_value == 0.5
    assert json.loads(card.split("```json\n")[1].split("\n```")[0]) == arguments
    assert "a\\|b" in card


def test_front_matter_is_yaml():
    import yaml

    text = front_matter({"tags": ["a: b", "#c"], "name": 'quo"te'})
    assert yaml.safe_load(text.strip("-\n")) == {"tags": ["a: b", "#c"], "name": 'quo"te'}
