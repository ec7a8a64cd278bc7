"""Parallel-Distil-Refine as a `rollout_func` of GRPO: the policy is trained to answer from a workspace of drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from trl.models.utils import unwrap_model_for_generation

from ..callbacks._engines import sharding_engine
from ..errors import RefusedError
from ..functional.data import check_count
from ..functional.rollouts import (
    cut_workspace,
    keep_drafts,
    prompt_key,
    summary_request,
    with_workspace,
    workspace_of,
)
from ..functional.rollouts.refine import Scorer, check_rounds

#: values of the column that says how a prompt is answered
PLAIN, REFINED = "plain", "pdr"


class _LogProbs(LogitsProcessor):
    """
    Keeps the log-prob of each token that was drawn, at the temperature of the trainer: what TRL computes of it later.

    transformers applies it before temperature, top_k and top_p. What was drawn is seen one step later.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature, self.steps = temperature, list[Tensor]()
        self._last: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.take(input_ids[:, -1])
        self._last = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def take(self, tokens: Tensor) -> None:
        """Keep those of the last step, of which these tokens were drawn."""
        if self._last is not None:
            self.steps.append(self._last.gather(1, tokens.to(self._last.device).unsqueeze(1)).squeeze(1))


class PDRRollouts:
    """
    What [`pdr_rollout_func`] returns.

    Args:
        drafts, distil, k, max_workspace_tokens, score, join, mode: As there.

    Attributes:
        sequential_tokens, total_tokens (`int`): Of all refined completions so far, on this process: tokens read and
            written on the path of the longest draft, and in all calls.
    """

    def __init__(
        self,
        drafts: int = 4,
        distil: str | Callable[[Sequence[str]], str] = "top_k",
        k: int = 2,
        max_workspace_tokens: int = 1024,
        score: Scorer | None = None,
        join: Callable[[str, str], str] = with_workspace,
        mode: str | None = "mode",
    ) -> None:
        check_rounds((check_count("drafts", drafts), 1), distil, k, score)
        self.drafts, self.distil, self.k, self.score = drafts, distil, k, score
        self.max_workspace_tokens = check_count("max_workspace_tokens", max_workspace_tokens)
        self.join, self.mode = join, mode
        self.sequential_tokens = self.total_tokens = 0
        self._modes: dict[str, dict[int, str]] = {}

    # --- what TRL calls ----------------------------------------------------------------------------------------------

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Return `prompt_ids` with the workspace in them, `completion_ids`, `logprobs`, and the column `workspace`."""
        group = self._group_size(prompts, trainer)
        firsts = [prompts[row] for row in range(0, len(prompts), group)]
        refined = [place for place, prompt in enumerate(firsts) if self._is_refined(prompt, trainer)]
        ids = trainer._tokenize_prompts(firsts)[0]
        spaces = [""] * len(firsts)
        for place, text in zip(refined, self._workspaces(firsts, ids, refined, len(prompts), trainer), strict=True):
            spaces[place] = text
        asked = [self._joined(prompt, space) for prompt, space in zip(firsts, spaces, strict=True)]
        final = [row for row in trainer._tokenize_prompts(asked)[0] for _ in range(group)]
        completions, logprobs = self._generate(final, trainer)
        for place in refined:
            rows = range(place * group, (place + 1) * group)
            sizes = [len(final[row]) + len(completions[row]) for row in rows]
            self.sequential_tokens, self.total_tokens = (
                self.sequential_tokens + max(sizes),
                self.total_tokens + sum(sizes),
            )
        found = {"prompt_ids": final, "completion_ids": completions, "logprobs": logprobs}
        return {**found, "workspace": [space for space in spaces for _ in range(group)]}

    # --- what is refused ---------------------------------------------------------------------------------------------

    def _group_size(self, prompts: list[Any], trainer: Any) -> int:
        _check_trainer(trainer)
        training = trainer.model.training
        group: int = trainer.num_generations if training else trainer.num_generations_eval
        if training and group != trainer.args.num_generations:
            raise RefusedError(
                "pdr_rollout_func: a group is generated in parts (screening= or rollout_allocator=), and each part "
                "would read another workspace. Drop one of the two."
            )
        whole = len(prompts) % group == 0
        if not whole or any(prompt != prompts[row - row % group] for row, prompt in enumerate(prompts)):
            raise RefusedError(
                f"pdr_rollout_func got {len(prompts)} prompts that are no whole groups of {group}: a group on two "
                "processes would read two workspaces. Make per_device_train_batch_size * steps_per_generation (in "
                "evaluation per_device_eval_batch_size) a multiple of the number of generations."
            )
        return group

    def _is_refined(self, prompt: Any, trainer: Any) -> bool:
        if self.mode is None:
            return True
        split = "train" if trainer.model.training else "eval"
        if split not in self._modes:
            self._modes[split] = self._read_modes(getattr(trainer, f"{split}_dataset"), split)
        return self._modes[split][prompt_key(prompt)] == REFINED

    def _read_modes(self, dataset: Any, split: str) -> dict[int, str]:
        found: dict[int, str] = {}
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            if not isinstance(part, Dataset) or self.mode not in part.column_names:
                raise RefusedError(
                    f"pdr_rollout_func looks up how a prompt is answered in the column {self.mode!r} of "
                    f"{split}_dataset, which has none, or is streamed. Add it with values {PLAIN!r} and {REFINED!r}, "
                    "or pass mode=None to refine all."
                )
            for prompt, value in zip(part["prompt"], part[self.mode], strict=True):
                if value not in (PLAIN, REFINED):
                    raise ValueError(f"column {self.mode!r}: {value!r} must be {PLAIN!r} or {REFINED!r}.")
                if found.setdefault(prompt_key(prompt), value) != value:
                    raise ValueError(
                        f"column {self.mode!r}: the prompt {str(prompt)[:60]!r} has both values. TRL passes a "
                        "rollout_func the prompt alone, so give each prompt one."
                    )
        return found

    # --- drafts and workspace ----------------------------------------------------------------------------------------

    def _workspaces(
        self, firsts: list[Any], ids: list[list[int]], refined: list[int], rows: int, trainer: Any
    ) -> list[str]:
        """Return one workspace for each prompt that is refined; at most `rows` rows are generated at a time."""
        asked = [ids[place] for place in refined for _ in range(self.drafts)]
        drafts = self._texts(asked, rows, trainer)
        texts, requests = [], []
        for number, place in enumerate(refined):
            mine = drafts[number * self.drafts : (number + 1) * self.drafts]
            if self.distil == "summary":
                requests.append(self._with_text(firsts[place], partial(summary_request, drafts=mine)))
            elif isinstance(self.distil, str):
                seed = f"{trainer.state.global_step} {prompt_key(firsts[place])}"
                texts.append(workspace_of(keep_drafts(mine, self.distil, self.k, self.score, seed)))
            else:
                texts.append(self.distil(mine))
        if requests:
            texts = self._texts(_plain_ids(requests, trainer), rows, trainer)
        encode = lambda text: trainer._tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        return [cut_workspace(text, self.max_workspace_tokens, encode, trainer._tokenizer.decode) for text in texts]

    def _joined(self, prompt: Any, workspace: str) -> Any:
        return self._with_text(prompt, lambda text: self.join(text, workspace)) if workspace else prompt

    @staticmethod
    def _with_text(prompt: Any, change: Callable[[str], str]) -> Any:
        if isinstance(prompt, str):
            return change(prompt)
        last = prompt[-1]
        if not isinstance(last["content"], str):
            raise RefusedError("pdr_rollout_func: the last message of a prompt has parts, not a text. Pass texts.")
        return [*prompt[:-1], {**last, "content": change(last["content"])}]

    # --- generation --------------------------------------------------------------------------------------------------

    def _texts(self, ids: list[list[int]], rows: int, trainer: Any) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(ids), rows):
            asked = ids[start : start + rows]
            made, _ = self._generate(asked, trainer)
            sizes = [len(one) + len(two) for one, two in zip(asked, made, strict=True)]
            self.total_tokens += sum(sizes)
            group = self.drafts if len(ids) % self.drafts == 0 else 1
            self.sequential_tokens += sum(max(sizes[first : first + group]) for first in range(0, len(sizes), group))
            texts += trainer._tokenizer.batch_decode(made, skip_special_tokens=True)
        return texts

    def _generate(self, ids: list[list[int]], trainer: Any) -> tuple[list[list[int]], list[list[float]]]:
        """Draw one completion of each prompt as TRL does, with the log-probs of its tokens."""
        if not ids:
            return [], []
        padded = trainer._tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        device = trainer.accelerator.device
        seen = _LogProbs(trainer.temperature)
        unwrapped = unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        )
        with unwrapped as model, torch.no_grad():
            made = model.generate(
                input_ids=padded["input_ids"].to(device),
                attention_mask=padded["attention_mask"].to(device),
                generation_config=trainer.generation_config,
                logits_processor=LogitsProcessorList([seen]),
            )
        seen.take(made[:, -1])
        made = made[:, padded["input_ids"].size(1) :]
        is_end = torch.isin(made, torch.tensor(trainer.eos_token_ids, device=made.device))
        lengths = [int(row.int().argmax()) + 1 if bool(row.any()) else row.numel() for row in is_end]
        logps = torch.stack(seen.steps, dim=1).tolist()
        return (
            [row[:length] for row, length in zip(made.tolist(), lengths, strict=True)],
            [row[:length] for row, length in zip(logps, lengths, strict=True)],
        )


def _plain_ids(prompts: list[Any], trainer: Any) -> list[list[int]]:
    """Tokenize without the trainer's own method, which all processes would have to call equally often."""
    tokenizer = trainer._tokenizer
    if isinstance(prompts[0], str):
        return list(tokenizer(prompts)["input_ids"])
    settings = {"chat_template": trainer.chat_template, **(trainer.chat_template_kwargs or {})}
    rendered = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True, **settings)
    return list(rendered["input_ids"])


def _check_trainer(trainer: Any) -> None:
    found = {
        "use_vllm": trainer.use_vllm,
        "use_transformers_continuous_batching": trainer.args.use_transformers_continuous_batching,
        "tools": trainer.tools,
        "environment_factory": trainer.environment_factories,
        "a model of images and text": trainer._is_vlm,
        str(sharding_engine(trainer.args)): sharding_engine(trainer.args),
    }
    for name, value in found.items():
        if value:
            raise RefusedError(
                f"pdr_rollout_func does not work with {name}: it generates twice with the trainer's own model, by "
                "`generate`, and not equally often on every process. Drop one of the two."
            )


def pdr_rollout_func(
    drafts: int = 4,
    distil: str | Callable[[Sequence[str]], str] = "top_k",
    k: int = 2,
    max_workspace_tokens: int = 1024,
    *,
    score: Scorer | None = None,
    join: Callable[[str, str], str] = with_workspace,
    mode: str | None = "mode",
) -> PDRRollouts:
    """
    Return a `rollout_func` that lets GRPO train what Parallel-Distil-Refine asks of a policy, in one round.

    For a prompt in mode `"pdr"` the policy writes `drafts` drafts, they become one workspace, and the completions of
    the group are drawn from prompt and workspace. The advantages compare completions that read the same. The drafts
    themselves are not trained on. A prompt in mode `"plain"` is answered as by TRL, to the bit where all are. The
    paper answers half of each batch plainly. See [`~hf_effi.functional.rollouts.pdr`]; paper:
    [2510.01123](https://huggingface.co/papers/2510.01123), which adds a loss on correct rollouts that is not here.

    It generates with the trainer's own model and returns the log-probs of what was drawn, at its temperature. Reward
    functions get the column `workspace`, `""` for plain completions.

    Args:
        drafts (`int`, *optional*, defaults to 4): Drafts of each prompt.
        distil, k, max_workspace_tokens, score, join: As in [`~hf_effi.functional.rollouts.pdr`]. With `"random_k"` a
            group has one draw.
        mode (`str`, *optional*, defaults to `"mode"`): Column of the dataset with `"plain"` or `"pdr"`, one value for
            each prompt. `None` refines all.

    Returns:
        [`PDRRollouts`]: For `rollout_func=` of a stock `GRPOTrainer` or an `EffiGRPOTrainer`.

    Raises:
        ValueError: an argument out of range.
        RefusedError: when it is called: vLLM, continuous batching, tools, environments, images, a sharded model, a
            group that lies on two processes or is generated in parts, or a dataset without the column.

    Example:
    ```python
    prompts = prompts.map(lambda row, place: {"mode": ("plain", "pdr")[place % 2]}, with_indices=True)
    trainer = GRPOTrainer(model, reward, args, prompts, rollout_func=pdr_rollout_func(drafts=4, k=2))
    ```
    """
    return PDRRollouts(drafts, distil, k, max_workspace_tokens, score, join, mode)
