"""What somebody else wrote (cards, records, trainer states, YAML) is read with limits, and refused in one sentence."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from hf_effi import cli, read_run
from hf_effi._files import append_text, load_json, load_state
from hf_effi._run_record import EVENTS, FOLDER, SUMMARY, RunStore
from hf_effi._untrusted import check_yaml, depth_of, shorten
from hf_effi.checkpoint import written_in_probe
from hf_effi.errors import BrokenFileError
from hf_effi.functional.probes import PROBES_KEY
from hf_effi.hub.model_card import add_section, training_section
from hf_effi.hub.publish import links_out_of, snapshot
from hf_effi.hub.recipe import RECIPE_MARK, SECTION_BEGIN, SECTION_END, read_recipe
from hf_effi.report.run_data import load_run
from hf_effi.report.run_page import render_run_page
from hf_effi.schedules.branch import branch_cooldown

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
DEEP = "tags: " + "[" * 5000 + "]" * 5000 + "\n"
RECIPE = {
    "methods": ["wsd"],
    "schedule": {"kind": "wsd", "params": {"warmup_steps": 2}},
    "not_carried": {},
    "model": {"name": None, "class": "Qwen3ForCausalLM"},
    "trainer": "transformers.trainer:Trainer",
}
RUN = {"log_history": [{"step": step, "learning_rate": 1e-4} for step in range(1, 5)]}


def one_sentence(text: str) -> bool:
    lines = [line for line in text.strip().splitlines() if line]
    return len(lines) == 1 and len(lines[0]) < 700 and "Traceback" not in text


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        (BOMB, "aliases counted in"),
        (DEEP, "more than 50 deep"),
        ("a: &a [*a]\n", "holds itself"),
        ("a: " + "x" * 300_000, "262,144"),
        ("\n".join(f"k{n}: 1" for n in range(20_001)), "20,000 values"),
    ],
)
def test_what_blows_up_is_refused_before_it_is_built(tmp_path, capsys, text, words):
    with pytest.raises(BrokenFileError, match=words):
        check_yaml(text, "it")
    (tmp_path / "run.yaml").write_text(text)
    for command in (["validate"], ["grpo", "--config"], ["sft", "--config"]):
        assert cli.main([*command, str(tmp_path / "run.yaml")]) in (1, 2)
        told = capsys.readouterr().err
        assert one_sentence(told) and words in told


def test_ordinary_yaml_with_aliases_passes():
    check_yaml("base: &base {a: 1, b: [1, 2]}\nother: {<<: *base, c: *base}\n", "it")
    check_yaml("", "it")


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 10**400},
        {"max_steps": float("inf")},
        {"learning_rate": "x" * 10_000},
        {"x" * 10_000: 1},
        {f"unknown_{n}": n for n in range(500)},
        {7: 1, None: 2, True: 3},
        {"max_steps": {"a": [1] * 5000}},
    ],
    ids=["a huge number", "infinity", "long text", "a long key", "many keys", "keys that are no text", "a deep value"],
)
def test_what_a_file_holds_is_told_in_bounds(tmp_path, capsys, values):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, width=10**9).replace("!!python", ""))
    assert cli.main(["validate", str(path), "--kind", "grpo"]) == 1
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) <= 25 and max(map(len, shown.err.splitlines())) < 500
    assert len(shown.err) < 6000 and "Traceback" not in shown.err


# --- the card --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [BOMB, DEEP, "- a\n- b\n", "a: [1\n", "tags: &t [*t]\n"])
def test_a_hostile_front_matter_is_refused_in_one_sentence(tmp_path, front):
    card = tmp_path / "README.md"
    card.write_text(f"---\n{front}---\n# A model\n")
    with pytest.raises(BrokenFileError, match="front matter") as error:
        add_section(card, RECIPE, RUN, "me/run")
    assert one_sentence(str(error.value))
    assert card.read_text().startswith(f"---\n{front[:20]}"), "it is left as it was"


def test_the_front_matter_that_upstream_sees_is_the_one_that_is_checked(tmp_path):
    """A line `---` that is indented ends the block for nobody."""
    (tmp_path / "README.md").write_text(f"---\na: 1\nb: |\n  x\n  ---\n{BOMB}---\n# A model\n")
    with pytest.raises(BrokenFileError, match="aliases"):
        add_section(tmp_path / "README.md", RECIPE, RUN, "me/run")


HOSTILE = [
    "x`\n\n# Not ours\n<script>alert(1)</script>",
    f"{SECTION_END}\n{SECTION_BEGIN}\n{RECIPE_MARK}\n```json\n{{}}\n```",
    "```\n</details>\n[click](http://evil)",
    "a|b|c\n| --- |",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_values_stay_values_in_the_text_of_the_card(tmp_path, value):
    recipe = {
        **RECIPE,
        "schedule": {"kind": f"wsd{value}", "params": {"note": value}},
        "model": {"name": value, "class": value},
        "not_carried": {value: value},
    }
    run = {
        **RUN,
        "machine": {"cpu": value, value: 1},
        "versions": {value: value},
        "totals": {"rows": {"generated": 8}, "drops": {value: 2}, "peak_memory_bytes": {value: 1}},
    }
    text = training_section(recipe, run, value)
    outside = re.sub(r"(?<!`)(`+)(?!`)([^\n]*?[^\n`])\1(?!`)", "", text).replace("\\<", "")  # without inline code
    for mark in (SECTION_BEGIN, SECTION_END, "<script>", "\n# Not ours", "\n[click]"):
        assert mark not in outside
    assert text.count(RECIPE_MARK) == 1 and outside.count("</details>") == 1
    fences = [line for line in text.splitlines() if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0
    add_section(tmp_path / "README.md", recipe, run, value)
    add_section(tmp_path / "README.md", recipe, run, value)  # the older section is found and replaced
    card = (tmp_path / "README.md").read_text()
    assert card.count(SECTION_BEGIN) == card.count(SECTION_END) == card.count(RECIPE_MARK) == 1
    assert read_recipe(tmp_path)["not_carried"] == {value: value}


def test_text_around_the_section_survives_a_mark_of_its_own(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"---\nlicense: mit\n---\nThe mark `{SECTION_BEGIN}` begins a section.\n")
    add_section(card, RECIPE, RUN, "me/run")
    add_section(card, RECIPE, RUN, "me/run")
    assert "begins a section." in card.read_text() and card.read_text().count("## Training recipe") == 1


# --- records and states ----------------------------------------------------------------------------------------------


def record(folder: Path) -> Path:
    store = RunStore(folder / FOLDER)
    store.begin({"model": {"class": "Tiny", "name": "", "parameters": 5}, "machine": {"cpu": "x"}, "versions": {}}, 0)
    totals = {"seconds": {"train": 1.0}, "tokens": {"forwarded": 3, "real": 2}}
    for step in (1, 2):
        store.event("log", step=step, values={"loss": 1.0 / step, "learning_rate": 1e-3}, totals=totals)
    store.save(status="finished", progress={"step": 2}, findings=[])
    return folder


SUMMARIES = {
    "no mapping": [1],
    "empty": {},
    "null segments": {"segments": None},
    "segments of text": {"segments": ["x"]},
    "no start": {"segments": [{"totals": {}}]},
    "text for seconds": {"segments": [{"started": "now", "totals": {"seconds": {"train": "long"}}}]},
    "a list for totals": {"segments": [{"started": "now", "totals": []}]},
    "a huge number": {"segments": [{"started": "now", "totals": {"updates": 10**400}}]},
    "a model without a size": {"segments": [], "model": {"name": "x"}},
    "a finding that is none": {"segments": [], "findings": [{"rule": 1}]},
    "a step of text": {"segments": [], "progress": {"step": "two"}},
    "machine of lists": {"segments": [], "machine": {"cpu": [1]}},
    "another schema": {"schema": 99, "segments": []},
    "deep": {"segments": [], "arguments": json.loads("[" * 60 + "]" * 60)},
}
EVENT_LINES = {
    "no mapping": "7",
    "no step": '{"event": "log", "time": "x", "segment": 0, "values": {}}',
    "a step of text": '{"event": "log", "time": "x", "segment": 0, "step": "a", "values": {}}',
    "another segment": '{"event": "end", "time": "x", "segment": 9, "step": 1}',
    "a segment below 0": '{"event": "end", "time": "x", "segment": -1, "step": 1}',
    "no values": '{"event": "log", "time": "x", "segment": 0, "step": 1}',
    "no path": '{"event": "checkpoint", "time": "x", "segment": 0, "step": 1}',
    "totals of text": '{"event": "end", "time": "x", "segment": 0, "step": 1, "totals": {"seconds": "x"}}',
}


@pytest.mark.parametrize("what", [*SUMMARIES, *(f"event: {name}" for name in EVENT_LINES)])
def test_a_malformed_record_gets_one_sentence(tmp_path, capsys, what):
    folder = record(tmp_path / "run") / FOLDER
    if what.startswith("event: "):
        with (folder / EVENTS).open("a") as file:
            file.write(EVENT_LINES[what.removeprefix("event: ")] + "\n")
    else:
        (folder / SUMMARY).write_text(json.dumps(SUMMARIES[what]))
    with pytest.raises(BrokenFileError) as error:
        read_run(tmp_path / "run")
    assert one_sentence(str(error.value)) and FOLDER in str(error.value)
    assert cli.main(["report", str(tmp_path / "run")]) == 1
    assert one_sentence(capsys.readouterr().err)


def test_a_resumed_run_puts_a_damaged_record_aside(tmp_path, caplog):
    folder = record(tmp_path) / FOLDER
    (folder / SUMMARY).write_text('{"segments": 5}')
    RunStore(folder).begin({}, 2)
    assert read_run(tmp_path)["segments"][0]["start_step"] == 2
    assert (folder / "effi_run-1.json").read_text() == '{"segments": 5}' and "begins anew" in caplog.text


@pytest.mark.parametrize(
    "state",
    [[], {}, {"global_step": 1, "max_steps": 2, "log_history": None}, {"global_step": "x", "max_steps": 2,
    "log_history": []},
     {"global_step": 1, "max_steps": 2, "log_history": [5]}, {"global_step": 1, "max_steps": None, "log_history": []}],
)  # fmt: skip
def test_a_malformed_trainer_state_gets_one_sentence(tmp_path, capsys, state):
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    for command in (["report"], ["plan", "lr", "predict", "--steps", "9", "--lr", "1", "--schedule", "wsd", "--run"]):
        assert cli.main([*command, str(tmp_path)]) in (1, 2)  # a prediction reads the history alone: here an empty one
        assert one_sentence(capsys.readouterr().err)
    for read in (written_in_probe, lambda path: branch_cooldown(path, 5, tmp_path / "branch")):
        with pytest.raises(BrokenFileError, match="trainer_state.json is damaged"):
            read(tmp_path)


def test_a_damaged_plan_of_probes_gets_one_sentence(tmp_path):
    state = {
        "global_step": 1,
        "max_steps": 2,
        "log_history": [],
        "stateful_callbacks": {PROBES_KEY: {"blocks": [1, "x"]}},
    }
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="no list of ascending blocks"):
        written_in_probe(tmp_path)


@pytest.mark.parametrize("name", ["a$b$c", "$", "$\\frac{$x", "_seed", "a\nb", "<b>x</b>", "x" * 200])
def test_a_folder_of_any_name_has_a_report(tmp_path, capsys, name):
    folders = [record(tmp_path / name), record(tmp_path / f"{name[:100]}2")]
    assert cli.main(["report", "--compare", *map(str, folders), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<b>x</b>" not in page.split("<div", 1)[1].replace("&lt;b&gt;x&lt;/b&gt;", "") and "<svg" in page


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path):
    folder = record(tmp_path)
    line = {
        "event": "log",
        "time": "x",
        "segment": 0,
        "step": 3,
        "values": {"loss": 10**400, "reward": 1e308, "step": "x"},
    }
    (folder / FOLDER / EVENTS).open("a").write(json.dumps(line) + "\n")
    run = load_run(folder)
    assert "<svg" in render_run_page({"run": [run]})
    assert training_section(RECIPE, run, "me/run")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"a": ' * 2000, b"\x80\x04K\x01."])
def test_side_files_of_a_checkpoint_get_one_sentence(tmp_path, content):
    (tmp_path / "side").write_bytes(content)
    for read in (load_json, load_state):
        with pytest.raises(BrokenFileError, match="damaged") as error:
            read(tmp_path / "side")
        assert one_sentence(str(error.value))


# --- symbolic links --------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    path.write_text("mine")
    return path


@pytest.mark.parametrize("name", [EVENTS, SUMMARY])
@pytest.mark.parametrize("step", [0, 3])
def test_the_record_follows_no_link(tmp_path, victim, name, step):
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    (tmp_path / "out" / FOLDER / name).symlink_to(victim)
    store = RunStore(tmp_path / "out" / FOLDER)
    store.begin({}, step)
    store.event("log", step=step, values={})
    assert victim.read_text() == "mine" and read_run(tmp_path / "out")["segments"]


def test_the_folder_of_the_record_is_no_link(tmp_path, victim):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FOLDER).symlink_to(victim.parent)
    RunStore(tmp_path / "out" / FOLDER).begin({}, 0)
    assert os.listdir(victim.parent) == ["victim"] and not (tmp_path / "out" / FOLDER).is_symlink()


def test_a_link_that_appears_while_a_run_trains_is_not_followed(tmp_path, victim):
    (tmp_path / EVENTS).symlink_to(victim)
    with pytest.raises(OSError):
        append_text(tmp_path / EVENTS, "x")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "effi_recipe.json", "effi_learning_rate.png"])
def test_card_recipe_and_picture_replace_a_link(tmp_path, victim, name):
    victim.write_text("---\nlicense: mit\n---\nmine")
    (tmp_path / name).symlink_to(victim)
    add_section(tmp_path / "README.md", RECIPE, RUN, "me/run")
    assert victim.read_text() == "---\nlicense: mit\n---\nmine" and not (tmp_path / name).is_symlink()


def test_the_report_replaces_a_link(tmp_path, victim):
    record(tmp_path / "run")
    (tmp_path / "run" / "report.html").symlink_to(victim)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert victim.read_text() == "mine" and "<svg" in (tmp_path / "run" / "report.html").read_text()


def test_what_a_link_leads_to_is_not_uploaded(tmp_path, victim, caplog):
    out = tmp_path / "out"
    (out / "checkpoint-1" / "inner").mkdir(parents=True)
    (out / "checkpoint-1" / "model.safetensors").write_text("weights")
    (out / "checkpoint-1" / "config.json").symlink_to("model.safetensors")  # inside: it may have been meant
    (out / "checkpoint-1" / "secret.json").symlink_to(victim)
    (out / "checkpoint-1" / "inner" / "link").symlink_to(victim.parent)
    (out / "README.md").symlink_to(victim)
    (out / FOLDER).symlink_to(victim.parent)
    copy = snapshot(out, out / "checkpoint-1", "last-checkpoint")
    found = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file() or path.is_symlink()}
    whole = {"last-checkpoint/model.safetensors", "last-checkpoint/config.json"}
    assert found == {"model.safetensors", "config.json", *whole}
    assert not any(path.is_symlink() for path in copy.rglob("*"))
    assert "secret.json" in caplog.text and "links lead out" in caplog.text
    assert set(links_out_of(out)) == {"checkpoint-1/secret.json", "checkpoint-1/inner/link", "README.md", FOLDER}


def test_small_helpers():
    assert shorten(10**5000).startswith("<int>") and len(shorten("x" * 10**6)) == 80
    assert depth_of(json.loads("[" * 60 + "]" * 60)) == 60
