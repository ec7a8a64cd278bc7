"""`LogProbForward` without a trainer: what is forwarded, and that the scores come back to their places."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_effi.trainers.grpo.forward import LogProbForward

#: three rows of a prompt of up to 3 and a completion of up to 4 tokens; the second has no gradient
PROMPTS, COMPLETIONS = [3, 1, 2], [1, 4, 2]
ADVANTAGES = [1.0, 0.0, -1.0]


def batch(advantages: list[float] = ADVANTAGES) -> dict[str, Tensor]:
    prompts, completions = torch.tensor(PROMPTS).unsqueeze(1), torch.tensor(COMPLETIONS).unsqueeze(1)
    prompt_mask, completion_mask = (torch.arange(3) >= 3 - prompts).long(), (torch.arange(4) < completions).long()
    tokens = torch.arange(1, 22).view(3, 7) * torch.cat([prompt_mask, completion_mask], 1)
    return {
        "prompt_ids": tokens[:, :3],
        "prompt_mask": prompt_mask,
        "completion_ids": tokens[:, 3:],
        "completion_mask": completion_mask,
        "advantages": torch.tensor(advantages),
    }


class Stock:
    """Scores each token by its own number and the one before it, wherever it stands, and notes the shapes."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        scores = (input_ids + input_ids.roll(1, 1) / 100) * attention_mask
        scores = scores[:, -logits_to_keep:]
        entropy = kwargs.get("compute_entropy", args[1] if len(args) > 1 else False)
        return scores, 2 * scores if entropy else None, None


def host(**over: Any) -> Any:
    defaults = {
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(num_processes=1),
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "pad_to_multiple_of": None,
        "loss_type": "dapo",
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": None,
    }
    return SimpleNamespace(**{**defaults, **over})


def scored(
    savings: tuple[str, ...], trainer: Any = None, skip: bool = True, buckets: int = 0, **kwargs: Any
) -> tuple[Any, Stock, list[tuple[int, int, int]]]:
    stock, counts, rows = Stock(), [], batch()
    forward = LogProbForward(trainer or host(), savings, buckets, lambda *count: counts.append(count))
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1)
    mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1)
    with forward.skipping(rows if skip else batch([1.0] * 3)):
        found = forward(stock, None, ids, mask, 4, **kwargs)
    return found, stock, counts


WHOLE = scored(())[0][0]
MASK = batch()["completion_mask"]


def test_off_is_one_stock_forward_of_everything() -> None:
    found, stock, counts = scored(())
    assert stock.shapes == [(3, 7)] and counts == [(13, 21, 0)] and found[1] is None


@pytest.mark.parametrize("buckets", [1, 2, 3])
def test_trim_gives_the_scores_of_the_whole_batch_from_fewer_tokens(buckets: int) -> None:
    found, stock, ((real, forwarded, saved),) = scored(("trim",), buckets=buckets)
    assert torch.equal(found[0], WHOLE * MASK)
    assert len(stock.shapes) == buckets and real == 13 and forwarded + saved == 21
    assert forwarded == sum(rows * width for rows, width in stock.shapes) < 21


def test_skip_forwards_no_row_without_a_gradient() -> None:
    found, stock, ((real, forwarded, saved),) = scored(("skip",))
    assert stock.shapes == [(2, 7)] and (real, forwarded, saved) == (8, 14, 7)
    assert torch.equal(found[0][[0, 2]], WHOLE[[0, 2]]) and not found[0][1].any()


def test_entropies_of_skipped_rows_are_the_mean_of_the_others() -> None:
    (_, entropies, _), _, _ = scored(("trim", "skip"), compute_entropy=True)
    kept = 2 * (WHOLE * MASK)[[0, 2]]
    assert torch.equal(entropies[[0, 2]], kept)
    assert torch.allclose(entropies[1], kept.sum() / MASK[[0, 2]].sum())


def test_rows_that_are_all_live_are_all_forwarded() -> None:
    assert scored(("skip",), skip=False)[1].shapes == [(3, 7)]


def test_with_several_ranks_the_number_of_forwards_does_not_depend_on_the_rows() -> None:
    ranks = host(accelerator=SimpleNamespace(num_processes=2))
    live, dead = (scored(("trim", "skip"), ranks, skip, buckets=3)[1].shapes for skip in (False, True))
    assert len(live) == len(dead) == 3
    assert len(scored(("trim", "skip"), buckets=3)[1].shapes) == 2  # alone, no row is forwarded for company


def test_evaluation_the_routers_loss_and_images_are_stocks() -> None:
    for over, kwargs in (
        ({"model": SimpleNamespace(training=False)}, {}),
        ({}, {"compute_aux_loss": True}),
        ({}, {"pixel_values": torch.ones(1)}),
    ):
        assert scored(("trim", "skip"), host(**over), **kwargs)[1].shapes == [(3, 7)]


def test_what_is_skipped_is_forgotten_also_after_an_error() -> None:
    forward = LogProbForward(host(), ("skip",))
    with pytest.raises(KeyError), forward.skipping(batch()):
        raise KeyError
    rows = batch()
    stock = Stock()
    forward(stock, None, torch.ones(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.long), 4)
    assert stock.shapes == [(len(rows["advantages"]), 7)]


def test_sort_changes_places_within_an_update_only() -> None:
    args = SimpleNamespace(
        per_device_train_batch_size=3,
        num_generations=3,
        steps_per_generation=4,
        num_iterations=1,
        gradient_accumulation_steps=2,
        world_size=1,
    )
    chunks = [batch([1.0, 0.0, -1.0]), batch([0.0, 2.0, -2.0]), batch([3.0, 3.0, 3.0]), batch([4.0, 4.0, 0.0])]
    found = LogProbForward(host(args=args), ("sort",)).sorted_chunks(chunks)
    # Rows without a gradient first, then by length: 4, 5 and 4 tokens in each micro-batch.
    assert [chunk["advantages"].tolist() for chunk in found] == [
        [0.0, 0.0, 1.0],
        [-1.0, -2.0, 2.0],
        [0.0, 3.0, 3.0],
        [4.0, 3.0, 4.0],
    ]
    assert LogProbForward(host(args=args), ("trim",)).sorted_chunks(chunks) is chunks
