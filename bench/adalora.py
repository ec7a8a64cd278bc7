"""AdaLoRA with and without its rank allocation, beside LoRA, at an equal rank budget.

    python -m bench.adalora

A decoder of 115,008 parameters is trained on the bytes of Python's standard library and then adapted, by the stock
Trainer, to another kind of text that every Python carries: the language reference in `pydoc_data/topics.py`. Each arm
tunes its own learning rate, over the same values, on a seed that is not counted; arms share data order within a seed.
"""

from __future__ import annotations

import statistics
import sysconfig
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from bench._progress import with_line
from bench._schema import command_line, headline, write_result
from bench.schedules import BATCH, LENGTH, Data, build, train
from hf_effi.callbacks.adalora import AdaLoRACallback
from hf_effi.functional import schedules as S

TARGET, INITIAL = 2, 3
PRETRAIN_UPDATES, UPDATES = 720, 300
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS, TUNING_SEED = (0, 1, 2), 100
COMMON: dict[str, Any] = {"target_modules": "all-linear", "lora_alpha": 16, "task_type": "CAUSAL_LM"}
PHASES = {"tinit": 30, "tfinal": 90, "deltaT": 5, "total_step": UPDATES}

#: arm -> PEFT config, whether the callback is on
ARMS: dict[str, tuple[LoraConfig, bool]] = {
    f"LoRA, rank {TARGET}": (LoraConfig(r=TARGET, **COMMON), False),
    f"AdaLoRA, rank {TARGET}, never moved": (
        AdaLoraConfig(init_r=TARGET, target_r=TARGET, **PHASES, **COMMON),
        False,
    ),
    f"AdaLoRA, rank {INITIAL}, never moved": (
        AdaLoraConfig(init_r=INITIAL, target_r=TARGET, **PHASES, **COMMON),
        False,
    ),
    f"AdaLoRA, {INITIAL} to {TARGET}, AdaLoRACallback": (
        AdaLoraConfig(init_r=INITIAL, target_r=TARGET, **PHASES, **COMMON),
        True,
    ),
}


class ReferenceData(Data):
    """Crops of the language reference; characters outside ASCII are dropped, as the model knows 128 of them."""

    def __init__(self) -> None:
        text = (Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py").read_bytes()
        data = torch.frombuffer(bytearray(b for b in text if b < 128), dtype=torch.uint8).long()
        cut = int(len(data) * 0.9)
        self.train, self.valid = data[:cut], data[cut:]
        self.held_out = self._crops(self.valid, 384, torch.Generator().manual_seed(12345))


def final_ranks(model: torch.nn.Module) -> list[int]:
    """Return the number of directions in use of each adapted matrix."""
    singular = [p for n, p in model.named_parameters() if "lora_E" in n]
    if singular:
        return [int((p != 0).sum()) for p in singular]
    return [p.size(0) for n, p in model.named_parameters() if "lora_A" in n]


def adapt(data: ReferenceData, weights: dict[str, torch.Tensor], arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Adapt the pre-trained model with one arm; return the held-out loss and the ranks it ended with."""
    config, moved = ARMS[arm]
    base = build(seed)
    base.load_state_dict(weights)
    torch.manual_seed(seed)
    model = get_peft_model(base, type(config)(**_fields(config)))
    rows = [{"input_ids": row, "labels": row} for step in range(UPDATES) for row in data.batch(seed, step).unbind()]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_steps=UPDATES,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            learning_rate=lr,
            warmup_steps=15,
            seed=seed,
        )
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[AdaLoRACallback()] if moved else [])
        with_line(trainer, f"{arm}, lr {lr:g}, seed {seed}").train()
    model.eval()
    with torch.no_grad():  # of the base model: AdaLoRA's own forward adds its orthogonality penalty
        loss = model.base_model.model(data.held_out, labels=data.held_out).loss.item()
    return {"arm": arm, "learning_rate": lr, "seed": seed, "loss": round(loss, 5), "ranks": final_ranks(model)}


def _fields(config: LoraConfig) -> dict[str, Any]:
    """PEFT completes a config in place, so every run gets its own."""
    names = {*COMMON, *({"r"} if type(config) is LoraConfig else {"init_r", "target_r", *PHASES})}
    return {name: getattr(config, name) for name in names}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    source, data = Data(), ReferenceData()
    trained = train(source, S.wsd(PRETRAIN_UPDATES, warmup_fraction=0.05), 4e-3, 0)
    weights = trained["state"]["model"]
    before = build(0)
    before.load_state_dict(weights)
    rows = [{"arm": "before adapting", "loss": round(data.loss(before), 5), "source_loss": trained["loss"]}]
    for arm in ARMS:
        tuning = {lr: adapt(data, weights, arm, lr, TUNING_SEED)["loss"] for lr in LEARNING_RATES}
        best = min(tuning, key=tuning.__getitem__)
        for seed in SEEDS:
            rows.append({**adapt(data, weights, arm, best, seed), "tuning": tuning})
            print(rows[-1], flush=True)

    def losses(arm: str) -> list[float]:
        return [row["loss"] for row in rows if row["arm"] == arm]

    lora, flat, wide, moved = ARMS
    matrices = len(rows[-1]["ranks"])
    budget = [sum(row["ranks"]) for row in rows if row["arm"] == moved]
    write_result(
        "adalora",
        command=command_line("bench.adalora"),
        seeds=SEEDS,
        headline=[
            headline("final_rank_budget", max(budget), f"= {TARGET * matrices}"),
            headline("final_rank_budget_without_callback", sum(next(r["ranks"] for r in rows if r["arm"] == wide))),
            *(
                headline(
                    f"loss_minus_{name}", round(statistics.fmean(losses(moved)) - statistics.fmean(losses(arm)), 4)
                )
                for name, arm in (("lora", lora), ("unmoved_equal_rank", flat), ("unmoved_initial_rank", wide))
            ),
        ],
        rows=[{**row, "tokens_per_update": BATCH * LENGTH} for row in rows],
    )


if __name__ == "__main__":
    main()
