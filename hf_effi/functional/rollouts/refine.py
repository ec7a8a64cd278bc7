"""Parallel-Distil-Refine: drafts, a bounded workspace made of them, and an answer that reads it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data import check_count

#: how drafts become a workspace
DISTILLATIONS = ("top_k", "random_k", "summary")

#: drafts -> a number for each, high is good
Scorer = Callable[[Sequence[str]], Sequence[float]]


def last_line(text: str) -> str | None:
    """
    Return the last line that is not empty, as the answer of a text; `None` where there is none.

    Example:
    ```python
    >>> last_line("2 + 2\\nis 4\\n"), last_line(" ")
    ('is 4', None)
    ```
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def self_consistency(answer: Callable[[str], Hashable | None] = last_line) -> Scorer:
    """
    Return a scorer that knows no right answer: the share of the drafts that agree with each; 0 without an answer.

    Args:
        answer (`Callable`, *optional*): The answer of a text, `None` where there is none.

    Example:
    ```python
    >>> self_consistency()(["so 4", "so 4", "so 5", ""])
    [0.5, 0.5, 0.25, 0.0]
    ```
    """

    def scores(drafts: Sequence[str]) -> list[float]:
        given = [answer(draft) for draft in drafts]
        votes = Counter(vote for vote in given if vote is not None)
        return [votes[vote] / len(given) if vote is not None else 0.0 for vote in given]

    return scores


def keep_drafts(
    drafts: Sequence[str], distil: str, k: int, score: Scorer | None = None, seed: int | str = 0
) -> list[str]:
    """
    Return the drafts that a workspace is made of, at most `k` and in their order.

    Args:
        drafts (`Sequence[str]`): Of one prompt.
        distil (`str`): `"top_k"`, those with the highest scores, the earlier one where they tie; or `"random_k"`.
        k (`int`): At least 1.
        score (`Callable`, *optional*): For `"top_k"`: a number for each draft; [`self_consistency`] by default.
        seed (`int` or `str`, *optional*, defaults to 0): For `"random_k"`.

    Raises:
        ValueError: an unknown `distil`, or a scorer that returns another number of scores.

    Example:
    ```python
    >>> keep_drafts(["so 4", "so 5", "so 4"], "top_k", 2)
    ['so 4', 'so 4']
    ```
    """
    check_count("k", k)
    if distil == "random_k":
        places = random.Random(seed).sample(range(len(drafts)), min(k, len(drafts)))
    elif distil == "top_k":
        found = list((score or self_consistency())(drafts))
        if len(found) != len(drafts):
            raise ValueError(f"score returned {len(found)} scores for {len(drafts)} drafts.")
        places = sorted(range(len(drafts)), key=lambda place: (-found[place], place))[:k]
    else:
        raise ValueError(f"distil={distil!r} keeps no drafts. Use 'top_k' or 'random_k'.")
    return [drafts[place] for place in sorted(places)]


def workspace_of(drafts: Sequence[str]) -> str:
    """
    Return drafts as one text, numbered.

    Example:
    ```python
    >>> print(workspace_of(["so 4", "so 5"]))
    Draft 1:
    so 4
    <BLANKLINE>
    Draft 2:
    so 5
    ```
    """
    return "\n\n".join(f"Draft {number}:\n{draft.strip()}" for number, draft in enumerate(drafts, 1))


def with_workspace(prompt: str, workspace: str) -> str:
    """
    Return a prompt that asks for a better answer than the workspace has; the prompt itself without a workspace.

    Example:
    ```python
    >>> with_workspace("2+2?", "")
    '2+2?'
    ```
    """
    if not workspace:
        return prompt
    return (
        f"{prompt}\n\nNotes on this problem, which may be wrong:\n{workspace}\n\nUse what is right in the notes, mend "
        "what is wrong, and give a complete answer.\n"
    )


def summary_request(prompt: str, drafts: Sequence[str]) -> str:
    """
    Return a prompt that asks for a summary of drafts.

    Example:
    ```python
    >>> print(summary_request("2+2?", ["so 4"]).splitlines()[0])
    Problem:
    ```
    """
    return (
        f"Problem:\n{prompt}\n\n{workspace_of(drafts)}\n\nSummarise these drafts for somebody who solves the problem "
        "anew: what they agree on, where they differ and which is right, and what is still open.\n"
    )


@dataclass(frozen=True)
class Refinement:
    """
    What [`pdr`] returns.

    Args:
        answer (`str`): Of the last round.
        workspaces (`tuple[str, ...]`): What the first draft of each round read; that of the first round read nothing.
        drafts (`tuple[tuple[str, ...], ...]`): What each round wrote.
        calls (`int`): Completions that were asked for, summaries included.
        path (`int`): Calls one after the other: what one waits for.
        sequential_tokens (`int`): `B_seq`: tokens read and written on the path, of each round those of the longest
            call.
        total_tokens (`int`): `B_tot`: tokens read and written in all calls.
    """

    answer: str
    workspaces: tuple[str, ...]
    drafts: tuple[tuple[str, ...], ...]
    calls: int
    path: int
    sequential_tokens: int
    total_tokens: int


def pdr(
    generate: Callable[[list[str]], Sequence[str]],
    prompt: str,
    drafts: Sequence[int] = (4, 1),
    distil: str | Callable[[Sequence[str]], str] = "top_k",
    k: int = 2,
    max_workspace_tokens: int = 1024,
    *,
    encode: Callable[[str], Sequence[Any]],
    decode: Callable[[Sequence[Any]], str],
    score: Scorer | None = None,
    join: Callable[[str, str], str] = with_workspace,
    request: Callable[[str, Sequence[str]], str] = summary_request,
    seed: int = 0,
) -> Refinement:
    """
    Answer a prompt in rounds: drafts in parallel, a workspace of bounded size made of them, an answer that reads it.

    `C_0` is empty; round `r` writes `M_r` drafts from `(prompt, C_{r-1})`, and `C_r = distil(drafts)` is cut to
    `max_workspace_tokens`. A workspace is not kept for the round after the next one, so that no prompt grows. With
    `drafts=(1, 1, 1)` it is sequential refinement. Paper: [2510.01123](https://huggingface.co/papers/2510.01123).

    Args:
        generate (`Callable[[list[str]], Sequence[str]]`): Returns a completion of each prompt; called once for each
            round, and once more for each summary.
        prompt (`str`): The problem.
        drafts (`Sequence[int]`, *optional*, defaults to `(4, 1)`): `M_r` of each round; the last one is 1.
        distil (`str` or `Callable`, *optional*, defaults to `"top_k"`): `"top_k"`, the drafts with the highest scores;
            `"random_k"`, other drafts for each draft of the next round; `"summary"`, a text by `generate`; or a
            function from the drafts to a text.
        k (`int`, *optional*, defaults to 2): Drafts in a workspace.
        max_workspace_tokens (`int`, *optional*, defaults to 1024): The paper's kappa. What lies beyond is cut off.
        encode, decode (`Callable`): A text to its tokens, and back.
        score (`Callable`, *optional*): For `"top_k"`: drafts to numbers, [`self_consistency`] by default. It is given
            the drafts alone: a scorer that knows the reference answer would make the result meaningless.
        join (`Callable[[str, str], str]`, *optional*): Prompt and workspace to one prompt.
        request (`Callable`, *optional*): Prompt and drafts to a prompt that asks for the summary.
        seed (`int`, *optional*, defaults to 0): For `"random_k"`.

    Returns:
        [`Refinement`].

    Raises:
        ValueError: rounds that do not end in one answer, an unknown `distil`, an argument that it does not read, or a
            wrong number of completions.

    Example:
    ```python
    >>> def generate(prompts):
    ...     return ["so 4" if "Draft" in prompt else f"so {3 + place}" for place, prompt in enumerate(prompts)]
    >>> done = pdr(generate, "2+2?", (2, 1), encode=str.split, decode=" ".join)
    >>> done.answer, done.calls, done.path, done.sequential_tokens < done.total_tokens
    ('so 4', 3, 2, True)
    ```
    """
    check_rounds(drafts, distil, k, score)
    check_count("max_workspace_tokens", max_workspace_tokens)
    counted = _Counted(generate, encode)
    workspaces, written, kept = [""], [], [""] * drafts[0]
    for number in range(1, len(drafts) + 1):
        found = counted([join(prompt, workspace) for workspace in kept])
        written.append(tuple(found))
        if number == len(drafts):
            break
        kept = []
        for place in range(drafts[number]):
            if place and distil != "random_k":
                kept.append(kept[0])  # one for all
                continue
            if distil == "summary":
                (text,) = counted([request(prompt, found)])
            elif isinstance(distil, str):
                text = workspace_of(keep_drafts(found, distil, k, score, f"{seed} {number} {place}"))
            else:
                text = distil(found)
            kept.append(cut_workspace(text, max_workspace_tokens, encode, decode))
        workspaces.append(kept[0])
    return Refinement(
        found[0], tuple(workspaces), tuple(written), counted.calls, counted.path, counted.sequential, counted.total
    )


def check_rounds(drafts: Sequence[int], distil: Any, k: int, score: Scorer | None) -> None:
    """
    Check what [`pdr`] is asked to do.

    Raises:
        ValueError: see there.
    """
    if isinstance(drafts, (str, int)) or not len(drafts):
        raise ValueError(f"drafts={drafts!r} must be a list with the number of drafts of each round, such as (4, 1).")
    for count in drafts:
        check_count("drafts", count)
    if drafts[-1] != 1:
        raise ValueError(f"drafts={tuple(drafts)} ends with {drafts[-1]} drafts. The last round writes 1, the answer.")
    if not callable(distil) and distil not in DISTILLATIONS:
        raise ValueError(f"distil={distil!r} must be one of {DISTILLATIONS}, or a function of the drafts.")
    check_count("k", k)
    if score is not None and distil != "top_k":
        raise ValueError(f"score= only acts with distil='top_k', not with {distil!r}. Leave it out.")


def cut_workspace(
    text: str, max_tokens: int, encode: Callable[[str], Sequence[Any]], decode: Callable[[Sequence[Any]], str]
) -> str:
    """
    Return a text of at most `max_tokens` tokens: itself, or its beginning.

    Example:
    ```python
    >>> cut_workspace("a b c", 2, str.split, " ".join)
    'a b'
    ```
    """
    tokens = encode(text)
    return text if len(tokens) <= max_tokens else decode(tokens[:max_tokens])


class _Counted:
    """`generate`, with the tokens that went in and out."""

    def __init__(self, generate: Callable[[list[str]], Sequence[str]], encode: Callable[[str], Sequence[Any]]) -> None:
        self.generate, self.encode = generate, encode
        self.calls = self.path = self.sequential = self.total = 0

    def __call__(self, prompts: list[str]) -> list[str]:
        found = list(self.generate(prompts))
        if len(found) != len(prompts):
            raise ValueError(f"generate returned {len(found)} completions for {len(prompts)} prompts.")
        sizes = [len(self.encode(one)) + len(self.encode(two)) for one, two in zip(prompts, found, strict=True)]
        self.calls, self.path = self.calls + len(prompts), self.path + 1
        self.sequential, self.total = self.sequential + max(sizes), self.total + sum(sizes)
        return found
