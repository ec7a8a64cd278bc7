"""
What a reward model is worth: RewardBench 2's accuracy, best of four, subset by subset. Without `--model` it trains a
tiny reward model first, and shows what that changed.

    python examples/reward_bench.py
    python examples/reward_bench.py --model out/my-reward-model --dataset allenai/reward-bench-2
"""

# %%
import argparse
import random
import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import Qwen3Config, Qwen3ForSequenceClassification
from trl import RewardConfig, RewardTrainer

from hf_effi.demo import toy
from hf_effi.recipes import evaluate_reward_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a folder or a model of the Hub, with one label; without it a tiny one is trained")
parser.add_argument("--dataset", default="allenai/reward-bench-2", help="with --model; in the form of RewardBench 2")
parser.add_argument("--max-steps", type=int, default=30)
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
folder = Path(args.output_dir or tempfile.mkdtemp(prefix="hf_effi_"))
folder.mkdir(parents=True, exist_ok=True)

if args.model:
    rows = load_dataset(args.dataset, split="test")
    after = evaluate_reward_model(args.model, rows, scores_file=folder / "scores.jsonl")
    print(f"{args.model}: {after.overall:.3f} over {after.subsets}")
    raise SystemExit

# %% A tiny reward model, and answers of which the one with more 7s is the better
demo, rng = toy(), random.Random(0)
config = Qwen3Config(**{**demo.model.config.to_dict(), "num_labels": 1})
model = Qwen3ForSequenceClassification(config)


def answer(sevens: int) -> str:
    return "".join(rng.sample("7" * sevens + "".join(rng.choices("0123", k=6 - sevens)), 6))


pairs = [{"prompt": "1+1=", "chosen": answer(4), "rejected": answer(1)} for _ in range(128)]
held_out = [
    {"id": str(place), "prompt": "2+2=", "chosen": [answer(4)], "rejected": [answer(1) for _ in range(3)]}
    for place in range(20)
]
held_out = [{**row, "subset": ("Sums", "Others")[place % 2]} for place, row in enumerate(held_out)]

# %% Before and after; `render` stands for the chat template that the tiny tokenizer does not have
settings = {**demo.cpu_args, "max_steps": args.max_steps, "learning_rate": 3e-3}


def render(prompt: str, text: str) -> str:
    return prompt + text


before = evaluate_reward_model(model, held_out, demo.tokenizer, render=render)
config = RewardConfig(str(folder), max_length=32, **settings)
trainer = RewardTrainer(model, config, train_dataset=Dataset.from_list(pairs), processing_class=demo.tokenizer)
trainer.train()
scores_file = folder / "scores.jsonl"
after = evaluate_reward_model(model, held_out, demo.tokenizer, render=render, scores_file=scores_file)
for name, score in after.subsets.items():
    print(f"{name}: {before.subsets[name]:.2f} -> {score:.2f} of {after.counts[name]} prompts")
