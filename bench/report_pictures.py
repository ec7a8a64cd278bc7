"""
Pictures of the docs: `python -m bench.report_pictures` (minutes on a CPU, needs chromium for the pages of the report).

Draws the gallery of schedules. Trains the demo's policy twice over three seeds, stock and with filter, CPPO, exact
savings and WSD, writes the pages of `hf-effi report`, and photographs them into `docs/images`. Runs that are there
already are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

for _name, _value in (("OMP_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1")):
    os.environ.setdefault(_name, _value)

from bench._schema import ROOT  # noqa: E402  (the threads are set before torch is loaded)

IMAGES = ROOT / "docs" / "images"
WIDTH = 1120
TITLE = "filter + CPPO + WSD"
#: What the run of the picture adds to the demo's settings.
METHODS = {
    "difficulty_range": (0.0, 1.0),
    "difficulty_max_rounds": 1,
    "difficulty_underfill": "shrink",
    "prune_rate": 0.5,
    "prune_allocation": False,
    "lr_schedule": "wsd",
    "lr_schedule_kwargs": {"warmup_fraction": 0.1, "decay_fraction": 0.3},
}
_HEIGHT = "<script>document.title = 'height ' + document.documentElement.scrollHeight</script></body>"


def train(folder: Path, methods: dict[str, Any] | None, seed: int, steps: int) -> None:
    """Train the demo's policy with TRL's trainer, or with ours and `methods`."""
    from datasets import Dataset
    from transformers import Qwen3ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from hf_effi import EffiGRPOConfig, EffiGRPOTrainer, GRPODoctor, RunRecordCallback
    from hf_effi.demo.run import DemoSettings, grpo_arguments
    from hf_effi.demo.task import build_tokenizer, exact_answer_reward, held_out_problems, training_problems

    settings = DemoSettings()
    problems = itertools.islice(training_problems(10_000 + seed, held_out_problems(64)), settings.train_prompts)
    rows = Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])
    arguments = {**grpo_arguments(settings, seed, str(folder)), "max_steps": steps}
    if methods is None:
        trainer_class, config = GRPOTrainer, GRPOConfig(**arguments)
    else:
        for own in ("lr_scheduler_type", "warmup_steps"):  # the schedule is that of `methods`
            del arguments[own]
        trainer_class, config = EffiGRPOTrainer, EffiGRPOConfig(**arguments, **methods)
    trainer_class(
        model=Qwen3ForCausalLM.from_pretrained("base"),
        reward_funcs=exact_answer_reward,
        args=config,
        train_dataset=rows,
        processing_class=build_tokenizer(),
        callbacks=[RunRecordCallback(), GRPODoctor()],
    ).train()


def photograph(page: Path, name: str, browser: str) -> None:
    """Take a picture of the whole page at a laptop's width."""
    measured = page.with_suffix(".height.html")
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", _HEIGHT), encoding="utf-8")
    document = browse(browser, f"--window-size={WIDTH},1000", "--dump-dom", measured.as_uri())
    height = re.search(rb"<title>height (\d+)", document).group(1).decode()
    measured.unlink()
    browse(browser, f"--window-size={WIDTH},{height}", f"--screenshot={IMAGES / name}.png", page.as_uri())


def draw_schedules() -> None:
    """Draw every schedule into `docs/images/schedules.png`, in few colours, which a clone carries more easily."""
    from PIL import Image

    from hf_effi.functional.schedules import gallery
    from hf_effi.report import plot_schedules

    path = IMAGES / "schedules.png"
    plot_schedules(gallery(200), 200, path, panels=3)
    Image.open(path).convert("RGB").quantize(32).save(path, optimize=True)


def browse(browser: str, *arguments: str) -> bytes:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    return subprocess.run([browser, *options, *arguments], capture_output=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=60, metavar="N")
    parser.add_argument("--cache", type=Path, default=ROOT / "bench" / "cache" / "report")
    parser.add_argument("--only", choices=["schedules"], help="draw only these, in seconds")
    args = parser.parse_args()
    draw_schedules()
    if args.only:
        return 0
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("report_pictures: chromium is not installed.", file=sys.stderr)
        return 1

    from hf_effi._run_record import SUMMARY
    from hf_effi.demo.policy import PolicySettings, prepare_policy
    from hf_effi.demo.task import held_out_problems
    from hf_effi.report.run_data import load_group
    from hf_effi.report.run_page import render_run_page

    args.cache.mkdir(parents=True, exist_ok=True)
    os.chdir(args.cache)  # a record names the starting policy as it was given
    prepare_policy(PolicySettings(), held_out_problems(64), Path("base"))
    for (arm, methods), seed in itertools.product({"stock": None, "ours": METHODS}.items(), range(args.seeds)):
        folder = Path(arm) / f"seed-{seed}"
        if not (folder / SUMMARY).exists():
            train(folder, methods, seed, args.steps)
    ours, stock = load_group("ours"), load_group("stock")
    pages = {"report_run": {TITLE: ours[:1]}, "report_compare": {"TRL GRPOTrainer": stock, TITLE: ours}}
    for name, groups in pages.items():
        page = Path(f"{name}.html").resolve()
        page.write_text(render_run_page(groups), encoding="utf-8")
        photograph(page, name, browser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
