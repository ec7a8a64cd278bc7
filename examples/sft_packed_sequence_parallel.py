"""
SFT on packed rows, each split over several ranks: long sequences without DeepSpeed, with the loss of one rank.

`register_varlen_attention` keeps the documents of a packed row apart without the flash-attn package.

    python examples/sft_packed_sequence_parallel.py
    torchrun --nproc_per_node 2 examples/sft_packed_sequence_parallel.py --sequence-parallel-size 2
    torchrun --nproc_per_node 2 examples/sft_packed_sequence_parallel.py --sequence-parallel-size 2 \
        --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --max-length 16384
"""

# %%
import argparse
import tempfile

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_effi import EffiSFTConfig, EffiSFTTrainer
from hf_effi.attention import register_varlen_attention
from hf_effi.demo import toy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument(
    "--dataset", default="trl-lib/Capybara", help="used with --model; any format that SFTTrainer takes"
)
parser.add_argument("--max-steps", type=int, default=3)
parser.add_argument("--max-length", type=int, default=64, help="tokens of a packed row")
parser.add_argument("--sequence-parallel-size", type=int, default=1, help="ranks that share a row")
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
output_dir = args.output_dir or tempfile.mkdtemp(prefix="hf_effi_")

# %% Model and data
attention = register_varlen_attention()
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation=attention)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, settings = load_dataset(args.dataset, split="train"), {"logging_steps": 1}
else:
    demo = toy()
    model, tokenizer, rows = demo.model, demo.tokenizer, demo.texts
    settings = {**demo.cpu_args, "per_device_train_batch_size": 2}
    model.set_attn_implementation(attention)

# %% Two arguments
config = EffiSFTConfig(
    output_dir,
    packing=True,
    max_length=args.max_length,
    sequence_parallel_size=args.sequence_parallel_size,
    **{**settings, "max_steps": args.max_steps},
)
trainer = EffiSFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
trainer.train()

# %% What it did
if trainer.is_world_process_zero():
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    print(f"{len(rows)} documents in {len(lengths)} rows of up to {max(lengths)} tokens")
    print(f"each row on {args.sequence_parallel_size} of {config.world_size} ranks")
    print("loss", *(f"{float(entry['loss']):.4f}" for entry in trainer.state.log_history if "loss" in entry))
