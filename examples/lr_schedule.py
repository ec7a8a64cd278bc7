"""
A learning-rate schedule on a stock `transformers.Trainer`, as a callback: warmup, a plateau, a short decay.

    python examples/lr_schedule.py
    python examples/lr_schedule.py --model Qwen/Qwen3-0.6B --dataset roneneldan/TinyStories --max-steps 500
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

from hf_effi import LRScheduleCallback
from hf_effi.demo import toy
from hf_effi.schedules import wsd

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument("--dataset", default="roneneldan/TinyStories", help="used with --model; needs a `text` column")
parser.add_argument("--max-steps", type=int, default=20)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
output_dir = args.output_dir or tempfile.mkdtemp(prefix="hf_effi_")

# %% Model and data
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    rows = load_dataset(args.dataset, split="train[:10000]")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=["text"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collator, settings = DataCollatorForLanguageModeling(tokenizer, mlm=False), {"logging_steps": 1}
else:
    demo = toy()
    model, rows, collator, settings = demo.model, demo.tokens, None, demo.cpu_args

# %% One callback; the Trainer's own scheduler gives way to it
schedule = wsd(warmup_fraction=0.1, decay_fraction=0.2)
settings = {**settings, "max_steps": args.max_steps, "learning_rate": args.learning_rate}
trainer = Trainer(
    model,
    TrainingArguments(output_dir, **settings),
    train_dataset=rows,
    data_collator=collator,
    callbacks=[LRScheduleCallback(schedule)],
)
trainer.train()

# %% What it did
log = [entry for entry in trainer.state.log_history if "loss" in entry]
for entry in log[:: max(1, len(log) // 10)]:
    print(f"step {entry['step']:4d}  learning rate {entry['learning_rate']:.2e}  loss {float(entry['loss']):.3f}")
