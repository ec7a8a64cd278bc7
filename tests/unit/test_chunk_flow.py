import pytest
import torch

from hf_effi._compat import CACHE_ARGUMENTS, cache_argument
from hf_effi.errors import RefusedError
from hf_effi.functional.sequence import chunk_schedule, plan_chunks
from hf_effi.memory.chunk_flow import ChunkFlow, make_groups
from tests.helpers import tiny_gemma, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen3


def test_plan_by_hand():
    plan = plan_chunks([5, 2, 12, 4, 8, 3], chunk_size=8)
    assert plan.dependent == ((2, ((0, 8), (8, 12))),)
    # The longest first: 8 | 5 + 3 | 4 + 2.
    assert plan.standalone == ((4,), (0, 5), (3, 1))


def test_every_token_is_in_one_chunk():
    lengths = [(7 * i) % 23 + 1 for i in range(40)]
    for size in (1, 4, 9, 23, 100):
        plan = plan_chunks(lengths, size)
        assert sorted([i for members in plan.standalone for i in members] + [i for i, _ in plan.dependent]) == list(
            range(40)
        )
        assert all(sum(lengths[i] for i in members) <= size for members in plan.standalone)
        for i, bounds in plan.dependent:
            assert [end - start for start, end in bounds[:-1]] == [size] * (len(bounds) - 1)
            assert len(bounds) == -(-lengths[i] // size) > 1 and bounds[-1][1] == lengths[i]
    assert plan_chunks([], 4) == ((), ())


@pytest.mark.parametrize("max_live", [1, 2, 3, 9])
@pytest.mark.parametrize("num_chunks", [1, 2, 5])
def test_schedule_keeps_no_more_than_it_may(num_chunks, max_live):
    live, most, forwards, done = set(), 0, 0, []
    for action, index in chunk_schedule(num_chunks, max_live):
        forwards += action != "backward" or index not in live
        if action != "prefix":
            live.add(index)
            most = max(most, len(live))
        if action == "backward":
            live.remove(index)
            done.append(index)
    assert done == list(range(num_chunks))[::-1]
    assert most == min(num_chunks, max_live)
    assert forwards == num_chunks + max(0, num_chunks - max_live)


def batch(**over):
    ids = torch.arange(10, 20)[None]
    return {"input_ids": ids, "labels": ids.clone(), **over}


def test_labels_are_shifted_before_the_cut():
    (group,) = make_groups(batch(), 4)
    assert len(group) == 3
    assert group.tokens["shift_labels"].tolist() == [[*range(11, 20), -100]]
    assert [group.inputs(0)[name].tolist() for name in ("input_ids", "labels", "position_ids")] == [
        [[10, 11, 12, 13]],
        [[11, 12, 13, 14]],
        [[0, 1, 2, 3]],
    ]


def test_padding_and_rows_without_labels_go():
    rows = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [1, 2, 3, 4]]),
        "labels": torch.tensor([[5, 6, 7, -100], [8, 9, -100, -100], [-100] * 4]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]),
    }
    (group,) = make_groups(rows, 8)
    assert group.tokens["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert group.tokens["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert group.tokens["shift_labels"].tolist() == [[6, 7, -100, 9, -100]]
    assert not {*CACHE_ARGUMENTS} & {*group.inputs(0)} and group.inputs(0)["use_cache"] is False


def test_packed_rows_fall_into_their_segments():
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 0, 1]])
    long, short = make_groups(batch(position_ids=positions, cu_seq_lens_q=torch.tensor([0, 6, 8, 10])), 4)
    assert long.tokens["input_ids"].tolist() == [[10, 11, 12, 13, 14, 15]] and len(long) == 2
    assert long.tokens["shift_labels"][0, -1] == 16  # as the model would: across the segments, unless it is masked
    assert short.tokens["input_ids"].tolist() == [[16, 17, 18, 19]]


def test_a_batch_without_labels_leaves_one_token():
    (group,) = make_groups(batch(labels=torch.full((1, 10), -100)), 4)
    assert group.tokens["input_ids"].tolist() == [[10]] and group.tokens["shift_labels"].tolist() == [[-100]]


def losses_of(model, ids):
    """The summed loss of each chunk of a row, run one after the other as the Trainer does."""
    (group,) = make_groups({"input_ids": ids, "labels": ids}, 4, cache_argument(model.forward))
    found = []
    for index in range(len(group)):
        inputs = group.inputs(index)
        found.append(model(**inputs, num_items_in_batch=1).loss)
        group.ran(index, inputs[group.cache_name])
    return torch.stack(found)


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama, tiny_mistral, tiny_gemma, tiny_gpt2])
@torch.no_grad()
def test_a_chunk_uses_the_keys_of_the_chunks_before_it(make):
    model, ids = make().eval(), torch.arange(10, 20)[None]
    losses = losses_of(model, ids)
    torch.testing.assert_close(losses.sum(), model(input_ids=ids, labels=ids, num_items_in_batch=1).loss)
    other = torch.cat([ids[:, :3].flip(1), ids[:, 3:]], dim=1)
    assert ((losses_of(model, other) - losses)[1:].abs() > 1e-4).all(), "later chunks do not see the first"


@torch.no_grad()
def test_a_model_that_leaves_its_cache_alone_is_refused():
    """As one does that takes it in `**kwargs` under a name of another release."""
    model = tiny_qwen3().eval()
    forward = model.forward

    def deaf(input_ids, labels=None, position_ids=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        return forward(input_ids=input_ids, labels=labels, position_ids=position_ids, use_cache=False)

    model.forward = deaf
    with pytest.raises(RefusedError, match="did not put the keys and values"):
        losses_of(model, torch.arange(10, 20)[None])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChunkFlow(0), "chunk_size=0"),
        (lambda: ChunkFlow(4.0), r"chunk_size=4\.0"),
        (lambda: ChunkFlow(4, max_live_chunks=True), "max_live_chunks=True"),
        (lambda: make_groups(batch(pixel_values=torch.zeros(1)), 4), "pixel_values"),
        (lambda: make_groups({"input_ids": torch.ones(1, 2)}, 4), r"the batch has \['input_ids'\]"),
        (lambda: make_groups(batch(position_ids=torch.arange(1, 11)[None]), 4), "count from 0"),
        (lambda: make_groups(batch(position_ids=torch.tensor([[0, 1, 3, *range(7)]])), 4), "without gaps"),
        (lambda: make_groups(batch(cu_seq_lens_q=torch.tensor([0, 10])), 4), "packed but has no position_ids"),
        (
            lambda: make_groups(batch(attention_mask=torch.tensor([[0, *[1] * 9]])), 4),
            "A padding token would have to predict a label",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
