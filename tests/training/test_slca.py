"""SLCA through `train()`: two tasks in a row, then the alignment."""

from __future__ import annotations

import torch
from transformers import Trainer, TrainingArguments

from hf_effi.recipes import ClassGaussians, align_classifier, class_features, slca
from tests.unit.test_slca import FAMILIES, batch


def test_two_tasks_through_a_trainer(tmp_path):
    """The backbone learns a hundred times slower, and alignment brings back what the second task pushed out."""
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        max_steps=20, per_device_train_batch_size=16, learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES["decoder"]()
    store = ClassGaussians(0.1)
    for classes in ([0, 1], [2, 3]):
        given = batch(classes)
        rows = [{name: value[i] for name, value in given.items()} for i in range(16)]
        trainer = Trainer(model, args, train_dataset=rows, **slca(model, 0.1))
        trainer.train()
        lrs = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert lrs.pop("depth0") == 0.1 and set(lrs.values()) == {0.001}
        store.add(*class_features(trainer.model, trainer.get_train_dataloader()))
    both = batch([0, 1, 2, 3])

    def accuracy():
        with torch.no_grad():
            return float((model.eval()(**both).logits.argmax(1) == both["labels"]).float().mean())

    before = accuracy()
    align_classifier(model, store, both, epochs=10, learning_rate=0.1)
    assert before <= 0.75 < accuracy()
