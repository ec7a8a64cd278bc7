"""Chains of one-digit sums: a task that a 0.3M-parameter policy can learn, with an exact verifier.

A prompt is a chain such as `7-3+3+9=`. The policy may answer in two ways that supervised fine-tuning taught it:

- a *worked solution* that carries the running total, `4+3+9=7+9=16`, which is mostly right;
- a *lazy guess*, `~23`, which is mostly wrong.

Which of the two it samples is what GRPO can change within a minute: early gains of reinforcement learning with
verifiable rewards are largely of this kind, a choice among strategies the policy already has.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PAD, EOS = "<pad>", "<eos>"
CHARACTERS = "0123456789+-=~"
#: Largest value of a lazy guess: the totals of chains of 2 to 8 terms lie almost all below it.
LARGEST_GUESS = 45
#: 8 terms with a two-digit running total need 63 characters and the end mark: a right answer is never cut off.
MAX_COMPLETION_TOKENS = 64

_ANSWER = re.compile(r"(?:^~|^|=)(\d+)$")


@dataclass(frozen=True)
class Problem:
    """
    One prompt and its answer.

    Args:
        prompt (`str`): The chain, for example `"7-3+3+9="`.
        answer (`int`): Its value, never negative.
        terms (`int`): Number of terms.
        worked (`str`): The worked solution, for example `"4+3+9=7+9=16"`.
    """

    prompt: str
    answer: int
    terms: int
    worked: str


def make_problem(numbers: Sequence[int], signs: Sequence[str]) -> Problem:
    """
    Build the problem `numbers[0] signs[0] numbers[1] ...`.

    Example:
    ```python
    >>> make_problem([7, 3, 3, 9], "-++")
    Problem(prompt='7-3+3+9=', answer=16, terms=4, worked='4+3+9=7+9=16')
    ```
    """
    if len(signs) != len(numbers) - 1 or not signs:
        raise ValueError(f"{len(numbers)} numbers need {max(len(numbers) - 1, 1)} signs, got {len(signs)}.")
    tail = [sign + str(number) for sign, number in zip(signs, numbers[1:], strict=True)]
    total, steps = numbers[0], []
    for position, (sign, number) in enumerate(zip(signs, numbers[1:], strict=True)):
        total = total + number if sign == "+" else total - number
        if total < 0:
            raise ValueError(f"the running total falls below zero at term {position + 2} of {numbers} with {signs}.")
        steps.append(str(total) + "".join(tail[position + 1 :]))
    return Problem(f"{numbers[0]}{''.join(tail)}=", total, len(numbers), "=".join(steps))


def sample_problem(rng: random.Random, min_terms: int = 2, max_terms: int = 8) -> Problem:
    """Draw a chain of `min_terms` to `max_terms` one-digit terms; running totals never fall below zero."""
    total, numbers, signs = 0, [], []
    for position in range(rng.randint(min_terms, max_terms)):
        number = rng.randrange(10)
        if position:
            # Additions are a little more frequent, so that totals grow to two digits and carries occur.
            signs.append("+" if number > total or rng.random() < 0.6 else "-")
        total = total - number if signs and signs[-1] == "-" else total + number
        numbers.append(number)
    return make_problem(numbers, signs)


def held_out_problems(per_length: int, min_terms: int = 2, max_terms: int = 8, seed: int = 20_000) -> list[Problem]:
    """
    Return a fixed set with `per_length` different problems of each length; training never sees their prompts.

    Args:
        per_length (`int`): Problems a length. At most 70, because only 155 chains of two terms exist and training
            needs the rest.
    """
    if not 1 <= per_length <= 70:
        raise ValueError(f"per_length must lie in 1..70, got {per_length}: only 155 chains of two terms exist.")
    rng, chosen = random.Random(seed), {}
    for terms in range(min_terms, max_terms + 1):
        wanted = len(chosen) + per_length
        while len(chosen) < wanted:
            problem = sample_problem(rng, terms, terms)
            chosen[problem.prompt] = problem
    return list(chosen.values())


def training_problems(
    seed: int, excluded: Iterable[Problem], min_terms: int = 2, max_terms: int = 8
) -> Iterator[Problem]:
    """Yield problems without end; none has a prompt of `excluded`. Short chains repeat, there are only so many."""
    rng, prompts = random.Random(seed), {problem.prompt for problem in excluded}
    while True:
        problem = sample_problem(rng, min_terms, max_terms)
        if problem.prompt not in prompts:
            yield problem


def demonstration(problem: Problem, rng: random.Random, lazy_fraction: float) -> str:
    """Return what supervised fine-tuning shows: a lazy guess with probability `lazy_fraction`, else the worked one."""
    return f"~{rng.randint(0, LARGEST_GUESS)}" if rng.random() < lazy_fraction else problem.worked


def final_number(completion: str) -> int | None:
    """
    Read the answer: the number after the last `=`, or a guess, or the whole completion; `None` if there is none.

    Example:
    ```python
    >>> final_number("4+3+9=7+9=16"), final_number("~23"), final_number("4+3+9=7+9"), final_number("")
    (16, 23, None, None)
    ```
    """
    match = _ANSWER.search(completion)
    return int(match.group(1)) if match else None


def exact_answer_reward(completions: list[str], answer: list[int], **kwargs: Any) -> list[float]:
    """Reward function for `GRPOTrainer`: 1.0 where the final number equals `answer`, else 0.0."""
    return [float(final_number(text) == truth) for text, truth in zip(completions, answer, strict=True)]


def build_tokenizer() -> Any:
    """Return a tokenizer with one token per character, built in code: 16 tokens, left padding, nothing to download."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=PAD, padding_side="left"
    )
