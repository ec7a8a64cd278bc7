"""
GRPO that trains only on what teaches: online difficulty filtering drops prompts that are always right or always wrong,
CPPO pruning keeps the half of the completions with the largest absolute advantage.

    python examples/grpo_filter_prune.py
    python examples/grpo_filter_prune.py --model Qwen/Qwen3-0.6B --dataset trl-lib/DeepMath-103K --max-steps 100
"""

# %%
import argparse
import tempfile

from datasets import load_dataset
from trl.rewards import accuracy_reward

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.demo import toy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument("--dataset", default="trl-lib/DeepMath-103K", help="with --model; columns `prompt` and `solution`")
parser.add_argument("--max-steps", type=int, default=5)
parser.add_argument("--difficulty-range", type=float, nargs=2, default=(0.2, 0.8), help="pass rates that are kept")
parser.add_argument("--prune-rate", type=float, default=0.5, help="share of the completions that is left out")
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
output_dir = args.output_dir or tempfile.mkdtemp(prefix="hf_effi_")

# %% Model, prompts and reward
if args.model:
    model, tokenizer, reward = args.model, None, accuracy_reward
    prompts, settings = load_dataset(args.dataset, split="train"), {"logging_steps": 1}
else:
    demo = toy()
    model, tokenizer, prompts, settings = demo.model, demo.tokenizer, demo.prompts, demo.grpo_args

    def reward(completions, **columns):
        """A random model is never right, so this rewards a digit as the first character."""
        return [float(text[:1].isdigit()) for text in completions]


# %% Two arguments
config = EffiGRPOConfig(
    output_dir,
    difficulty_range=tuple(args.difficulty_range),
    prune_rate=args.prune_rate,
    **{**settings, "max_steps": args.max_steps},
)
trainer = EffiGRPOTrainer(model, reward, config, prompts, processing_class=tokenizer)
trainer.train()

# %% What it did
log = [entry for entry in trainer.state.log_history if "effi/rows_trained" in entry]
for entry in log:
    dropped = {key.split("/")[-1]: int(value) for key, value in entry.items() if "/dropped/" in key and value}
    print(
        f"step {entry['step']}: generated {entry['effi/rows_generated']:.0f} completions, "
        f"trained on {entry['effi/rows_trained']:.0f}; dropped {dropped}"
    )
