"""What TRL's GRPO loss reads, which types it has and what each divides by."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

import pytest

from tests.contract._seams import GRPO
from tests.contract._upstream import branches, resolve, tree_of

#: what `_compute_loss` reads from the batch. A new key here may need trimming, sorting and moving like the others.
LOSS_READS = {
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "num_items_in_batch",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "tool_mask",
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
}

LOSS_TYPES = {"grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"}

#: which loss types share a normaliser: what "rows with zero advantage may be skipped" is corrected for
NORMALISERS = [{"grpo", "sapo"}, {"bnpo"}, {"dr_grpo"}, {"cispo", "dapo", "vespo"}, {"luspo"}]

#: ... and what each divides by, as names that occur in its branch
NORMALISER_TERMS = {
    "grpo": {"mask.sum(-1)", "mean()", "self.current_gradient_accumulation_steps"},
    "bnpo": {"mask.sum()", "self.current_gradient_accumulation_steps"},
    "dr_grpo": {"per_token_loss.size(0)", "self.max_completion_length", "self.current_gradient_accumulation_steps"},
    "dapo": {
        "num_items_in_batch",
        "self.accelerator.num_processes",
        "self.current_gradient_accumulation_steps",
        "self.args.steps_per_generation",
    },
    "luspo": {"sum(-1).mean()", "self.current_gradient_accumulation_steps"},
}


def test_loss_reads_these_keys_of_the_batch():
    found = set()
    for node in ast.walk(tree_of(f"{GRPO}._compute_loss")):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "inputs":
            found.add(node.slice.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "inputs":
                found.add(node.args[0].value)
        elif isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Name):
            if node.comparators[0].id == "inputs":
                found.add(node.left.value)
    assert found == LOSS_READS, f"new: {sorted(found - LOSS_READS)}; no longer read: {sorted(LOSS_READS - found)}"


def test_loss_types_are_these_eight():
    import trl

    named = set()
    for chain in branches(f"{GRPO}._compute_loss", "loss_type"):
        named |= set().union(*(strings for strings, _ in chain))
    assert named == LOSS_TYPES, f"_compute_loss knows {sorted(named)}"
    help_text = trl.GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    values = help_text.partition("Supported values are ")[2].partition(".")[0]
    assert {part.strip(" '") for part in values.replace("and", "").split(",")} == LOSS_TYPES, values
    missing = [name for name in LOSS_TYPES if f'- `"{name}"`' not in trl.GRPOConfig.__doc__]
    assert not missing, f"the docstring of GRPOConfig no longer lists {missing}"


def normaliser_chain() -> list[tuple[set[str], str]]:
    chains = [c for c in branches(f"{GRPO}._compute_loss", "loss_type") if "normalizer" in c[0][1]]
    assert len(chains) == 1, "cannot find the if/elif chain of normalisers in _compute_loss"
    return chains[0]


def test_loss_types_share_these_normalisers():
    assert [types for types, _ in normaliser_chain()] == NORMALISERS


@pytest.mark.parametrize("loss_type", NORMALISER_TERMS)
def test_normaliser_divides_by(loss_type):
    (source,) = [source for types, source in normaliser_chain() if loss_type in types]
    missing = {term for term in NORMALISER_TERMS[loss_type] if term not in source.replace('"', "'")}
    assert not missing, f"loss_type={loss_type!r} no longer divides by {sorted(missing)}:\n{source}"


def test_losses_that_divide_by_tokens_are_those_that_we_count_tokens_for():
    from hf_effi.trainers.grpo.pipeline import TOKEN_LOSSES

    assert set(TOKEN_LOSSES) == {"bnpo"} | NORMALISERS[3]


def test_the_ratio_has_these_modes_and_multiplies_every_loss_but_one():
    source = textwrap.dedent(inspect.getsource(resolve(f"{GRPO}._generate_and_score_completions")))
    modes = {
        text for text in re.findall(r'"(\w+_(?:mask|truncate))"', source) if text.startswith(("token", "sequence"))
    }
    assert modes == {"token_mask", "token_truncate", "sequence_mask", "sequence_truncate"}
    # A difference of 0, on padding, is a ratio of 1 before it is clipped.
    assert "(old_per_token_logps - sampling_per_token_logps) * mask" in source and "torch.exp(logps_diff)" in source
    loss = textwrap.dedent(inspect.getsource(resolve(f"{GRPO}._compute_loss")))
    assert (
        'and self.loss_type != "vespo":\n        per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]'
        in (loss)
    )


def test_generation_returns_completions_second():
    returned = [node.value for node in ast.walk(tree_of(f"{GRPO}._generate")) if isinstance(node, ast.Return)][-1]
    assert [element.id for element in returned.elts[:3]] == ["prompt_ids", "completion_ids", "tool_mask"]
