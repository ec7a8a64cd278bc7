"""
Faster layers in a model that stays yours: LoRA projections that share an input are computed together.

`patch` checks each replacement against the layer it replaces when it is applied, and undoes all of it at the end of
the `with` block. The loss and the gradients are the same up to rounding; the input of q, k and v is kept once.

    python examples/fused_lora.py
    python examples/fused_lora.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --max-steps 100
"""

# %%
import argparse
import tempfile

from datasets import load_dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from hf_effi import patch
from hf_effi.demo import toy
from hf_effi.kernels import FusedLoRALinear

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument(
    "--dataset", default="trl-lib/Capybara", help="used with --model; any format that SFTTrainer takes"
)
parser.add_argument("--max-steps", type=int, default=3)
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
output_dir = args.output_dir or tempfile.mkdtemp(prefix="hf_effi_")


# %% A stock SFTTrainer with LoRA
def make_trainer():
    set_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if args.model:
        config = SFTConfig(output_dir, max_steps=args.max_steps, logging_steps=1)
        return SFTTrainer(
            args.model, config, train_dataset=load_dataset(args.dataset, split="train"), peft_config=lora
        )
    demo = toy()
    config = SFTConfig(output_dir, **{**demo.cpu_args, "max_steps": args.max_steps, "learning_rate": 1e-2})
    return SFTTrainer(demo.model, config, train_dataset=demo.texts, processing_class=demo.tokenizer, peft_config=lora)


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


# %% Once as it is, once patched
stock = make_trainer()
stock.train()
patched = make_trainer()
with patch(patched.model, {"LoRALinear": FusedLoRALinear()}) as handle:
    report = str(handle)
    patched.train()

# %% What it did
print(report)
print("loss as it is:", " ".join(f"{loss:.4f}" for loss in losses(stock)))
print("loss patched: ", " ".join(f"{loss:.4f}" for loss in losses(patched)))
