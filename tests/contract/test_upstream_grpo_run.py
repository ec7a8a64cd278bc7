"""A real run of stock GRPOTrainer: keys, shapes, attributes, schedule, rewards and metrics at its seams."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch

from tests.contract._seams import GRPO, GRPO_ATTRIBUTES, RUN_ATTRIBUTES, TRAINER, listed, own_classes
from tests.helpers import (
    binary_hash_reward,
    grpo_args,
    prompt_dataset,
    run_grpo,
    save_tiny,
    tiny_qwen3,
    tiny_tokenizer,
)

BASE_KEYS = {
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "num_items_in_batch",
}

#: setting -> (arguments, exact keys of the dict that `_generate_and_score_completions` returns)
OUTPUTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, BASE_KEYS),
    "beta": ({"beta": 0.1}, {*BASE_KEYS, "ref_per_token_logps"}),
    "misaligned": (
        {"steps_per_generation": 2, "gradient_accumulation_steps": 1},
        {*BASE_KEYS, "old_per_token_logps"},
    ),
    "two passes": ({"num_iterations": 2}, {*BASE_KEYS, "old_per_token_logps"}),
    "accumulation": ({"gradient_accumulation_steps": 2}, BASE_KEYS),
    "truncated masked": ({"mask_truncated_completions": True}, BASE_KEYS),
}

#: key -> (which axes: n rows, P prompt tokens, C completion tokens, dtype)
SHAPES = {
    "prompt_ids": ("nP", torch.int64),
    "prompt_mask": ("nP", torch.int64),
    "completion_ids": ("nC", torch.int64),
    "completion_mask": ("nC", torch.int64),
    "advantages": ("n", torch.float32),
    "num_items_in_batch": ("", torch.int64),
    "old_per_token_logps": ("nC", torch.float32),
    "ref_per_token_logps": ("nC", torch.float32),
}

#: metrics that TRL logs in a plain run; ours stand beside them and never rename one
METRICS = (
    "loss grad_norm learning_rate epoch step num_tokens step_time reward reward_std frac_reward_zero_std entropy"
    " completions/mean_length completions/min_length completions/max_length completions/clipped_ratio"
    " completions/mean_terminated_length completions/min_terminated_length completions/max_terminated_length"
    " clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean clip_ratio/low_min clip_ratio/high_max"
    " rewards/binary_hash_reward/mean rewards/binary_hash_reward/std"
)


# --- the tables are complete ---------------------------------------------------------------------------------------


def test_every_upstream_attribute_we_touch_is_listed(runs):
    """`self.<name>` in our mixins, where the stock trainer has that name."""
    stock = runs("default")
    own = {node.name for _, owner in own_classes() for node in ast.walk(owner) if isinstance(node, ast.FunctionDef)}
    known = {*GRPO_ATTRIBUTES, *listed(GRPO), *listed(TRAINER), *RUN_ATTRIBUTES}
    wrong = set()
    for file, owner in own_classes():
        if not file.startswith("hf_effi/trainers") or not owner.name.endswith(("Mixin", "Trainer")):
            continue
        for node in ast.walk(owner):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name) or node.value.id != "self":
                continue
            if node.attr not in known and node.attr not in own and hasattr(stock, node.attr):
                wrong.add(f"{file}:{node.lineno}: self.{node.attr}")
    assert not wrong, "upstream attributes that no table lists:\n" + "\n".join(sorted(wrong))


# --- a real run ----------------------------------------------------------------------------------------------------


def recording_trainer() -> type:
    from trl import GRPOTrainer

    class Recording(GRPOTrainer):
        """Stock, but it keeps what goes through the seams."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.outputs: list[dict[str, Any]] = []
            self.rows: list[list[dict[str, Any]]] = []
            self.batches: list[dict[str, Any]] = []
            self.rewards: list[torch.Tensor] = []
            self.logps: list[tuple[Any, ...]] = []
            super().__init__(*args, **kwargs)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            self.rows.append(inputs)
            self.outputs.append(super()._generate_and_score_completions(inputs))
            return self.outputs[-1]

        def _calculate_rewards(self, *args: Any) -> Any:
            self.rewards.append(super()._calculate_rewards(*args))
            return self.rewards[-1]

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            self.batches.append(inputs)
            return super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            self.logps.append(super()._get_per_token_logps_and_entropies(*args, **kwargs))
            return self.logps[-1]

    return Recording


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """`beta != 0` loads its reference from the path of the model."""
    return save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_path):
    made: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in made:
            model = model_path if name == "beta" else None
            over = {"max_steps": 2, "logging_steps": 1, **OUTPUTS[name][0]}
            args = grpo_args(tmp_path_factory.mktemp("run"), **over)
            made[name] = run_grpo(recording_trainer(), args, model=model)
        return made[name]

    return run


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_keys(runs, name):
    output, expected = runs(name).outputs[0], OUTPUTS[name][1]
    found = set(output)
    assert found == expected, f"{name}: new {sorted(found - expected)}; missing {sorted(expected - found)}"


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_shapes(runs, name):
    trainer = runs(name)
    output, args = trainer.outputs[0], trainer.args
    rows = args.per_device_train_batch_size * args.steps_per_generation
    sizes = {"n": rows, "P": output["prompt_ids"].size(1), "C": output["completion_ids"].size(1)}
    for key, value in output.items():
        axes, dtype = SHAPES[key]
        assert tuple(value.shape) == tuple(sizes[axis] for axis in axes), f"{name}: {key} is {tuple(value.shape)}"
        assert value.dtype == dtype, f"{name}: {key} is {value.dtype}"
    assert output["num_items_in_batch"] == output["completion_mask"].sum()
    assert len(trainer.rows[0]) == rows, "the trainer no longer gets one list of rows per generation"
    assert set(trainer.rows[0][0]) == {"prompt", "answer", "level"}, "dataset columns no longer reach the rollout"


def test_padding_sides(runs):
    output = runs("default").outputs[0]
    prompts, completions = output["prompt_mask"], output["completion_mask"]
    assert (prompts.sort(dim=1).values == prompts).all(), "prompts are no longer padded on the left"
    assert (completions.sort(dim=1, descending=True).values == completions).all(), "completions no longer on the right"
    assert completions.min() == 0, "this run should have ragged completions"


def test_generation_schedule(runs):
    """
    One generation every `steps_per_generation * num_iterations` micro-steps, each split into equal micro-batches.
    """
    for name, generations, micro_steps in (("default", 2, 2), ("misaligned", 1, 2), ("two passes", 1, 2)):
        trainer = runs(name)
        assert (len(trainer.outputs), len(trainer.batches)) == (generations, micro_steps), name
        assert trainer._step == micro_steps
        sizes = {batch["advantages"].size(0) for batch in trainer.batches}
        assert sizes == {trainer.args.per_device_train_batch_size}, name
    assert len(runs("accumulation").batches) == 4


def test_rewards_and_advantages(runs):
    """Rewards come back gathered, (rows, functions); advantages are `(r - mean) / (std + 1e-4)` in each group."""
    trainer = runs("default")
    for rewards, output in zip(trainer.rewards, trainer.outputs, strict=True):
        assert rewards.shape == (4, 1)
        groups = rewards[:, 0].view(-1, trainer.num_generations)
        expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        assert torch.allclose(output["advantages"], expected.view(-1), atol=1e-6)


def test_log_probs_come_back_as_three(runs):
    trainer = runs("default")
    logps, entropies, aux_loss = trainer.logps[0]
    assert logps.shape == entropies.shape == trainer.batches[0]["completion_ids"].shape
    assert aux_loss is None
    assert logps.requires_grad
    # Old log-probs of the misaligned run: computed without entropies.
    assert runs("misaligned").logps[0][1] is None


def test_log_probs_are_those_of_the_next_token(runs):
    """What our bucketed forward reproduces: temperature, shift, alignment with the completion."""
    trainer = runs("misaligned")
    output = trainer.outputs[0]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = tiny_qwen3(end_tokens=10)(input_ids=ids, attention_mask=mask).logits / trainer.temperature
    width = output["completion_ids"].size(1)
    expected = logits.log_softmax(-1)[:, -width - 1 : -1].gather(2, output["completion_ids"].unsqueeze(2)).squeeze(2)
    real = output["completion_mask"].bool()
    assert torch.allclose(output["old_per_token_logps"][real], expected[real], atol=1e-4)


def test_attributes(runs):
    from trl import GRPOTrainer

    args = grpo_args(runs("default").args.output_dir)
    trainer = run_grpo(GRPOTrainer, args, train=False)
    wrong = []
    for name, kind in GRPO_ATTRIBUTES.items():
        if not hasattr(trainer, name):
            wrong.append(f"GRPOTrainer.{name} is gone")
        elif kind is not None and not isinstance(getattr(trainer, name), kind):
            wrong.append(f"GRPOTrainer.{name} is {getattr(trainer, name)!r}, not {kind}")
    assert not wrong, "\n".join(wrong)
    assert set(trainer._metrics) == {"train", "eval"}
    assert {"prompt", "completion", "rewards", "advantages", "extra", "images"} <= set(trainer._logs)
    assert trainer._signature_columns is None or "prompt" in trainer._signature_columns
    assert runs("default").current_gradient_accumulation_steps == 1
    assert runs("accumulation").current_gradient_accumulation_steps == 2


def test_metric_names(runs):
    logged = set().union(*(entry for entry in runs("default").state.log_history))
    missing = set(METRICS.split()) - logged
    assert not missing, f"TRL no longer logs {sorted(missing)}"
    ours = [name for name in logged if name.startswith("effi/")]
    assert not ours, f"stock TRL took our prefix: {ours}"


def test_eval_goes_through_the_same_seam(tmp_path):
    args = grpo_args(tmp_path, max_steps=1, per_device_eval_batch_size=4)
    trainer = run_grpo(recording_trainer(), args, eval_dataset=prompt_dataset(2), train=False)
    metrics = trainer.evaluate()
    assert set(trainer.outputs[0]) == BASE_KEYS
    assert "eval_loss" in metrics and trainer._step == 0 and trainer._buffered_inputs is None


# --- collectives ---------------------------------------------------------------------------------------------------


def test_binary_reward_name_is_the_metric_name(runs):
    assert runs("default").reward_func_names == [binary_hash_reward.__name__]
