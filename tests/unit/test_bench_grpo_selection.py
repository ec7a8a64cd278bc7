"""The bench of the selection suite runs on a tiny policy, its arms are data, and its tables follow from its rows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import _selection_arms as arms
from bench import _selection_tables, grpo_selection, render
from bench import _selection_tasks as tasks
from bench._schema import ROOT
from bench._selection_controls import RandomGroups, RandomScreening, ShuffledAllocation
from bench._selection_figures import figures, summarize
from bench._selection_run import Settings
from hf_effi.methods import find_method
from hf_effi.protocols import RolloutGroups

CHOSEN = "exact,zero_variance,cppo_5,speed_exact,filter_cppo"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Cache folder and result of one quick run."""
    cache = tmp_path_factory.mktemp("selection")
    threads = torch.get_num_threads()
    path = grpo_selection.main(["--quick", "--arms", CHOSEN, "--cache", str(cache)])
    yield cache, json.loads(path.read_text())
    torch.set_num_threads(threads)


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in result["rows"] if row["part"] == "arm"}


def test_the_quick_run_writes_a_whole_result(quick: tuple[Path, dict[str, Any]]) -> None:
    cache, result = quick
    rows = rows_of(result)
    assert list(rows) == [arm.key for arm in arms.choose(CHOSEN.split(","))]
    assert {"random_groups", "random_rows_5", "random_speed_exact", "random_recommended"} <= set(rows)
    # Two controls need a rate of an arm that ran before.
    assert "missing" not in rows["random_groups"]
    assert ("missing" in rows["random_recommended"]) == bool(arms.find_arm("recommended").missing())
    for row in rows.values():
        if "missing" in row:
            continue
        assert row["counts"]["steps"] >= 4 and row["counts"]["prompts"] > 0
        assert (
            all(0 <= value <= 1 for value in row["curve"]) and len(row["curve"]) == Settings().quick().evaluations + 1
        )
        assert sum(row["cpu_seconds"].values()) > 0
    assert rows["exact"]["counts"]["tokens_forwarded"] < rows["trl"]["counts"]["tokens_forwarded"] * 2
    assert rows["speed_exact"]["counts"]["prompts"] > rows["speed_exact"]["counts"]["rollouts"] / 8
    assert rows["cppo_5"]["counts"]["rows_trained"] < rows["cppo_5"]["counts"]["rollouts"] * 2
    assert {figure["name"] for figure in result["headline"]} >= {
        "cpu_seconds_ratio_to_baseline_accuracy", "rollouts_ratio_to_baseline_accuracy",
    }  # fmt: skip
    assert all(figure["goal"] is None for figure in result["headline"])
    assert (cache / "results" / "grpo_selection.json").exists()


def test_a_second_run_reads_what_is_done(quick: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture) -> None:
    cache, result = quick
    written = {path: path.stat().st_mtime_ns for path in (cache / "lab").glob("*.json")}
    assert len(written) > 10
    again = json.loads(grpo_selection.main(["--quick", "--arms", CHOSEN, "--cache", str(cache)]).read_text())
    assert {path: path.stat().st_mtime_ns for path in (cache / "lab").glob("*.json")} == written
    assert again["rows"] == result["rows"]


def test_another_setting_is_another_record(tmp_path: Path) -> None:
    runs = grpo_selection.Runs(tmp_path, 0)
    job = {"name": "a", "arm": "trl", "policy": "here", "seed": 0}
    assert runs.path_of(job) == runs.path_of({**job, "policy": "there"})
    assert runs.path_of(job) != runs.path_of({**job, "seed": 1})
    runs.source = "changed"
    assert runs.path_of(job) != grpo_selection.Runs(tmp_path, 0).path_of(job)


def test_a_run_that_fails_is_told_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(job: dict[str, Any], out: Path) -> None:
        if job.get("prepare"):
            out.write_text('{"mix": []}')
        elif job["arm"] == "exact":
            raise ValueError("on purpose")
        else:
            out.write_text(json.dumps(record(job["arm"], job["seed"], [0.2, 0.4, 0.6])))

    monkeypatch.setattr(grpo_selection, "execute", execute)
    given = ["--quick", "--arms", "exact", "--cache", str(tmp_path)]
    with pytest.raises(SystemExit, match="nothing was written"):
        grpo_selection.main(given)
    assert not (tmp_path / "results").exists()
    result = json.loads(grpo_selection.main([*given, "--allow-failures"]).read_text())
    assert rows_of(result)["exact"]["missing"] == ["ValueError: on purpose"]


def test_runs_in_processes_of_their_own(tmp_path: Path) -> None:
    runs = grpo_selection.Runs(tmp_path, 2)
    settings = json.loads(json.dumps(asdict(Settings().quick())))
    shared = {"quick": True, "settings": settings, "policy": str(tmp_path / "policy"), "extra": "", "prepare": True}
    good, bad = runs.run([{**shared, "name": "good", "task": "lab"}, {**shared, "name": "bad", "task": "second"}])
    assert [row["part"] for row in good["mix"]] == ["mix"] * 3
    assert bad is None and list(runs.failed) == ["bad"]
    assert "MissingExtra" in next(tmp_path.glob("bad-*.log")).read_text() and not list(tmp_path.glob("good-*.log"))


# --- the arms --------------------------------------------------------------------------------------------------------
def test_the_table_of_arms_is_consistent() -> None:
    keys = [arm.key for arm in arms.ARMS]
    assert len(set(keys)) == len(keys) and keys[0] == arms.BASELINE
    for arm in arms.ARMS:
        for name in filter(None, (arm.control, arm.rate_of)):
            assert arms.find_arm(name).key == name
        uses_rate = any(arms.RATE in made.arguments.values() for made in arm.made)
        assert uses_rate == (arm.rate_of is not None), arm.key
        json.dumps(arm.plain())
    controls = {arm.control for arm in arms.ARMS} - {None}
    for arm in arms.ARMS:
        choose_nothing = ("opo", "otb", "oblr", "reinforce_rej", "entropic", "hpt", "process_rewards")
        if arm.options is not None and arm.key not in controls and not arm.key.startswith(choose_nothing):
            assert arm.control is not None or arm.key == arms.EXACT, f"{arm.key} needs a random control"
    assert any(arm.combination for arm in arms.ARMS)


def test_an_arm_without_its_class_is_missing() -> None:
    arm = arms.Arm(
        "new", "new", {}, {"prompt_selector": arms.Made("NotThere"), "group_filter": arms.Made("no.room:X")}
    )
    assert arm.missing() == ["hf_effi.selection.NotThere", "no.room.X"]
    inner = arms.Made("bench._selection_controls:ShuffledAllocation", {"inner": arms.Made("NotThere")})
    assert arms.Arm("new", "new", {}, {"rollout_allocator": inner}).missing() == ["hf_effi.selection.NotThere"]


def test_places_are_filled_in() -> None:
    made = arms.Made(
        "bench._selection_controls:ShuffledAllocation",
        {"inner": arms.Made("ShuffledPrompts", {"size": arms.SIZE, "seed": arms.SEED}), "seed": arms.SEED},
    )
    built = made.build({arms.SIZE: 7, arms.SEED: 3, arms.RATE: None})
    assert built.seed == 3 and (built.inner.size, built.inner.seed) == (7, 3)


def test_chosen_arms_bring_baseline_and_controls() -> None:
    assert [arm.key for arm in arms.choose(["filter_cppo"])] == [
        "trl", "recommended", "random_recommended", "filter_cppo",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="unknown arm 'nope'. Known: trl"):
        arms.choose(["nope"])
    with pytest.raises(SystemExit):
        grpo_selection.main(["--arms", "nope"])


# --- the controls ----------------------------------------------------------------------------------------------------
def groups_of(count: int, generation: int = 0) -> RolloutGroups:
    rewards = torch.zeros(count, 2)
    return RolloutGroups(
        rewards,
        rewards,
        torch.ones(count, 2, dtype=torch.int64),
        step=0,
        rows=tuple(range(count)),
        generation=generation,
    )


def test_random_groups_keep_their_rate_and_nothing_else() -> None:
    kept = [
        RandomGroups(0.25, seed=1).decide(groups_of(400, generation)).keep.float().mean() for generation in range(5)
    ]
    assert sum(kept) / 5 == pytest.approx(0.25, abs=0.03)
    first = RandomGroups(0.25, seed=1).decide(groups_of(400))
    assert first.keep.equal(RandomGroups(0.25, seed=1).decide(groups_of(400)).keep)
    assert not first.keep.equal(RandomGroups(0.25, seed=2).decide(groups_of(400)).keep)
    assert int(RandomGroups(1e-9).decide(groups_of(8)).keep.sum()) == 1
    assert sorted(RandomGroups(0.5).fill_order(groups_of(8))) == list(range(8))


def test_random_screening_lets_as_many_go_on() -> None:
    screening = RandomScreening(initial=4, candidates=2.0)
    chosen = screening.choose(groups_of(16), 8)
    assert len(set(chosen)) == 8 and chosen == sorted(chosen) and max(chosen) < 16
    assert chosen != screening.choose(groups_of(16, generation=1), 8)


def test_shuffled_allocation_keeps_the_numbers() -> None:
    class Fixed:
        def allocate(self, rows: list[int], budget: int) -> list[int]:
            return [2, 2, 4, 8]

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    one = ShuffledAllocation(Fixed(), seed=0)
    drawn = [one.allocate([0, 1, 2, 3], 16) for _ in range(6)]
    assert all(sorted(sizes) == [2, 2, 4, 8] for sizes in drawn) and len({tuple(sizes) for sizes in drawn}) > 1
    other = ShuffledAllocation(Fixed(), seed=0)
    other.load_state_dict(one.state_dict())
    assert other.allocate([0, 1, 2, 3], 16) == one.allocate([0, 1, 2, 3], 16)


# --- the tasks -------------------------------------------------------------------------------------------------------
def test_probe_and_prompts_share_nothing() -> None:
    task = tasks.lab_task()
    probe = task.probe(10)
    excluded = frozenset(item.prompt for item in probe)
    prompts = task.prompts(0, 200, excluded)
    assert len({item.prompt for item in prompts}) == 200 and not excluded & {item.prompt for item in prompts}
    assert task.probe(10) == probe and task.prompts(0, 200, excluded) == prompts
    sizes = [item.size for item in prompts]
    assert {size: sizes.count(size) for size in sorted(set(sizes))} == task.mix.counts(200)
    assert all(task.right(item.worked, item.answer) for item in prompts)
    assert len({item.kind for item in prompts}) == 3
    with pytest.raises(ValueError, match="does not have 1000 different prompts of size 2"):
        tasks.draw_different(task, 0, {2: 1000}, frozenset())


def test_demonstrations_show_no_probe_prompt_and_end_lazy() -> None:
    from dataclasses import replace

    task = tasks.quick(tasks.lab_task())
    task = replace(task, policy=replace(task.policy, sft_steps=20))
    excluded = frozenset(item.prompt for item in task.probe(10))
    tokenizer = task.tokenizer()
    rows = tasks.Demonstrations(task, excluded).rows
    texts = [
        ("".join(tokenizer.convert_ids_to_tokens(a)), "".join(tokenizer.convert_ids_to_tokens(b))) for a, b in rows
    ]
    assert not excluded & {prompt for prompt, _ in texts}
    lazy = [reply.startswith("~") for _, reply in texts]
    assert not any(lazy[: len(lazy) // 2]) and 0.2 < sum(lazy[-400:]) / 400 < 0.6


def test_numbers_of_a_mix_add_up() -> None:
    for task in (tasks.LAB_MIX, tasks.SECOND_MIX):
        for total in (7, 100, 641):
            assert sum(task.counts(total).values()) == total
        assert sum(task.shares.values()) == pytest.approx(1)


def test_the_second_task_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(
        tasks.MissingExtra, match=r"(?s)pip install --no-deps --target .*reasoning-gym==.*--extra FOLDER"
    ):
        tasks.second_task(tmp_path)


def test_the_second_task_on_a_gym_of_three_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Words:
        def __getitem__(self, index: int) -> dict[str, Any]:
            word = ("cat", "Dog", "sun")[index % 3]
            return {"answer": word[::-1], "metadata": {"word": word}}

    monkeypatch.setattr(tasks, "import_gym", lambda extra: SimpleNamespace(create_dataset=lambda *a, **k: Words()))
    task = tasks.second_task(tmp_path)
    drawn = {task.draw(random.Random(seed), 3).prompt for seed in range(20)}
    assert drawn == {"cat>", "sun>"}  # capitals are no letters of the policy
    assert task.right("tac", "tac") and not task.right("~xy", "tac")


# --- figures and tables ----------------------------------------------------------------------------------------------
def record(arm: str, seed: int, values: list[float], speed: float = 1.0) -> dict[str, Any]:
    """A run of 2 seconds with evaluations after 0, 1 and 2."""
    curve = [
        {"cpu_seconds": float(i), "steps": 10 * i, "prompts": 80 * i, "rollouts": int(640 * i * speed),
         "tokens_forwarded": 1000 * i, "accuracy": value}
        for i, value in enumerate(values)
    ]  # fmt: skip
    return {
        "arm": arm, "seed": seed, "learning_rate": 1e-4, "rate": None, "curve": curve, "dropped": {},
        "cpu_seconds": dict.fromkeys(("generation", "reward", "logprobs", "training", "other"), 0.4),
        "counts": {"prompts": 160, "rollouts": 1280, "steps": 20, "rows_trained": 640, "tokens_generated": 1,
                   "tokens_forwarded": 2000},
        "groups_kept": 1.0, "machine_seconds": 0.1,
    }  # fmt: skip


def example() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and headlines of three arms and two seeds: the combination is there in half the time, its control never."""
    table = (
        arms.Arm("trl", "TRL", None),
        arms.Arm("both", "both", {}, control="chance", combination=True),
        arms.Arm("chance", "chance", {}),
        arms.Arm("gone", "gone", {}, {"prompt_selector": arms.Made("NotThere")}),
    )
    records = []
    for seed in (0, 1):
        records += [
            record("trl", seed, [0.2, 0.4, 0.6]),  # the mean of the last three is 0.4, reached after 1 second
            record("both", seed, [0.2, 0.6, 0.7 + seed / 10], speed=0.5),
            record("chance", seed, [0.2, 0.2, 0.3]),
        ]
    rows = summarize(records, table, [0.0, 1.0, 2.0])
    return rows, figures(rows, "<= 0.6")


def test_figures_follow_from_the_rows() -> None:
    rows, found = example()
    of = {row["arm"]: row for row in rows}
    assert of["trl"]["to_target"]["cpu_seconds"] == 1.0 and of["trl"]["ratio_to_baseline"]["cpu_seconds"] == 1.0
    assert of["both"]["ratio_to_baseline"] == {
        "cpu_seconds": 0.5, "rollouts": 0.25, "prompts": 0.5, "steps": 0.5, "tokens_forwarded": 0.5,
    }  # fmt: skip
    assert of["chance"]["ratio_to_baseline"]["cpu_seconds"] is None
    assert of["both"]["against_control"]["mean_accuracy_difference"] == [0.4, 0.45]
    assert of["both"]["against_control"]["verdict"] == "better (interval)"  # half-width 12.7 * 0.035 / sqrt(2) = 0.32
    assert of["gone"]["missing"] == ["hf_effi.selection.NotThere"]
    named = {figure["name"]: figure for figure in found}
    assert named["cpu_seconds_ratio_to_baseline_accuracy"]["value"] == 0.5
    assert named["cpu_seconds_ratio_to_baseline_accuracy"]["met"]
    assert named["rollouts_ratio_to_baseline_accuracy"]["value"] == 0.25
    assert named["arms_better_than_their_control"]["value"] == named["arms_with_a_control"]["value"] == 1


def test_a_combination_that_never_gets_there_misses_its_goal() -> None:
    table = (arms.Arm("trl", "TRL", None), arms.Arm("both", "both", {}, combination=True))
    rows = summarize([record("trl", 0, [0.2, 0.4, 0.6]), record("both", 0, [0.2, 0.2, 0.2])], table, [0.0, 1.0, 2.0])
    figure = figures(rows, "<= 0.15")[0]
    assert figure["value"] is None and figure["met"] is False


@pytest.fixture
def result() -> dict[str, Any]:
    rows, found = example()
    settings = {"part": "settings", "learning_rate": 1e-4, "budget_seconds": 2.0}
    mix = {"part": "mix", "kind": "short", "prompts": 3, "pass_rate": 0.5, "all_wrong": 0.25, "all_right": 0.0}
    return {
        "machine": {}, "versions": {}, "seeds": [0, 1], "date": "", "commit": "", "command": "", "headline": found,
        "rows": [settings, mix, *rows],
    }  # fmt: skip


def test_the_tables_are_those_of_the_rows(result: dict[str, Any]) -> None:
    results = {"grpo_selection": result}
    text = "".join(
        f"<!-- bench:grpo_selection.selection_{view} -->\n<!-- /bench -->\n"
        for view in ("time", "split", "controls", "start")
    )
    page = render.render_text(text, results)
    assert "| TRL | 40.0 % (40.0 to 40.0) | 1.00 (1.00 to 1.00) | 1.00 | 1.00 | 1.00 |  |" in page
    assert "| both | 51.7 % (50.0 to 53.3) | 0.50 (0.50 to 0.50) | 0.25 | 0.50 | 0.50 | better (interval) |" in page
    assert "| chance | 23.3 % (23.3 to 23.3) | not reached (never reached) | not reached |" in page
    assert "Not run: gone." in page
    assert "| TRL | 0.4 | 0.4 | 0.4 | 0.4 | 0.4 | 160 | 1,280 | 640 | 20 | 2 |" in page
    assert "| both | `chance` | +40.0, +45.0 | +26.7, +30.0 | better (interval) |" in page
    assert "| short | 3 | 50 % | 25 % | 0 % |" in page
    assert render.render_text(page, results) == page
    result["rows"][3]["final_accuracy"] = 0.9
    assert render.render_text(page, results) != page


def test_the_table_of_a_card_has_the_arms_of_its_method(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_selection_tables.CARDS, "mopps", ("both", "gone"))
    table = _selection_tables.card_table("mopps", result)
    lines = [line.split(" | ")[0] for line in table.split("\n") if line.startswith("| ")]
    assert lines == ["| arm", "| :---", "| TRL", "| both", "| chance"]
    assert "| both | 51.7 % (50.0 to 53.3) | 0.50 | 0.25 | better (interval) |" in table
    assert "Not among the arms of this run: `gone`." in table
    assert _selection_tables.card_table("vip", result).startswith("Not among the arms of this run, so that")


def test_every_method_with_arms_has_its_table_on_its_card() -> None:
    for method, keys in _selection_tables.CARDS.items():
        card = (ROOT / find_method(method).card).read_text(encoding="utf-8")
        for name in ("grpo_selection", "grpo_second_task"):
            assert f"<!-- bench:{name}.selection_card_{method} -->" in card, method
        assert all(arms.find_arm(key).key == key for key in keys)
    shown = {key for keys in _selection_tables.CARDS.values() for key in keys}
    controls = {arm.control for arm in arms.ARMS}
    left = {arm.key for arm in arms.ARMS} - shown - controls - {arms.BASELINE, arms.EXACT, "filter_cppo"}
    assert not left, f"these arms are on no card: {left}"


def test_the_committed_results_have_their_tables() -> None:
    """Each view can be made from each committed file."""
    for name, loaded in render.load_results().items():
        if name in ("grpo_selection", "grpo_second_task"):
            for view in _selection_tables.VIEWS:
                assert render.render_text(f"<!-- bench:{name}.selection_{view} -->\n<!-- /bench -->\n", {name: loaded})
