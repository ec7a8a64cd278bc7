"""
A model that learned to copy: the probe finds the heads, rows with repeats score high, and the scores order training.
"""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from hf_effi.data import AttentionInfluence, add_score, copy_head_scores, masked_heads, retrieval_heads
from hf_effi.errors import MismatchError
from hf_effi.functional.data import copy_probe
from hf_effi.samplers import QualityAscendingSampler
from tests.helpers import compare_runs, tiny_llama
from tests.helpers.sampling import sampler_trainer, stop_and_resume

TOKENS = range(4, 28)
ROWS = 12


@pytest.fixture(scope="module")
def copier():
    """A model of two layers, trained on repeats of changing length until its second layer copies."""
    model = tiny_llama(0, hidden_size=64, head_dim=16, intermediate_size=32, initializer_range=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(400):
        rows = copy_probe(32, 6 + step * 7 % 10, TOKENS, seed=1000 + step)
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def rows_of_both_kinds():
    """Half the rows repeat their first half, half are random."""
    repeats = copy_probe(ROWS // 2, 10, TOKENS, seed=1)
    others = torch.randint(4, 28, (ROWS // 2, 20), generator=torch.Generator().manual_seed(1))
    rows = torch.cat([repeats, others]).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "row": list(range(ROWS))})


def scored(model, heads, folder):
    return add_score(
        rows_of_both_kinds(), "influence", AttentionInfluence(model, heads), cache_dir=folder, shard_size=5
    )


def test_the_probe_finds_the_layer_that_copies(copier):
    scores = copy_head_scores(copier, length=10, token_ids=TOKENS)
    assert min(scores[1, head] for head in range(4)) > 3 * max(scores[0, head] for head in range(4))
    heads = retrieval_heads(copier, share=0.5, length=10, token_ids=TOKENS)
    assert heads == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_rows_with_repeats_score_higher_than_random_rows(copier, tmp_path):
    heads = retrieval_heads(copier, share=0.5, length=10, token_ids=TOKENS)
    found = torch.tensor(scored(copier, heads, tmp_path)["influence"][:])
    repeats, others = found[: ROWS // 2], found[ROWS // 2 :]
    assert repeats.min() > others.max()
    assert repeats.mean() > 0.1 > others.mean().abs()


def test_the_influence_is_that_of_the_copying_half(copier):
    probe = copy_probe(8, 10, TOKENS, seed=2)
    labels = probe.clone()
    labels[:, :10] = -100
    with torch.no_grad():
        base = copier(input_ids=probe, labels=labels).loss
        with masked_heads(copier, [(1, head) for head in range(4)]):
            without = copier(input_ids=probe, labels=labels).loss
    assert without > 1.3 * base


def test_scores_are_cached_by_model_and_heads(copier, tmp_path, monkeypatch):
    forwarded = []
    call = AttentionInfluence.__call__
    monkeypatch.setattr(AttentionInfluence, "__call__", lambda self, batch: forwarded.append(1) or call(self, batch))
    data = scored(copier, [(1, 0)], tmp_path)
    assert len(forwarded) == 3  # shards of 5, 5 and 2 rows
    assert scored(copier, [(1, 0)], tmp_path)["influence"][:] == data["influence"][:] and len(forwarded) == 3
    assert scored(copier, [(1, 1)], tmp_path)["influence"][:] != data["influence"][:] and len(forwarded) == 6
    with pytest.raises(MismatchError, match="another fingerprint"):
        add_score(data, "influence", AttentionInfluence(copier, [(1, 1)]), cache_dir=tmp_path)
    before = copier.model.layers[1].self_attn.o_proj.weight.data.clone()
    copier.model.layers[1].self_attn.o_proj.weight.data[0, 0] += 1e-3
    scored(copier, [(1, 0)], tmp_path)
    copier.model.layers[1].self_attn.o_proj.weight.data.copy_(before)
    assert len(forwarded) == 9


@pytest.mark.filterwarnings("ignore::hf_effi.errors.DecayToZeroWarning")
def test_training_on_the_scores_serves_random_rows_first_and_resumes(copier, tmp_path):
    heads = retrieval_heads(copier, share=0.5, length=10, token_ids=TOKENS)
    data = scored(copier, heads, tmp_path / "scores")

    def make(folder, callbacks):
        sampler = QualityAscendingSampler(data["influence"][:])
        return sampler_trainer(
            folder, train_dataset=data, train_sampler=sampler, num_train_epochs=1, callbacks=callbacks
        )

    whole, broken, (wanted, seen) = stop_and_resume(tmp_path / "runs", make, step=2)
    compare_runs(whole, broken)
    assert seen == wanted
    served = [row for batch in wanted for row in batch]
    assert set(served[: ROWS // 2]) == set(range(ROWS // 2, ROWS))
