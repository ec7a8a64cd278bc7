"""SLCA's alignment by hand: Gaussians, their store, the last layer of two model families, and what changes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hf_effi.errors import BrokenFileError, MismatchError, RefusedError
from hf_effi.functional.class_gaussians import class_gaussian, normalized_logits, sample_gaussian
from hf_effi.recipes import ClassGaussians, align_classifier, class_features, slca
from tests.helpers import assert_bitwise_equal, weights_of

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 0, "num_labels": 4, "initializer_range": 0.4,
}  # fmt: skip
FAMILIES = {
    "decoder": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)),
    "encoder": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[request.param]().train()


def batch(classes, rows=16, seed=0):
    """Return ragged rows whose first token tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.arange(rows) % len(classes)]
    ids = torch.randint(10, 32, (rows, 6), generator=generator)
    ids[:, :3] = labels.unsqueeze(1) + 1
    real = torch.ones_like(ids)
    real[::2, 4:] = 0
    return {"input_ids": ids * real, "attention_mask": real, "labels": labels}


def test_gaussians_by_hand():
    mean, covariance = class_gaussian(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    assert mean.tolist() == [1.0, 2.0] and covariance.tolist() == [[1.0, 2.0], [2.0, 4.0]]
    _, shrunk = class_gaussian(torch.tensor([[0.0, 0.0], [2.0, 4.0]]), 1.0)
    assert shrunk.tolist() == [[2.5, 0.0], [0.0, 2.5]]
    _, one = class_gaussian(torch.tensor([[3.0, 4.0]]), 0.5)
    assert not one.any() and class_gaussian(torch.ones(5, 2))[1].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    for features, message in ((torch.zeros(0, 2), "at least one row"), (torch.tensor([[torch.nan]]), "not finite")):
        with pytest.raises(ValueError, match=message):
            class_gaussian(features)
    with pytest.raises(ValueError, match="shrinkage=2"):
        class_gaussian(torch.ones(1, 1), 2)


def test_samples_have_mean_and_covariance_also_where_it_is_singular():
    mean, covariance = torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    drawn = sample_gaussian(mean, covariance, 20_000, torch.Generator().manual_seed(0))
    again, spread = class_gaussian(drawn)
    assert torch.allclose(again.float(), mean, atol=0.05) and torch.allclose(spread.float(), covariance, atol=0.1)
    assert ((drawn - mean) @ torch.tensor([2.0, -1.0], dtype=torch.float64)).abs().max() < 1e-6


def test_normalised_logits():
    assert normalized_logits(torch.tensor([[3.0, 4.0]]), 0.1).tolist() == [[6.0, 8.0]]
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(normalized_logits(logits), normalized_logits(100 * logits))
    with pytest.raises(ValueError, match="temperature=0"):
        normalized_logits(logits, 0.0)


def test_the_store(tmp_path):
    store = ClassGaussians(0.25)
    store.add(torch.tensor([[0.0, 0.0], [2.0, 4.0], [1.0, 1.0]]), torch.tensor([2, 2, 5]))
    store.add(torch.tensor([[7.0, 7.0]]), torch.tensor([0]))
    store.save(tmp_path / "classes.safetensors")
    again = ClassGaussians.load(tmp_path / "classes.safetensors")
    assert again.labels == store.labels == [0, 2, 5] and again.shrinkage == 0.25
    for label in store.labels:
        (mean, covariance, count), other = store.gaussians[label], again.gaussians[label]
        assert torch.equal(mean, other[0]) and torch.equal(covariance, other[1]) and count == other[2]
    features, labels = again.sample(3, torch.Generator().manual_seed(0))
    assert features.shape == (9, 2) and labels.tolist() == [0] * 3 + [2] * 3 + [5] * 3
    assert features[:3].tolist() == [[7.0, 7.0]] * 3
    with pytest.raises(MismatchError, match="Add each class once"):
        store.add(torch.zeros(1, 2), torch.tensor([5]))
    with pytest.raises(MismatchError, match="of 3"):
        store.add(torch.zeros(1, 3), torch.tensor([6]))
    with pytest.raises(ValueError, match="one integer for each"):
        store.add(torch.zeros(2, 2), torch.tensor([6]))


def test_files_of_others(tmp_path):
    (tmp_path / "torn").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    metadata = {"format": "hf_effi.class_gaussians.1", "shrinkage": "0.0"}
    parts = {"labels": torch.tensor([1]), "1.mean": torch.zeros(2), "1.count": torch.tensor(1)}
    save_file(parts, tmp_path / "part", metadata)
    save_file(parts | {"1.covariance": torch.zeros(3, 3)}, tmp_path / "size", metadata)
    for name, message in (
        ("none", "missing or damaged"),
        ("torn", "missing or damaged"),
        ("other", "holds no class Gaussians"),
        ("part", "missing or damaged"),
        ("size", "covariance of another size"),
    ):
        with pytest.raises(BrokenFileError, match=message):
            ClassGaussians.load(tmp_path / name)


def test_the_features_are_what_the_last_layer_is_given(model):
    given = batch([0, 1, 2])
    features, labels = class_features(model, [given])
    head = model.score if hasattr(model, "score") else model.classifier
    with torch.no_grad():
        logits = model.eval()(**given).logits
        assert torch.allclose(head(features), logits, atol=1e-6) and torch.equal(labels, given["labels"])
    model.train()
    class_features(model, [given])
    assert model.training


def test_only_the_rows_of_the_classes_change_and_they_learn(model):
    given = batch([0, 1, 3])
    store = ClassGaussians(0.1).add(*class_features(model, [given]))
    before, state = weights_of(model), torch.get_rng_state()
    losses = align_classifier(model, store, given, epochs=20, batch_size=64)
    assert torch.equal(torch.get_rng_state(), state) and losses[-1] < 0.5 * losses[0]
    after = weights_of(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("score", "classifier")) for name in changed)
    for name in changed:
        assert torch.equal(before[name][2], after[name][2])  # a class that no task had
    with torch.no_grad():
        logits = model.eval()(**given).logits[:, [0, 1, 3]]
    right = logits.argmax(1) == torch.searchsorted(torch.tensor([0, 1, 3]), given["labels"])
    assert right.float().mean() > 0.9


def test_the_same_seed_gives_the_same_head(model):
    given, states = batch([0, 1]), []
    store = ClassGaussians(0.1).add(*class_features(model, [given]))
    start = weights_of(model)
    for seed in (1, 1, 2):
        model.load_state_dict(start)
        align_classifier(model, store, given, epochs=1, samples_per_class=4, batch_size=3, seed=seed)
        states.append(weights_of(model))
    assert_bitwise_equal(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in start)


def test_what_is_refused(model):
    given = batch([0, 1])
    store = ClassGaussians().add(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(MismatchError, match=r"have \[3\] features"):
        align_classifier(model, store, given)
    with pytest.raises(MismatchError, match=r"of classes \[\]"):
        align_classifier(model, ClassGaussians(), given)
    store = ClassGaussians().add(torch.zeros(1, 16), torch.tensor([4]))
    with pytest.raises(MismatchError, match="to 4 classes"):
        align_classifier(model, store, given)
    for over in ({"epochs": 0}, {"learning_rate": 0.0}, {"momentum": 1.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=next(iter(over))):
            align_classifier(model, store, given, **over)
    with pytest.raises(ValueError, match="needs labels"):
        class_features(model, [{**given, "labels": torch.zeros(16)}])
    with pytest.raises(ValueError, match="batches is empty"):
        class_features(model, [])
    regression = LlamaForSequenceClassification(LlamaConfig(**{**SIZES, "num_labels": 1}))
    with pytest.raises(RefusedError, match="it is a regression"):
        class_features(regression, [given])
    with pytest.raises(ValueError, match="Name the classifier"):
        slca(model, 1e-3, head=["nothing"])
