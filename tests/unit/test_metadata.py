import pytest
import torch

from hf_effi.data.metadata import MetadataCollator, MetadataConditioning
from hf_effi.functional.data import cooldown_step, domain_of, join_metadata, seeded

BOS, EOS, PAD = 1, 2, 0


def joined(where="prepend", max_length=None, rows=None, **marks):
    rows = rows or [
        {"input_ids": [BOS, 11, 12, EOS], "metadata_ids": [31, 32]},
        {"input_ids": [21], "metadata_ids": [33]},
        {"input_ids": [BOS, 13, EOS], "metadata_ids": None},
    ]
    marks = marks or {"bos_token_id": BOS, "eos_token_id": EOS}
    collator = MetadataCollator(PAD, max_length=max_length, **marks)
    out = MetadataConditioning(collator, where, cooldown_fraction=0)(collator(rows), 0, 1, seeded(0))
    return {key: value.tolist() for key, value in out.items()}


def test_prepend_by_hand():
    assert joined() == {
        "input_ids": [[BOS, 31, 32, 11, 12, EOS], [33, 21, 0, 0, 0, 0], [BOS, 13, EOS, 0, 0, 0]],
        "attention_mask": [[1] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]],
        "labels": [[-100, -100, -100, 11, 12, EOS], [-100, 21] + [-100] * 4, [BOS, 13, EOS, -100, -100, -100]],
    }


def test_append_by_hand():
    out = joined("append")
    assert out["input_ids"] == [[BOS, 11, 12, 31, 32, EOS], [21, 33, 0, 0, 0, 0], [BOS, 13, EOS, 0, 0, 0]]
    assert out["labels"] == [[BOS, 11, 12, 31, 32, EOS], [21, 33] + [-100] * 4, [BOS, 13, EOS, -100, -100, -100]]


def test_without_marks_metadata_is_first_or_last():
    assert joined(bos_token_id=None)["input_ids"][0] == [31, 32, BOS, 11, 12, EOS]
    assert joined("append", eos_token_id=None)["input_ids"][0] == [BOS, 11, 12, EOS, 31, 32]


def test_labels_of_the_dataset_are_kept():
    rows = [{"input_ids": [BOS, 11, 12], "labels": [-100, -100, 12], "metadata_ids": [31]}]
    assert joined(rows=rows)["labels"] == [[-100, -100, -100, 12]]
    assert joined("append", rows=rows)["labels"] == [[-100, -100, 12, 31]]


@pytest.mark.parametrize("where", ["prepend", "append"])
def test_metadata_is_cut_to_a_quarter_and_text_to_the_rest(where):
    rows = [{"input_ids": [BOS, *range(10, 30)], "metadata_ids": list(range(40, 60))}]
    ids = joined(where, max_length=8, rows=rows)["input_ids"][0]
    text = [BOS, 10, 11, 12, 13, 14]
    assert ids == ([BOS, 40, 41, *text[1:]] if where == "prepend" else [*text, 40, 41])


def test_every_length_keeps_every_token_in_order():
    for text in range(1, 6):
        for extra in range(4):
            rows = [{"input_ids": list(range(10, 10 + text)), "metadata_ids": list(range(30, 30 + extra))}]
            out = joined(rows=rows)["input_ids"][0]
            assert out == [*rows[0]["metadata_ids"], *rows[0]["input_ids"]]


def test_dropout_leaves_plain_rows_and_is_seeded():
    collator = MetadataCollator(PAD)
    batch = collator([{"input_ids": [5, 6], "metadata_ids": [9]}] * 4000)
    half = MetadataConditioning(collator, dropout=0.5, cooldown_fraction=0)
    once, again, other = (half(batch, 0, 1, seeded(0, k))["input_ids"] for k in (0, 0, 1))
    share = (once[:, 0] == 9).double().mean().item()
    assert 0.47 < share < 0.53
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert once[once[:, 0] == 5].unique(dim=0).tolist() == [[5, 6, 0]]
    never = MetadataConditioning(collator, dropout=1.0, cooldown_fraction=0)(batch, 0, 1, seeded(0))
    assert torch.equal(never["input_ids"], batch["input_ids"])


def test_the_switch():
    assert [cooldown_step(10, f) for f in (0, 0.1, 0.25, 0.7, 0.9, 1)] == [10, 9, 8, 3, 1, 0]
    assert cooldown_step(100, 0.29) == 71 and cooldown_step(0, 0.5) == 0 and cooldown_step(40000, 0.1) == 36000
    collator = MetadataCollator(PAD)
    batch = collator([{"input_ids": [5, 6], "metadata_ids": [9]}])
    meco = MetadataConditioning(collator, cooldown_fraction=0.25)
    shapes = [tuple(meco(batch, step, 4, seeded(0))["input_ids"].shape) for step in range(4)]
    assert shapes == [(1, 3), (1, 3), (1, 3), (1, 2)]
    assert [meco.metrics(step, 4)["effi/metadata"] for step in range(4)] == [1, 1, 1, 0]


def test_rows_without_any_metadata_stay_plain():
    rows = [{"input_ids": [5, 6], "metadata_ids": []}]
    assert joined(rows=rows)["input_ids"] == [[5, 6]]


def test_domains():
    assert domain_of("http://user:pw@A.org:80/x?q#f") == "a.org"
    assert domain_of("//b.org/x") == "b.org" and domain_of("c.org") == "c.org" and domain_of("") == ""


def test_refusals():
    collator = MetadataCollator(PAD)
    one = torch.ones(1, 1, dtype=torch.long)
    for call, message in (
        (lambda: collator([{"input_ids": [1]}]), "No row has metadata_ids"),
        (lambda: collator([{"input_ids": [], "metadata_ids": [1]}]), "has no token"),
        (lambda: collator([{"input_ids": [1], "metadata_ids": [], "position_ids": [0]}]), "position_ids.*packed"),
        (lambda: MetadataCollator(-1), "pad_token_id=-1"),
        (lambda: MetadataCollator(0, max_length=3), "max_length=3"),
        (lambda: MetadataConditioning(None), "must be the MetadataCollator"),
        (lambda: MetadataConditioning(collator, "before"), "where='before'"),
        (lambda: MetadataConditioning(collator, dropout=1.5), "dropout=1.5"),
        (lambda: MetadataConditioning(collator, cooldown_fraction=float("nan")), "cooldown_fraction=nan"),
        (lambda: MetadataConditioning(collator)({"input_ids": one}, 0, 1, seeded(0)), "no metadata_ids"),
        (lambda: join_metadata(one, one, one[0], one, one[0], "in"), "where='in'"),
        (lambda: cooldown_step(-1, 0.1), "total_steps=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
