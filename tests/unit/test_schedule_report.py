import argparse
import doctest
import json

import pytest

import hf_effi.functional.schedules as S
from hf_effi.report import plan_lr, schedule_plot


@pytest.mark.parametrize("module", [plan_lr, schedule_plot])
def test_printed_examples(module):
    runner, parser = doctest.DocTestRunner(), doctest.DocTestParser()
    for item in vars(module).values():
        if getattr(item, "__module__", None) == module.__name__ and getattr(item, "__doc__", None):
            text = item.__doc__.replace("```python", "").replace("```", "")
            runner.run(parser.get_doctest(text, dict(vars(module)), item.__name__, module.__file__, None))
    assert runner.summarize(verbose=False).failed == 0


def command(*words):
    parser = argparse.ArgumentParser()
    plan_lr.add_arguments(parser)
    return plan_lr.run(parser.parse_args(words))


def test_transfer_and_extend_and_cooldown(capsys):
    assert command("transfer", "--steps", "400", "--from", "cosine", "--to", "wsd", "--lr", "1e-3") == 0
    assert "factor 0.5" in capsys.readouterr().out
    assert command("extend", "--old-steps", "4000", "--new-steps", "8000") == 0
    out = capsys.readouterr().out
    assert "63." in out and "0.53" in out
    assert command("cooldown", "--steps", "300") == 0
    assert "100%" in capsys.readouterr().out


def test_show_draws(tmp_path, capsys):
    picture = tmp_path / "plot.png"
    words = ("--schedule", 'wsd {"decay_steps": 20}', "--schedule", "rex", "--plot", str(picture))
    assert command("show", "--steps", "100", *words) == 0
    assert "1.00 |***" in capsys.readouterr().out and picture.stat().st_size > 5000


def test_predict(tmp_path, capsys):
    etas = [1e-3 * m for m in S.cosine(400).trace()]
    areas = [sum(etas[:s]) for s in range(1, 401)]
    history = [
        {"step": s, "loss": 2 + 0.3 * areas[s - 1] ** -0.5, "learning_rate": etas[s - 1]} for s in range(10, 401, 10)
    ]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": history}))
    picture = tmp_path / "prediction.png"
    words = ("--run", str(path), "--lr", "1e-3", "--schedule", "wsd", "--schedule", "linear", "--plot", str(picture))
    assert command("predict", "--steps", "400", *words) == 0
    out = capsys.readouterr().out
    assert out.count("final loss") == 2 and picture.exists()


@pytest.mark.parametrize("text", ["wds", "wsd {", "wsd [1]", 'wsd {"x": 1}'])
def test_bad_words_are_explained(text, capsys):
    assert command("show", "--steps", "100", "--schedule", text) == 2
    assert "hf-effi plan lr: " in capsys.readouterr().err


def test_the_whole_gallery_is_drawn(tmp_path):
    schedules = S.gallery(200)
    figure = schedule_plot.plot_schedules(schedules, 200, tmp_path / "gallery.png", panels=6)
    assert len(figure.axes) == len({schedule_plot.label_of(s) for s in schedules})
    lines = schedule_plot.plot_schedules({"one": S.linear(10), "two": S.cosine(10)}, base_lr=1e-3).axes[0].lines
    assert [line.get_label() for line in lines] == ["one", "two"] and lines[0].get_ydata()[0] == 1e-3
    for bad in ([], [S.wsd()]):
        with pytest.raises(ValueError):
            schedule_plot.plot_schedules(bad)
