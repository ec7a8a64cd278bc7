"""
Memory: what each switch would save, planned from the model's config; then the strongest of them on a stock `Trainer`.

The loss and the MLP are computed a tile of tokens at a time, layers are recomputed in the backward pass, and their
inputs wait in host memory. The gradients stay those of the plain run up to rounding.

    python examples/memory.py
    python examples/memory.py --model Qwen/Qwen3-0.6B --dataset roneneldan/TinyStories --gpu-gib 24 --seq-len 8192
"""

# %%
import argparse
import tempfile

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hf_effi import ActivationOffloadCallback, PatchCallback, plan_memory
from hf_effi.demo import toy
from hf_effi.kernels import tile_mlp
from hf_effi.memory import tile_loss
from hf_effi.report.plan_memory import how_to_switch_on

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument("--dataset", default="roneneldan/TinyStories", help="used with --model; needs a `text` column")
parser.add_argument("--max-steps", type=int, default=3)
parser.add_argument("--seq-len", type=int, default=4096)
parser.add_argument("--gpu-gib", type=float, default=0.1, help="memory of the GPU to plan for")
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
output_dir = args.output_dir or tempfile.mkdtemp(prefix="hf_effi_")

# %% Model and data
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)
    rows = load_dataset(args.dataset, split="train[:10000]").map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=args.seq_len), remove_columns=["text"]
    )
    collator, settings = DataCollatorForLanguageModeling(tokenizer, mlm=False), {"logging_steps": 1}
else:
    demo = toy()
    model, rows, collator, settings = demo.model, demo.tokens, None, demo.cpu_args

# %% The plan: no weights are read and nothing runs
plan = plan_memory(model.config, seq_len=args.seq_len, batch=8, gpu_gib=args.gpu_gib)
for row in plan.as_dict()["rows"]:
    mark = "  <- the fastest that fits" if row["switches"] == plan.as_dict()["chosen"] else ""
    print(f"{row['peak'] / 2**20:9.1f} MiB  {row['extra_time']:+5.0%} time  {row['switches']}{mark}")
print("to switch on:", how_to_switch_on(plan.chosen) if plan.chosen else "nothing fits: shorter rows or more ranks")

# %% The switches, as callbacks
patches, offload = PatchCallback(tile_loss, tile_mlp), ActivationOffloadCallback()
settings = {**settings, "max_steps": args.max_steps, "activation_checkpointing": True}
trainer = Trainer(
    model,
    TrainingArguments(output_dir, **settings),
    train_dataset=rows,
    data_collator=collator,
    callbacks=[patches, offload],
)
trainer.train()

# %% What it did
print(offload.stats)
