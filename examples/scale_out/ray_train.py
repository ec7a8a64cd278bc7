"""
A training on the workers of a Ray cluster: Ray places them and sets up their processes, the trainer is as always.

    pip install 'ray[train]'
    python examples/scale_out/ray_train.py                  # two CPU workers and a tiny random model, on this machine
    python examples/scale_out/ray_train.py --gpus --workers 8 --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara
"""

import argparse
import tempfile
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train(options: dict[str, Any]) -> None:
    """What each worker runs; Ray has set the variables that `torchrun` would set."""
    from datasets import load_dataset

    from hf_effi import EffiSFTConfig, EffiSFTTrainer
    from hf_effi.demo import toy

    if options["model"]:
        model, tokenizer, settings = options["model"], None, {}
        rows = load_dataset(options["dataset"], split="train")
    else:
        demo = toy()
        model, tokenizer, rows, settings = demo.model, demo.tokenizer, demo.texts, demo.cpu_args
    changed = {"max_steps": options["max_steps"], "lr_schedule": "wsd"}
    args = EffiSFTConfig(options["output_dir"], **{**settings, **changed})
    trainer = EffiSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{trainer.state.global_step} steps on {args.world_size} workers; the model is in {args.output_dir}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="used with --model")
    parser.add_argument("--workers", type=int, default=2, help="one process each")
    parser.add_argument("--gpus", action="store_true", help="one GPU for each worker")
    parser.add_argument("--max-steps", type=int, default=3)
    parser.add_argument("--output-dir", default=None, help="a folder that all machines see; by default temporary")
    given = parser.parse_args()
    folder = given.output_dir or tempfile.mkdtemp(prefix="hf_effi_")
    TorchTrainer(
        train,
        train_loop_config={**vars(given), "output_dir": folder},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpus),
        torch_config=TorchConfig(backend="nccl" if given.gpus else "gloo"),
        run_config=RunConfig(storage_path=folder, name="ray"),
    ).fit()
