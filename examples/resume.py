"""
Exact resume of GRPO: a run that stops inside an epoch and goes on from its checkpoint ends with the weights of the run
that was never stopped: prompts, rollouts in the buffer, random states and pruning all continue. On a CPU equal to the
bit; on a GPU as far as its kernels repeat themselves.

    python examples/resume.py
    python examples/resume.py --model Qwen/Qwen3-0.6B --dataset trl-lib/DeepMath-103K
"""

# %%
import argparse
import tempfile
from pathlib import Path

from datasets import load_dataset
from trl.rewards import accuracy_reward

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer
from hf_effi.demo import toy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument("--dataset", default="trl-lib/DeepMath-103K", help="with --model; columns `prompt` and `solution`")
parser.add_argument("--max-steps", type=int, default=4)
parser.add_argument("--stop-at", type=int, default=3, help="step of the checkpoint that the second run starts from")
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
output_dir = Path(args.output_dir or tempfile.mkdtemp(prefix="hf_effi_"))


# %% The same trainer twice
def count_digits(completions, **columns):
    """Something that the completions of a random model differ in."""
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def make_trainer(folder):
    if args.model:
        model, tokenizer, reward = args.model, None, accuracy_reward
        prompts, settings = load_dataset(args.dataset, split="train"), {}
    else:
        demo = toy()
        model, tokenizer, reward = demo.model, demo.tokenizer, count_digits
        prompts, settings = demo.prompts, demo.grpo_args
    changed = {"max_steps": args.max_steps, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
    config = EffiGRPOConfig(folder, prune_rate=0.5, steps_per_generation=2, **{**settings, **changed})
    return EffiGRPOTrainer(model, reward, config, prompts, processing_class=tokenizer)


# %% One run without a stop, one that starts from its checkpoint
whole = make_trainer(str(output_dir / "whole"))
whole.train()
resumed = make_trainer(str(output_dir / "resumed"))
resumed.train(resume_from_checkpoint=str(output_dir / "whole" / f"checkpoint-{args.stop_at}"))

# %% What it did
weights, again = whole.model.state_dict(), resumed.model.state_dict()
difference = max(float((weights[name] - again[name]).abs().max()) for name in weights)
print(f"resumed at step {args.stop_at} of {args.max_steps}: largest difference of a weight {difference:.1e}")
