"""What callbacks share that move a setting of a GRPO trainer: how it is found, and where the setting is read."""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from ..checkpoint.run_folder import calling_trainer
from ..errors import RefusedError
from ..functional.rollouts import GenerationLayout


def grpo_trainer(args: TrainingArguments, state: TrainerState, who: str) -> Any:
    """
    Return the GRPO trainer, stock or ours, that calls a callback.

    Raises:
        RefusedError: another trainer, or none, has called.
    """
    trainer = calling_trainer(state)
    if trainer is None or not hasattr(trainer, "_generate_and_score_completions"):
        raise RefusedError(
            f"{who} moves settings of a GRPOTrainer or EffiGRPOTrainer, and was called by a trainer with "
            f"{type(args).__name__}. Drop it, or use one of these."
        )
    return trainer


def generates_next(trainer: Any) -> bool:
    """Return whether the next micro-step begins with a generation, as `GRPOTrainer._prepare_inputs` decides it."""
    return trainer._buffered_inputs is None or GenerationLayout.of(trainer.args).starts_generation(trainer._step)


def refuse_own_sampling(trainer: Any, who: str, names: tuple[str, ...]) -> None:
    """
    Refuse what would sample by settings of its own.

    Args:
        who (`str`): The callback.
        names (`tuple[str, ...]`): Of what it moves, in `generation_kwargs`.

    Raises:
        RefusedError: a `rollout_func`, or one of the names in `generation_kwargs`.
    """
    if trainer.rollout_func is not None:
        raise RefusedError(
            f"{who} acts in TRL's own generation, which `rollout_func` stands in for. Drop one of them."
        )
    for name in names:
        if name in (trainer.args.generation_kwargs or {}):
            raise RefusedError(f"generation_kwargs sets {name!r}, which {who} would not reach. Leave it out there.")


class Moved:
    """Settings that were written, with what they were."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, str], tuple[Any, str, Any]] = {}

    def write(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, or an entry of a dict, where it is another value; remember the first one."""
        before = _read(owner, name)
        if before != value:
            self._before.setdefault((id(owner), name), (owner, name, before))
            _write(owner, name, value)

    def restore(self) -> None:
        """Write back what was there."""
        while self._before:
            _write(*self._before.popitem()[1])


def _read(owner: Any, name: str) -> Any:
    return owner[name] if isinstance(owner, dict) else getattr(owner, name)


def _write(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def sampling_settings(trainer: Any, hf_name: str, vllm_name: str) -> list[tuple[Any, str]]:
    """
    Return where a generation of this trainer reads a setting.

    Args:
        hf_name, vllm_name (`str`): What transformers and TRL's vLLM call it.
    """
    if trainer.use_vllm:
        return [(trainer.vllm_generation, vllm_name)]
    # TRL writes the second into the model's own config while it generates: `generate` fills in from there what has its
    # default value in the first.
    return [(trainer.generation_config, hf_name), (trainer.generation_kwargs, hf_name)]


def head_temperatures(trainer: Any) -> list[types.CellType]:
    """
    Return where TRL's fused heads, of the policy and of the reference, keep what they divide logits by.

    Raises:
        RefusedError: a model without such a head.
    """
    return [_cell_of(trainer, model) for model in (trainer.model, trainer.ref_model) if model is not None]


def _cell_of(trainer: Any, model: nn.Module) -> types.CellType:
    inner: Any = trainer.accelerator.unwrap_model(model)
    inner = inner.get_base_model() if hasattr(inner, "peft_config") else inner
    open_ones: list[Any] = [inner.forward, getattr(inner, "_original_forward", None)]
    seen: set[int] = set()
    while open_ones:
        found = open_ones.pop(0)
        found = getattr(found, "__func__", found)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        code = getattr(found, "__code__", None)
        if code is not None and code.co_name == "_fused_forward" and "temperature" in code.co_freevars:
            cell: types.CellType = found.__closure__[code.co_freevars.index("temperature")]
            return cell
        open_ones.append(getattr(found, "__wrapped__", None))
    raise RefusedError(
        f"the temperature of log-probs cannot be moved: {type(inner).__name__}.forward is not, or no longer, the "
        "fused head that TRL adds. Leave temperature= out of GRPOScheduleCallback."
    )
