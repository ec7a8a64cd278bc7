"""Image entries by rows: cut, picked and joined as TRL lays them out for each family of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl.trainer.utils import split_pixel_values_by_grid

from hf_effi.functional.rollouts import concat_rows, take_rows
from hf_effi.trainers.grpo.vision import by_rows, merged


def batch(layout: str, rows: int = 3, prompt: int = 4, completion: int = 2) -> dict[str, Any]:
    """`rows` prompts with 1, 2, 1, ... images; every number of the images is another one."""
    images = [1 + i % 2 for i in range(rows)]
    found: dict[str, Any] = {
        "prompt_ids": torch.arange(rows * prompt).view(rows, prompt),
        "completion_ids": torch.arange(rows * completion).view(rows, completion),
        "num_images": images,
    }

    def numbered(*shape: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)

    total = sum(images)
    if layout == "grid":  # Qwen
        grid = torch.tensor([[1, 2, 1 + i % 3] for i in range(total)])
        found |= {"image_grid_thw": grid, "pixel_values": numbered(int(grid.prod(-1).sum()), 5)}
        found["mm_token_type_ids"] = torch.arange(rows * (prompt + completion)).view(rows, -1)
    elif layout == "positions":  # Gemma
        found |= {"image_position_ids": numbered(total, 2), "pixel_values": numbered(total, 3)}
        found["token_type_ids"] = torch.arange(rows * (prompt + completion)).view(rows, -1)
    elif layout == "shapes":  # LFM2-VL
        tiles = [2 * n for n in images]
        found |= {"spatial_shapes": numbered(sum(tiles), 2), "pixel_attention_mask": numbered(sum(tiles), 3)}
        found |= {"pixel_values": numbered(sum(tiles), 4), "num_tiles": tiles}
    elif layout == "tiles":  # InternVL
        tiles = [3 * n for n in images]
        found |= {"pixel_values": numbered(sum(tiles), 3, 2, 2), "num_tiles": tiles}
    elif layout == "flat":  # LLaVA
        found |= {"pixel_values": numbered(total, 3, 2, 2), "image_sizes": numbered(total, 2)}
    else:  # Idefics: padded to one entry per row
        found |= {"pixel_values": numbered(rows, 2, 3, 2, 2), "pixel_attention_mask": numbered(rows, 2, 2, 2)}
    return found


LAYOUTS = ("grid", "positions", "shapes", "tiles", "flat", "padded")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout: str) -> None:
    before = batch(layout)
    after = merged(by_rows(before))
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, torch.Tensor) else after[name] == value


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_picked_with_their_own_images(layout: str) -> None:
    before = batch(layout)
    picked = merged(take_rows(by_rows(before), [2, 0, 2]))
    parts = [merged(take_rows(by_rows(before), [row])) for row in (2, 0, 2)]
    assert picked["num_images"] == [1, 1, 1]
    for name in set(before) - {"num_images", "num_tiles"}:
        assert torch.equal(picked[name], torch.cat([part[name] for part in parts])), name
    # What TRL's own cut gives the row.
    whole = split_pixel_values_by_grid(before)["pixel_values"]
    assert torch.equal(parts[0]["pixel_values"].reshape(-1), torch.as_tensor(whole[2]).reshape(-1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounds_of_several_widths_are_joined(layout: str) -> None:
    first, second = batch(layout), batch(layout, rows=2, prompt=6, completion=3)
    joined = merged(concat_rows([by_rows(first), by_rows(second)], pad_token_id=0))
    assert joined["num_images"] == [1, 2, 1, 1, 2] and joined["prompt_ids"].shape == (5, 6)
    assert torch.equal(joined["pixel_values"][: len(first["pixel_values"])], first["pixel_values"])
    for name in {"token_type_ids", "mm_token_type_ids"} & set(first):
        # Padded as the tokens are: prompts on the left, completions on the right.
        assert joined[name].shape == (5, 9)
        assert joined[name][1].tolist() == [0, 0, 6, 7, 8, 9, 10, 11, 0]
        assert joined[name][3].tolist() == list(range(9))


def test_images_padded_otherwise_in_another_round_are_padded_alike() -> None:
    first = batch("padded")
    second = {**batch("padded", rows=1), "pixel_values": torch.ones(1, 1, 3, 4, 2)}
    second["pixel_attention_mask"] = torch.ones(1, 1, 4, 2)
    joined = merged(concat_rows([by_rows(first), by_rows(second)], pad_token_id=0))
    assert joined["pixel_values"].shape == (4, 2, 3, 4, 2) and joined["pixel_values"][3, 1].abs().sum() == 0
    assert joined["pixel_attention_mask"][0, :, 2:].abs().sum() == 0


def test_entries_that_nothing_gives_to_rows_are_named() -> None:
    wrong = {**batch("flat"), "pixel_values": torch.zeros(7, 3, 2, 2)}
    del wrong["image_sizes"]
    with pytest.raises(ValueError, match="pixel_values of 7 entries for 3 rows"):
        by_rows(wrong)


def test_text_passes_through() -> None:
    text = {"prompt_ids": torch.ones(1, 1), "completion_ids": torch.ones(1, 1)}
    assert by_rows(text) is text and merged(text) is text


def test_a_problem_of_one_rank_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_effi.trainers.grpo import vision

    def others(names: list[str], problem: str) -> None:
        monkeypatch.setattr(vision, "gather_object", lambda mine: [*mine, (names, problem)])

    there = batch("flat")
    names = sorted(vision.VISION_KEYS & set(there))
    others(names, "")
    assert vision.by_rows_of_all(there).keys() == by_rows(there).keys()
    others(names, "the batch of rank 1 is wrong")
    with pytest.raises(ValueError, match="the batch of rank 1 is wrong"):
        vision.by_rows_of_all(there)
    others([], "")
    with pytest.raises(ValueError, match="some processes have prompts with images"):
        vision.by_rows_of_all(there)
