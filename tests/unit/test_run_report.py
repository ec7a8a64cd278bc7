"""
`hf-effi report`: what the page shows of a record, of a stock trainer_state.json and of several runs, in a real
browser.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile

import pytest

from hf_effi import cli
from hf_effi._run_record import RunStore
from hf_effi.callbacks.run_summary import time_parts
from hf_effi.errors import BrokenFileError
from hf_effi.report.run_data import load_group, load_run, mean_and_band, phases_of, series, token_series
from hf_effi.report.run_page import bars, curves, facts, render_run_page
from tests.helpers import browser

CAPTIONS = [
    "Loss",
    "Learning rate and its phases",
    "Reward before and after filters",
    "Completions dropped, by reason",
    "Tokens so far, forwarded and real",
    "Peak memory so far",
]
BARS = ["Completions of the run", "Tokens of the run", "Time of the run"]


def write_run(folder, shift=0.0, steps=8):
    """Write a record as RunRecordCallback does: 8 completions per step, 2 dropped at every second one."""
    store, dropped = RunStore(folder), 0
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    model = {"class": "Tiny", "name": "", "parameters": 1000, "trainable": 1000}
    machine = {"cpu": "a processor with a rather long name of sixty-four characters 12345", "cores": 2}
    header = {"arguments": {"learning_rate": 0.001}, "machine": machine, "versions": versions, "model": model}
    store.begin({**header, "command": "python train.py --output " + "x" * 300}, 0)
    for step in range(1, steps + 1):
        dropped += 2 * (step % 2)
        values = {
            "loss": 2 / step + shift,
            "learning_rate": 1e-3 * min(1, step / 3),
            "effi/reward_generated": 0.5 + shift,
            "effi/reward_kept": 0.6 + shift,
            "effi/dropped/pruned": 2 * (step % 2),
            "effi/dropped/too_hard": 0,
            "effi/tokens_forward": 120,
            "effi/tokens_real": 100,
        }
        totals = {
            "seconds": {"train": 1.0 * step, "data": 0.25 * step},
            "phases": {"gen": 0.5 * step, "train": 0.4 * step},
            "tokens": {"forwarded": 120 * step, "real": 100 * step, "saved": 80 * step},
            "rows": {"generated": 8 * step, "trained": 8 * step - dropped},
            "drops": {"pruned": dropped},
            "peak_memory_bytes": {"host": 2**30 + step},
        }
        store.event("log", step=step, values=values, totals=totals)
    store.save(status="finished", progress={"step": steps}, findings=[])
    return folder


def write_state(folder, step=4):
    folder.mkdir(parents=True)
    logs = [{"step": n, "loss": 1 / n, "learning_rate": 1e-3} for n in range(1, step + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs, "global_step": step, "max_steps": 9}))


def test_bands_are_students_t_by_hand():
    # Mean 3, standard deviation sqrt(2), two runs: 12.706 * sqrt(2) / sqrt(2).
    assert mean_and_band([{1: 2.0, 2: 7.0}, {1: 4.0}]) == [(1, 3.0, 12.706)]
    assert mean_and_band([{1: 2.0}]) == [(1, 2.0, 0.0)] and mean_and_band([]) == mean_and_band([{}]) == []
    assert mean_and_band([{1: 1.0}] * 3) == [(1, 1.0, 0.0)]


def test_phases():
    assert phases_of([]) == phases_of([(1, 0.1, 0)]) == []
    assert phases_of([(0, 0.0, 0), (5, 1.0, 0), (9, 1.0, 0)]) == [(0, 5, "rises"), (5, 9, "constant")]


def test_what_is_no_number_is_left_out(tmp_path):
    run = {"log_history": [{"step": 1, "loss": "nan"}, {"step": 2, "loss": 1}, {"loss": 3}, {"step": 3, "loss": True}]}
    assert series(run, "loss") == {2: 1.0}


def test_a_record_fills_every_figure(tmp_path):
    group = {"a": load_group(write_run(tmp_path / "a"))}
    found = curves(group)
    assert list(found) == CAPTIONS and list(bars(group)) == BARS
    assert "rises" in found["Learning rate and its phases"] and "constant" in found["Learning rate and its phases"]
    assert "too hard" not in found["Completions dropped, by reason"]  # never dropped any
    table = facts(group["a"])
    assert table["completions dropped"] == "12.5 %" and table["tokens forwarded per real token"] == "1.20"
    assert table["wall-clock"] == "10.0 s" and table["loss at the end"] == "0.25"
    assert table["tokens saved"] == "40.0 %"  # 80 of 200 a step


def test_the_reward_of_the_filter_has_a_figure_of_its_own_where_it_is_another(tmp_path):
    group = {"a": load_group(write_run(tmp_path / "a"))}
    for entry in group["a"][0]["log_history"]:
        entry |= {f"effi/filter_reward_{which}": entry[f"effi/reward_{which}"] for which in ("generated", "kept")}
    assert list(curves(group)) == CAPTIONS  # one function of weight 1
    for entry in group["a"][0]["log_history"]:
        entry["effi/filter_reward_kept"] = 1.0
    assert list(curves(group)) == [*CAPTIONS[:3], "The reward that the filter looks at", *CAPTIONS[3:]]
    assert "mean weighted reward" in curves(group)["Reward before and after filters"]


def test_a_stock_state_gives_what_it_has(tmp_path):
    write_state(tmp_path / "out" / "checkpoint-2", 2)
    write_state(tmp_path / "out" / "checkpoint-10", 10)
    run = load_run(tmp_path / "out")
    assert run["progress"]["step"] == 10  # the newest by step, not by name
    assert list(curves({"out": [run]})) == ["Loss", "Learning rate and its phases"] and bars({"out": [run]}) == {}
    assert "no record was written" in render_run_page({"out": [run]})


def test_tokens_add_up_over_the_segments_of_a_resumed_run(tmp_path):
    for start, values in ((0, (100, 200)), (1, (50,))):
        store = RunStore(tmp_path)
        store.begin({}, start)
        for step, forwarded in enumerate(values, start + 1):
            store.event("log", step=step, values={}, totals={"tokens": {"forwarded": forwarded, "real": 40 * step}})
    store.save(progress={"step": 2})
    assert token_series(load_run(tmp_path))["forwarded"] == {1: 100, 2: 250}  # step 2 was done twice


def test_parts_of_the_time_by_hand():
    phases = {"gen": 60.0, "train": 30.0, "reward": 0.1}
    seconds = {"train": 95.0, "data": 4.0, "log": 0.5, "other": 0.5}
    # 4.9 s of the steps are in no phase; reward, log and all that is less than 1 % join them.
    parts = time_parts({"seconds": seconds, "phases": phases})
    assert parts == pytest.approx({"generation": 60.0, "training": 30.0, "data": 4.0, "other": 6.0})
    assert time_parts({"seconds": {"train": 9.0, "data": 1.0}}) == {"whole step": 9.0, "data": 1.0}
    assert time_parts({}) == {}


def test_a_stock_run_beside_ours_shows_its_reward(tmp_path):
    ours = load_group(write_run(tmp_path / "ours"))
    write_state(tmp_path / "stock")
    (stock,) = load_group(tmp_path / "stock")
    stock["log_history"] = [{"step": step, "reward": 0.1 * step} for step in range(1, 5)]
    picture = curves({"stock": [stock], "ours": ours})["Reward before and after filters"]
    assert all(f">{label}<" in picture for label in ("stock", "ours, generated", "ours, kept"))


def test_seeds_in_sub_folders_are_one_group(tmp_path):
    for seed in range(3):
        write_run(tmp_path / "ours" / f"seed-{seed}", shift=0.01 * seed)
    write_run(tmp_path / "stock")
    page = render_run_page({"ours": load_group(tmp_path / "ours"), "stock": load_group(tmp_path / "stock")})
    assert "95 % intervals" in page and "ours beside stock" in page and "<td>3</td><td>1</td>" in page
    assert "fill-opacity" in page or "opacity: 0.09" in page


def test_the_page_asks_for_nothing_and_escapes_what_it_shows(tmp_path):
    title = "<b>&out"
    page = render_run_page({title: load_group(write_run(tmp_path / "a"))})
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", page) and not re.search(r"url\((?!#)", page)
    assert "@import" not in page and "<script" not in page and title not in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_what_the_doctor_found_is_on_the_page(tmp_path):
    (run,) = load_group(write_run(tmp_path / "a"))
    finding = {
        "rule": "lr",
        "step": 30,
        "problem": "The LR is 0",
        "advice": "set learning_rate",
        "severity": "problem",
    }
    assert "step 30: The LR is 0: set learning_rate" in render_run_page({"a": [{**run, "findings": [finding]}]})


def test_command(tmp_path, capsys):
    write_run(tmp_path / "one" / "out")
    write_run(tmp_path / "two" / "out")
    assert cli.main(["report", str(tmp_path / "one" / "out")]) == 0
    assert (tmp_path / "one" / "out" / "report.html").exists()
    both = [str(tmp_path / name / "out") for name in ("one", "two")]
    assert cli.main(["report", "--compare", *both, "--output", str(tmp_path / "both.html")]) == 0
    assert "one/out beside two/out" in (tmp_path / "both.html").read_text()
    capsys.readouterr()
    assert cli.main(["report"]) == 2
    assert cli.main(["report", "--compare", both[0]]) == 2
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(BrokenFileError, match="RunRecordCallback"):
        load_group(tmp_path / "empty")


# ---- in a browser ----

#: Puts the page into a frame of the asked width and writes what it measures into the document.
_FRAME = """<!doctype html><body>
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><script>
onload = () => {{
  const frame = document.querySelector("iframe").contentDocument;
  const pictures = [...frame.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
  const right = Math.max(...[...frame.querySelectorAll("main *")].filter(e => !e.closest(".scroll, pre, defs, svg *"))
    .map(e => e.getBoundingClientRect().right));
  document.body.innerText = JSON.stringify({{
    overflow: frame.documentElement.scrollWidth - {width}, right: right - {width},
    pictures: pictures.length, smallest: Math.min(...pictures.map(p => Math.min(p.width, p.height))),
    paper: getComputedStyle(frame.body).backgroundColor, ink: getComputedStyle(frame.body).color,
  }});
}};
</script></body>"""


def in_chromium(*arguments):
    options = [f"--{option}" for option in browser.OPTIONS.split()]
    with tempfile.TemporaryDirectory() as profile:
        command = [browser.BROWSER, *options, "--hide-scrollbars", f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    if browser.BROWSER is None:
        pytest.skip("chromium is not installed")
    folder = tmp_path_factory.mktemp("pages")
    one = load_group(write_run(folder / "a"))
    other = load_group(write_run(folder / "b", shift=0.1))
    return {"one": render_run_page({"a": one}), "two": render_run_page({"a": one, "b": other})}


@pytest.mark.parametrize("page", ["one", "two"])
@pytest.mark.parametrize("width", [380, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overflows(pages, page, width, dark, tmp_path):
    path = tmp_path / "frame.html"
    path.write_text(_FRAME.format(width=width, page=pages[page].replace("&", "&amp;").replace('"', "&quot;")))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    found = json.loads(
        re.search(r"\{.*\}", in_chromium(scheme, "--window-size=1400,1000", "--dump-dom", path.as_uri()))[0]
    )
    assert found["overflow"] <= 0 and found["right"] <= 0.5
    assert found["pictures"] == 9 and found["smallest"] > 40
    light = sum(map(int, re.findall(r"\d+", found["paper"]))) > sum(map(int, re.findall(r"\d+", found["ink"])))
    assert light is not dark


def test_it_prints(pages, tmp_path):
    (tmp_path / "page.html").write_text(pages["one"])
    in_chromium("--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "page.html").as_uri())
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 4
