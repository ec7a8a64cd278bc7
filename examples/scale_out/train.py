"""
GRPO with completions from vLLM: the training of the two roles that `launch.sh` starts.

    MODEL=Qwen/Qwen3-0.6B bash examples/scale_out/launch.sh examples/scale_out/train.py \
        --dataset trl-lib/DeepMath-103K --output_dir out --max_steps 100 --difficulty_range 0 1 --prune_rate 0.5

Every field of `EffiGRPOConfig`, TRL's and ours, is an option or a key of a file given by `--config run.yaml`.
"""

import importlib
from dataclasses import dataclass, field

from datasets import load_dataset
from trl import TrlParser

from hf_effi import EffiGRPOConfig, EffiGRPOTrainer


@dataclass
class Task:
    model: str = field(metadata={"help": "a model of the Hub or a folder, the one that vLLM serves"})
    dataset: str = field(metadata={"help": "a data set of the Hub or a folder, with the split `train`"})
    reward: str = field(
        default="trl.rewards.accuracy_reward",  # needs `pip install math-verify`
        metadata={"help": "`module.function` of the reward"},
    )


task, args = TrlParser((Task, EffiGRPOConfig)).parse_args_and_config()
module, _, name = task.reward.rpartition(".")
reward = getattr(importlib.import_module(module), name)
trainer = EffiGRPOTrainer(task.model, reward, args, load_dataset(task.dataset, split="train"))
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
trainer.save_model()
