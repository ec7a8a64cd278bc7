"""
A curriculum: rows in the order of a score, easy first, with a sampler that resumes exactly.

The score here is the number of different tokens of a row; any number per row does (loss, length, a judge's mark).

    python examples/curriculum.py
    python examples/curriculum.py --model Qwen/Qwen3-0.6B --dataset roneneldan/TinyStories --max-steps 500
"""

# %%
import argparse
import tempfile

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from hf_effi import EffiTrainer, EffiTrainingArguments
from hf_effi.demo import toy
from hf_effi.samplers import QualityAscendingSampler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument("--dataset", default="roneneldan/TinyStories", help="used with --model; needs a `text` column")
parser.add_argument("--max-steps", type=int, default=8)
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
output_dir = args.output_dir or tempfile.mkdtemp(prefix="hf_effi_")

# %% Model and data
if args.model:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)
    rows = load_dataset(args.dataset, split="train[:10000]")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=["text"])
    collate, settings = DataCollatorForLanguageModeling(tokenizer, mlm=False), {"logging_steps": 1}
else:
    demo = toy()
    model, rows, settings = demo.model, Dataset.from_list(demo.tokens), demo.cpu_args
    collate = DataCollatorForLanguageModeling(demo.tokenizer, mlm=False)

# %% A score per row, and the sampler that follows it
scores = [len(set(ids)) for ids in rows["input_ids"]]
seen = []


def watch(batch):
    """Collate, and note how many different tokens the rows of this batch have."""
    seen.append(sum(len(set(row["input_ids"])) for row in batch) / len(batch))
    return collate(batch)


settings = {**settings, "max_steps": args.max_steps, "lr_scheduler_type": "constant"}
trainer = EffiTrainer(
    model,
    EffiTrainingArguments(output_dir, **settings),
    train_dataset=rows,
    data_collator=watch,
    train_sampler=QualityAscendingSampler(scores),
)
trainer.train()

# %% What it did
print("different tokens per row, batch by batch:", " ".join(f"{mean:.1f}" for mean in seen[: args.max_steps]))
