"""
A model card that carries the whole recipe, and the way back from the card to a run.

Without `--push` the card is written to the output folder and read from there; nothing leaves this machine.

    python examples/push_to_hub.py
    python examples/push_to_hub.py --push --hub-model-id me/my-run     # after `hf auth login`
"""

# %%
import argparse
import tempfile

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_effi import EffiSFTConfig, EffiSFTTrainer, from_card
from hf_effi.demo import toy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a model of the Hub or a folder; without it a tiny random one")
parser.add_argument(
    "--dataset", default="trl-lib/Capybara", help="used with --model; any format that SFTTrainer takes"
)
parser.add_argument("--max-steps", type=int, default=3)
parser.add_argument("--push", action="store_true", help="push model, card and record to the Hub")
parser.add_argument("--hub-model-id", help="with --push: user/name")
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
if args.push and not args.hub_model_id:
    parser.error("--push needs --hub-model-id user/name")
output_dir = args.output_dir or tempfile.mkdtemp(prefix="hf_effi_")


# %% Model and data
def load():
    if not args.model:
        demo = toy()
        return demo.model, demo.tokenizer, demo.texts, demo.cpu_args
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset(args.dataset, split="train[:1000]")
    return AutoModelForCausalLM.from_pretrained(args.model), tokenizer, rows, {"logging_steps": 1}


# %% Train, then write the card or push it with the model
model, tokenizer, rows, settings = load()
settings = {**settings, "max_steps": args.max_steps, "learning_rate": 1e-3, "hub_model_id": args.hub_model_id}
config = EffiSFTConfig(output_dir, lr_schedule="wsd", **settings)
trainer = EffiSFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
trainer.train()
if args.push:
    trainer.push_to_hub()
else:
    trainer.create_model_card()

# %% From the card back to a trainer, and the same run again
recipe = from_card(args.hub_model_id if args.push else output_dir, output_dir=f"{output_dir}/again")
print(f"The card of {output_dir} says: {recipe.trainer_class.__name__}, methods {recipe.data['methods']}")
print("to be passed by hand:", recipe.missing or "nothing but model and data")
model, tokenizer, rows, _ = load()
again = recipe.make_trainer(model, train_dataset=rows, processing_class=tokenizer)
again.train()

# %% What it did
for name, run in (("first run", trainer), ("from card", again)):
    print(name, *(f"{float(entry['loss']):.4f}" for entry in run.state.log_history if "loss" in entry))
