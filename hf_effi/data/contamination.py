"""Self-Critique: was a model trained, by RL, on these prompts? Two greedy answers each, and how alike they run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..errors import RefusedError
from ..functional.data import (
    LEAST_TOKENS,
    ContaminationReport,
    check_count,
    contamination_report,
    entropy_similarity,
    top_k_entropy,
)

#: what is added to a prompt for the second answer; `{answer}` stands for the first
SELF_CRITIQUE = (
    "\n\nHere is an answer to this problem:\n{answer}\n\nNow solve the problem again along a different line of "
    "reasoning: do not repeat the steps above.\n"
)
#: a text, or a list of messages
Prompt = str | list[dict[str, Any]]


class _Entropies(LogitsProcessor):
    """Keeps the entropy of each step and not its logits; a request of many tokens would not fit otherwise."""

    def __init__(self, top_k: int | None) -> None:
        self.top_k, self.steps = top_k, list[Tensor]()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.steps.append(top_k_entropy(scores, self.top_k).cpu())
        return scores


@torch.no_grad()
def contamination_scores(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    top_k: int | None = 50,
    max_new_tokens: int = 512,
    instruction: str = SELF_CRITIQUE,
    min_tokens: int = LEAST_TOKENS,
    batch_size: int = 16,
) -> Tensor:
    """
    Return how alike two greedy answers to each prompt run; high says that RL has trained on the prompt.

    The first answer is greedy. The second is greedy too, on the prompt with an instruction that shows the first and
    asks for another line of reasoning, with twice the tokens. A policy that was trained on the prompt follows its one
    path again. See [`~hf_effi.functional.data.entropy_similarity`]; paper:
    [2510.09259](https://huggingface.co/papers/2510.09259). Compare the scores with those of prompts that were
    certainly not trained on, by [`~hf_effi.functional.data.contamination_report`]: they are no probabilities.

    Args:
        model: Causal language model with `generate`; in eval mode while it answers, then as it was. Of its
            `generation_config` the sampling, beams and repetition penalty are switched off.
        tokenizer: With a pad token. Lists of messages are rendered by its chat template.
        prompts (`Sequence`): Texts, or lists of messages of which the last one is the user's.
        top_k (`int`, *optional*, defaults to 50): Tokens of an entropy. `None` is all.
        max_new_tokens (`int`, *optional*, defaults to 512): Of the first answer. Enough for whole answers: what is cut
            off is compared as it is.
        instruction (`str`, *optional*): What the prompt is followed by, with `{answer}` once; `{prompt}` repeats the
            prompt, of messages the last one.
        min_tokens (`int`, *optional*, defaults to 8): A shorter answer gives NaN.
        batch_size (`int`, *optional*, defaults to 16): Prompts answered at once.

    Returns:
        `torch.Tensor`: float64, shape `(len(prompts),)`, NaN where nothing can be said.

    Raises:
        ValueError: a setting out of range, an instruction without `{answer}`, no pad or end token, or messages without
            a chat template.

    Example:
    ```python
    scores = contamination_scores(model, tokenizer, benchmark["problem"], max_new_tokens=1024)
    clean = contamination_scores(model, tokenizer, written_after_training, max_new_tokens=1024)
    print(contamination_report(scores, clean))
    ```
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("batch_size", batch_size)
    if instruction.count("{answer}") != 1:
        raise ValueError(f"instruction={instruction!r} must have {{answer}} once, where the first answer is shown.")
    if top_k is not None:
        check_count("top_k", top_k)
    answers = _Answers(model, tokenizer, top_k, batch_size)
    texts, first = answers(prompts, max_new_tokens)
    again = [_followed_by(prompt, instruction, text) for prompt, text in zip(prompts, texts, strict=True)]
    _, second = answers(again, 2 * max_new_tokens)
    found = [entropy_similarity(one, two, min_tokens) for one, two in zip(first, second, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def _followed_by(prompt: Prompt, instruction: str, answer: str) -> Prompt:
    if isinstance(prompt, str):
        return prompt + _filled(instruction, prompt, answer)
    last = prompt[-1]
    if not isinstance(last.get("content"), str):
        raise ValueError(f"the last message of a prompt must have a text as its content, got {last.get('content')!r}.")
    return [*prompt[:-1], {**last, "content": last["content"] + _filled(instruction, last["content"], answer)}]


def _filled(instruction: str, prompt: str, answer: str) -> str:
    # At once: an answer may hold `{prompt}`.
    values = {"{prompt}": prompt, "{answer}": answer}
    return re.sub(r"\{prompt\}|\{answer\}", lambda found: values[found.group()], instruction)


class _Answers:
    """Greedy answers with the entropy of each of their tokens, the end included."""

    def __init__(self, model: Any, tokenizer: Any, top_k: int | None, batch_size: int) -> None:
        self.model, self.tokenizer, self.top_k, self.batch_size = model, tokenizer, top_k, batch_size
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        if tokenizer.pad_token_id is None or ends is None:
            raise ValueError("the tokenizer needs a pad token and an end-of-sequence token. Set both.")
        self.ends = torch.tensor(ends if isinstance(ends, (list, tuple)) else [ends])

    def __call__(self, prompts: Sequence[Prompt], max_new_tokens: int) -> tuple[list[str], list[Tensor]]:
        ids = [self._ids(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        texts, curves = [""] * len(ids), [torch.empty(0)] * len(ids)
        modes = [module.training for module in self.model.modules()]
        self.model.eval()
        try:
            for first in range(0, len(order), self.batch_size):
                places = order[first : first + self.batch_size]
                made, entropies = self._generate([ids[place] for place in places], max_new_tokens)
                for place, row, curve in zip(places, made, entropies, strict=True):
                    length = self._length(row)
                    texts[place] = self.tokenizer.decode(row[:length], skip_special_tokens=True)
                    curves[place] = curve[:length]
        finally:
            for module, mode in zip(self.model.modules(), modes, strict=True):
                module.training = mode
        return texts, curves

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError("prompts are lists of messages, and the tokenizer has no chat template. Pass texts.")
        rendered = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        return list(rendered["input_ids"])

    def _generate(self, ids: list[list[int]], max_new_tokens: int) -> tuple[Tensor, Tensor]:
        padded = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        seen = _Entropies(self.top_k)
        made = self.model.generate(
            input_ids=padded["input_ids"].to(self.model.device),
            attention_mask=padded["attention_mask"].to(self.model.device),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.ends.tolist(),
            logits_processor=LogitsProcessorList([seen]),
        )
        return made[:, padded["input_ids"].shape[1] :].cpu(), torch.stack(seen.steps, dim=1)

    def _length(self, row: Tensor) -> int:
        """Return the tokens up to the end, which has an entropy too."""
        ended = torch.isin(row, self.ends).nonzero()
        return int(ended[0]) + 1 if len(ended) else len(row)


class ContaminationProbe:
    """
    Suspected prompts and a reference, for `GRPODoctor(probe=...)`: called with a model, it says what it found.

    Args:
        tokenizer: As in [`contamination_scores`].
        prompts (`Sequence`): What must not have been trained on: the evaluation set, or a sample of it.
        reference (`Sequence`): Prompts of the same kind and length that were certainly not trained on.
        samples (`int`, *optional*, defaults to 1000): Resamples of the interval.
        settings: The keyword arguments of [`contamination_scores`].

    Raises:
        ValueError: fewer than two prompts on a side.

    Example:
    ```python
    probe = ContaminationProbe(tokenizer, benchmark[:100], written_after_training[:100], max_new_tokens=1024)
    doctor = GRPODoctor(probe=probe)
    GRPOTrainer(model, reward, args, train_dataset=prompts, callbacks=[doctor]).train()
    ```
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        reference: Sequence[Prompt],
        samples: int = 1000,
        **settings: Any,
    ) -> None:
        for name, given in (("prompts", prompts), ("reference", reference)):
            if isinstance(given, str) or len(given) < 2:
                raise ValueError(f"{name} must be a list of at least two prompts: one score says nothing by itself.")
        self.tokenizer, self.prompts, self.reference = tokenizer, list(prompts), list(reference)
        self.samples, self.settings = check_count("samples", samples), settings

    def __call__(self, model: Any) -> ContaminationReport:
        """
        Answer all prompts twice, and compare. Nothing is drawn at random but by a generator of its own.

        Raises:
            RefusedError: the model cannot generate.
        """
        if not hasattr(model, "generate"):
            raise RefusedError(f"{type(model).__name__} has no `generate`. Pass a causal language model.")
        both = contamination_scores(model, self.tokenizer, [*self.prompts, *self.reference], **self.settings)
        cut = len(self.prompts)
        return contamination_report(both[:cut], both[cut:], self.samples)
