"""
A training from a YAML file: checked before a model is loaded, then run as `hf-effi grpo` does.

Without `--model` a tiny random model and prompts are saved to the output folder and take the place of the YAML's.

    python examples/train_from_yaml.py
    hf-effi validate examples/grpo.yaml && hf-effi grpo --config examples/grpo.yaml      # the same, for real
    python examples/train_from_yaml.py --model Qwen/Qwen3-0.6B --dataset trl-lib/DeepMath-103K
"""

# %%
import argparse
import sys
import tempfile
from pathlib import Path

import yaml

from hf_effi import read_run
from hf_effi.cli import main
from hf_effi.demo import toy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--config", default=str(Path(__file__).with_name("grpo.yaml")))
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument("--dataset", default="trl-lib/DeepMath-103K", help="used with --model")
parser.add_argument("--max-steps", type=int, default=2)
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
output_dir = Path(args.output_dir or tempfile.mkdtemp(prefix="hf_effi_"))
output_dir.mkdir(parents=True, exist_ok=True)

# %% The file, with what is given here in the place of its own values
config = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
config |= {"output_dir": str(output_dir), "max_steps": args.max_steps}
if args.model:
    config |= {"model_name_or_path": args.model, "dataset_name": args.dataset}
else:
    demo, model, data = toy(), output_dir / "model", output_dir / "data"
    demo.model.save_pretrained(model)
    demo.tokenizer.save_pretrained(model)
    data.mkdir(parents=True, exist_ok=True)
    demo.prompts.to_json(data / "train.jsonl")
    config |= {**demo.grpo_args, "max_steps": args.max_steps}
    config |= {"model_name_or_path": str(model), "dataset_name": str(data)}
    config |= {"reward_funcs": ["hf_effi.demo.task.exact_answer_reward"]}
path = output_dir / "run.yaml"
path.write_text(yaml.safe_dump(config), encoding="utf-8")

# %% Check it first (unknown keys, types, ranges, combinations), then train
for command in (["validate", str(path)], ["grpo", "--config", str(path)]):
    if failed := main(command):
        sys.exit(failed)

# %% What it did, from the record that every Effi trainer writes
record = read_run(output_dir)
print(f"{record['progress']['step']} steps with the methods {', '.join(record['methods'])}; record in {output_dir}")
