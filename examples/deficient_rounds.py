"""
Rounds of reinforced fine-tuning on what a policy does worst: the rows of highest loss, a few answers to each from
several points of the worked solution, pairs by a verifier, SimPO. Started again, it goes on after the last round.

    python examples/deficient_rounds.py
    python examples/deficient_rounds.py --rounds 4 --samples 8 --output-dir runs/deficient
"""

# %%
import argparse
import random
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl.experimental.cpo import CPOConfig, CPOTrainer

from hf_effi.callbacks import SamplerCallback
from hf_effi.data import ModelScore
from hf_effi.demo import toy
from hf_effi.functional.data import deficient_rows, preference_pairs
from hf_effi.samplers import QualityAscendingSampler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--samples", type=int, default=6, help="answers to each deficient row")
parser.add_argument("--max-steps", type=int, default=4, help="updates of the warm-up, and of each round")
parser.add_argument("--output-dir", default=None, help="a temporary folder by default")
args = parser.parse_args()
folder = Path(args.output_dir or tempfile.mkdtemp(prefix="hf_effi_"))

# %% Problems and their worked solutions, as rows of token ids
demo = toy(size=32)
tokenizer, settings = demo.tokenizer, {**demo.cpu_args, "max_steps": args.max_steps, "learning_rate": 1e-3}
problems = [(text[: text.index("=") + 1], text[text.index("=") + 1 :]) for text in demo.texts["text"]]


def tokenized(prompt: str, answer: str) -> dict[str, list[int]]:
    asked, said = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": asked + said, "labels": [-100] * len(asked) + said}


def value(answer: str, gold: str) -> float:
    """The verifier: the share of the worked solution that an answer begins with, from -1 to 1."""
    right = next((place for place, pair in enumerate(zip(answer, gold)) if pair[0] != pair[1]), len(gold))  # noqa: B905
    return 2 * min(right, len(answer)) / len(gold) - 1


rows = [tokenized(*problem) for problem in problems]

# %% Where a run before ended; else a warm-up, easy to hard
done = sorted(int(path.name.split("-")[1]) for path in folder.glob("round-*"))
model = AutoModelForCausalLM.from_pretrained(folder / f"round-{done[-1]}") if done else demo.model
if not done:
    easy_first = SamplerCallback(QualityAscendingSampler([-len(row["input_ids"]) for row in rows]))
    config = TrainingArguments(str(folder / "warm-up"), lr_scheduler_type="constant", **settings)
    Trainer(model, config, DataCollatorForSeq2Seq(tokenizer), rows, callbacks=[easy_first]).train()

# %% Rounds
history, rng = [], random.Random(len(done))
for number in range(len(done) + 1, args.rounds + 1):
    losses, pairs = ModelScore(model)({name: [row[name] for row in rows] for name in rows[0]}), []
    chosen = deficient_rows(losses, [gold.count("=") > 1 for _, gold in problems], ratio=0.3)
    for prompt, gold in (problems[row] for row in chosen.tolist()):
        prompt, gold = prompt + gold[: (cut := rng.randrange(len(gold) // 2 + 1))], gold[cut:]
        asked = tokenizer([prompt] * args.samples, return_tensors="pt")
        made = model.generate(**asked, do_sample=True, temperature=1.5, max_new_tokens=len(gold) + 1)
        answers = tokenizer.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        found = preference_pairs(answers, [value(answer, gold) for answer in answers], floor=-1.0)
        pairs += [{"prompt": prompt, "chosen": answers[a], "rejected": answers[b]} for a, b in found]
    simpo = CPOConfig(str(folder / "simpo"), loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, beta=2.5, **settings)
    trainer = CPOTrainer(model, args=simpo, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(folder / f"round-{number}")
    history.append((len(chosen), len(pairs), float(losses.mean())))
    print(f"round {number}: loss {history[-1][2]:.2f} before it; {len(chosen)} deficient rows, {len(pairs)} pairs")
