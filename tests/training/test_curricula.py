"""
Each curriculum through `trainer.train()`: the predicted order, and stop-and-resume equal to the uninterrupted run.
"""

import pytest
import torch

from hf_effi.callbacks.sampler import SamplerCallback
from hf_effi.data import RowCorrect, RowLoss
from hf_effi.functional.data import pass_rate_difficulty
from hf_effi.samplers import (
    AbilitySampler,
    CompetenceSampler,
    CyclicalSampler,
    InterleavedSampler,
    MixtureSampler,
    QualityAscendingSampler,
    ReplaySampler,
    SelfPacedSampler,
    ShuffledSampler,
)
from tests.helpers import compare_runs, grpo_args, lm_dataset, run_grpo, tiny_qwen3
from tests.helpers.sampling import sampler_trainer, stop_and_resume

#: these tests look at the order; what it is worth under a decay is the business of tests/training/test_recipes.py
pytestmark = pytest.mark.filterwarnings("ignore::hf_effi.errors.DecayToZeroWarning")

ROWS = 24
SCORES = torch.rand(ROWS, generator=torch.Generator().manual_seed(1))


def collate(batch):
    return {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}


def self_paced():
    return SelfPacedSampler(ROWS, RowLoss(lm_dataset(ROWS, length=8), collate), share=0.5, share_step=0.25)


def ability():
    return AbilitySampler(SCORES * 4 - 2, RowCorrect(lm_dataset(ROWS, length=8), collate), min_rows=6)


PLANS = {
    "quality": (lambda: QualityAscendingSampler(SCORES, buckets=4), 1),
    "interleaved": (lambda: InterleavedSampler([i % 3 for i in range(ROWS)], [i % 2 for i in range(ROWS)]), 1),
    "competence": (lambda: CompetenceSampler(SCORES, 48, start=0.2), 1),
    "mixture": (lambda: MixtureSampler("ab" * 12, [(0.0, {"a": 3, "b": 1}), (0.5, {"b": 1})], block=4), 1),
    "replay": (lambda: ReplaySampler([i < 8 for i in range(ROWS)], rate=0.25, block=4), 1),
    "cyclical": (lambda: CyclicalSampler(SCORES + 0.1, total_epochs=2), 1),
}


@pytest.mark.parametrize("name", sorted(PLANS))
def test_static_curricula_are_served_and_resumed(tmp_path, name):
    build, epochs = PLANS[name]
    sampler = build()

    def make(folder, callbacks):
        return sampler_trainer(folder, callbacks=callbacks, train_sampler=build(), num_train_epochs=epochs)

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=3)
    order = list(sampler)
    assert one == two == [order[i : i + 4] for i in range(0, len(order), 4)]
    assert whole.global_step == -(-len(sampler) // 4)
    compare_runs(whole, broken)


def test_quality_ascending_as_a_callback_serves_ascending_scores(tmp_path):
    from transformers import Trainer

    callback = SamplerCallback(QualityAscendingSampler(SCORES))
    trainer = sampler_trainer(tmp_path, Trainer, callbacks=[callback], num_train_epochs=1)
    trainer.train()
    served = [row for batch in trainer.seen for row in batch]
    assert bool((SCORES[served].diff() >= 0).all())
    assert sorted(served) == list(range(ROWS))


def test_self_paced_trains_on_what_is_easy_now(tmp_path):
    trainer = sampler_trainer(tmp_path, train_sampler=self_paced(), num_train_epochs=1)
    before = RowLoss(lm_dataset(ROWS, length=8), collate)(tiny_qwen3(num_hidden_layers=1), list(range(ROWS)))
    trainer.train()
    assert {row for batch in trainer.seen for row in batch} == set(before.argsort()[:12].tolist())


@pytest.mark.parametrize("build", [self_paced, ability], ids=["self_paced", "ability"])
@pytest.mark.parametrize("step", [6, 9])  # at the border of two epochs, and in the middle of epoch 2
def test_learned_curricula_resume(tmp_path, build, step):
    def make(folder, callbacks):
        return sampler_trainer(folder, callbacks=callbacks, train_sampler=build())

    whole, broken, (one, two) = stop_and_resume(tmp_path, make, step=step)
    assert one == two
    assert [len(batch) for batch in one] == [4] * 18
    compare_runs(whole, broken)


def test_measuring_leaves_random_numbers_and_training_mode_alone(tmp_path):
    """A sampler that measures but keeps every row in a fixed order gives the weights of one that does not measure."""

    class Watching(SelfPacedSampler):
        modes = ()

        def order(self, epoch):
            return ShuffledSampler(ROWS).order(epoch)

    def measure(model, rows):
        Watching.modes = (*Watching.modes, model.training, torch.is_grad_enabled())
        return torch.rand(len(rows))

    plain = sampler_trainer(tmp_path, train_sampler=ShuffledSampler(ROWS))
    plain.train()
    watching = sampler_trainer(tmp_path, train_sampler=Watching(ROWS, measure, share=1.0))
    watching.train()
    assert Watching.modes == (False, False) * 3
    compare_runs(plain, watching)


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_easy_prompts_first_in_grpo(tmp_path, way):
    from trl import GRPOTrainer

    from hf_effi.trainers.mixins.sampler import SamplerMixin

    class Noting(SamplerMixin, GRPOTrainer):
        seen = ()

        def _generate_and_score_completions(self, inputs):
            self.seen = (*self.seen, *[int(row["prompt"].split(":")[0]) for row in inputs])
            return super()._generate_and_score_completions(inputs)

    difficulty = pass_rate_difficulty(list(range(16)), [16] * 16)
    sampler = QualityAscendingSampler(difficulty)
    given = {"train_sampler": sampler} if way == "mixin" else {"callbacks": [SamplerCallback(sampler)]}
    trainer = run_grpo(Noting, grpo_args(tmp_path), **given)
    assert trainer.seen == (15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10)
