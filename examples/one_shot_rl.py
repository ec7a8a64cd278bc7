"""
RL on one prompt: an ordinary run records how often each prompt is answered right, and a second one trains on the
prompt whose accuracy moved most, repeated.

    python examples/one_shot_rl.py
    python examples/one_shot_rl.py --model Qwen/Qwen3-0.6B --dataset trl-lib/DeepMath-103K --first-steps 500
"""

# %%
import argparse
import tempfile
from pathlib import Path

from datasets import load_dataset
from trl.rewards import accuracy_reward

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.callbacks import PassRateHistoryCallback
from hf_effi.data import repeat_rows
from hf_effi.demo import toy
from hf_effi.functional.rollouts import accuracy_spread, high_variance_rows

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument("--dataset", default="trl-lib/DeepMath-103K", help="with --model; columns `prompt` and `solution`")
parser.add_argument(
    "--prompts", type=int, default=8, help="of the dataset, for the first run: it sees each several times"
)
parser.add_argument("--first-steps", type=int, default=8, help="of the run that the prompt is chosen by")
parser.add_argument("--max-steps", type=int, default=3, help="of the run on the chosen prompt")
parser.add_argument("--k", type=int, default=1, help="prompts that are chosen")
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
output_dir = Path(args.output_dir or tempfile.mkdtemp(prefix="hf_effi_"))


def starts_with_a_digit(completions, **columns):
    """A random model is never right, so this rewards a digit as the first character."""
    return [float(text[:1].isdigit()) for text in completions]


# %% The same trainer for both runs, each from the model as it was
def make_trainer(folder, prompts, steps, callbacks=()):
    if args.model:
        model, tokenizer, reward, settings = args.model, None, accuracy_reward, {"logging_steps": 1}
    else:
        demo = toy()
        model, tokenizer, reward, settings = demo.model, demo.tokenizer, starts_with_a_digit, demo.grpo_args
    config = EffiGRPOConfig(str(output_dir / folder), **{**settings, "max_steps": steps, "num_generations": 4})
    return EffiGRPOTrainer(model, reward, config, prompts, processing_class=tokenizer, callbacks=list(callbacks))


# %% An ordinary run, and what it saw
dataset = load_dataset(args.dataset, split="train") if args.model else toy().prompts
dataset = dataset.select(range(min(args.prompts, len(dataset))))
history = PassRateHistoryCallback()
make_trainer("first", dataset, args.first_steps, [history]).train()
table = history.table(len(dataset))
chosen = high_variance_rows(table, args.k)

# %% The chosen prompts, repeated to fill every generation
trainer = make_trainer("one", repeat_rows(dataset, chosen, count=64 * args.k), args.max_steps)
trainer.train()

# %% What it did
spread = accuracy_spread(table)
for row in chosen:
    rates = " ".join(f"{rate:.2f}" for rate in history.visits[row])
    print(f"row {row}: {dataset[row]['prompt']!r}, accuracy over the visits {rates}, spread {spread[row]:.2f}")
