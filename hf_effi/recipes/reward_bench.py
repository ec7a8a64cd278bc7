"""RewardBench 2 over any reward model and any local data in its form."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .._files import append_text, save_text
from ..data import model_fingerprint
from ..errors import BrokenFileError, MismatchError, RefusedError
from ..functional.data import check_count
from ..functional.rewards import TIES_WEIGHTS, TiesScore, best_of_credit, ties_score

#: batches that are sorted by length together
_WINDOW = 8
#: prompt and answer to a text
Render = Callable[[Any, str], str]


@dataclass(frozen=True)
class RewardBenchResult:
    """
    What [`evaluate_reward_model`] returns.

    Args:
        subsets (`dict[str, float]`): Score of each subset, in [0, 1] (of the ties a little more, by its last part).
        counts (`dict[str, int]`): Rows of each.
        ties ([`~hf_effi.functional.rewards.TiesScore`], *optional*): Parts of the score of the ties.
        truncated (`int`): Answers of which the end was cut off at `max_length`. Their scores are of something else.
        scored (`int`): Answers that were scored now, and not read from `scores_file`.

    Example:
    ```python
    >>> RewardBenchResult({"Math": 0.5, "Safety": 1.0}, {"Math": 2, "Safety": 1}).overall
    0.75
    ```
    """

    subsets: dict[str, float]
    counts: dict[str, int]
    ties: TiesScore | None = None
    truncated: int = 0
    scored: int = 0

    @property
    def overall(self) -> float:
        """Mean of the subsets, each with the same weight: the figure of the leaderboard."""
        return statistics.fmean(self.subsets.values())


def evaluate_reward_model(
    model: Any,
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    batch_size: int = 16,
    max_length: int = 2048,
    render: Render | None = None,
    ties: str | None = "Ties",
    weights: Sequence[float] = TIES_WEIGHTS,
    scores_file: str | os.PathLike | None = None,
) -> RewardBenchResult:
    """
    Return how often a reward model scores the right answer of each prompt highest, subset by subset.

    Best of four in RewardBench 2: one chosen and three rejected answers, a tie of `t` answers worth `1 / t`. The
    subset of ties, whose prompts have several right answers, has a score of its own, see
    [`~hf_effi.functional.rewards.ties_score`]. Paper: [2506.01937](https://huggingface.co/papers/2506.01937). Nothing
    is downloaded: pass the rows, of `datasets.load_dataset("allenai/reward-bench-2")` or your own.

    Args:
        model: Folder of a sequence classifier with one label, or the loaded model.
        rows (`Iterable`): A dataset, also a stream, or dicts: `id`, `prompt` (a text or messages), `chosen` and
            `rejected` (lists of texts), `subset`. In the subset of ties the id is `tied:<name>` or `ref:<name>`.
        tokenizer (*optional*): Needed with a loaded model.
        batch_size (`int`, *optional*, defaults to 16): Answers in a forward; answers of like length go together.
        max_length (`int`, *optional*, defaults to 2048): Tokens of prompt and answer; the end of what is longer is cut
            off, and counted.
        render (`Callable`, *optional*): Prompt and answer to a text; the tokenizer's chat template by default.
        ties (`str`, *optional*, defaults to `"Ties"`): Name of that subset, in any case; `None` for none.
        weights (`Sequence[float]`, *optional*): Of the parts of its score.
        scores_file (`str`, *optional*): JSON lines of scores, written as they come. A run that is started again reads
            them and scores the rest.

    Returns:
        [`RewardBenchResult`].

    Raises:
        ValueError: no row, one that is not of this form, or an argument out of range.
        RefusedError: more than one label, or no chat template and no `render`.
        MismatchError: `scores_file` is of another model, of other settings or of other rows.
        BrokenFileError: it is damaged.

    Example:
    ```python
    result = evaluate_reward_model("out/reward-model", load_dataset("allenai/reward-bench-2", split="test"))
    print(result.overall, result.subsets)
    ```
    """
    check_count("batch_size", batch_size)
    check_count("max_length", max_length)
    scorer = _Scorer.of(model, tokenizer, batch_size, max_length, render)
    stored = _Stored(scores_file, scorer)
    tally = _Tally(None if ties is None else ties.lower(), weights)
    for window in _windows(rows, scorer, stored):
        texts = [text for row in window if row.scores is None for text in row.texts]
        scores = iter(scorer(texts))
        for row in window:
            if row.scores is None:
                row.scores = [next(scores) for _ in row.texts]
                stored.add(row)
            tally.add(row)
    return tally.result(scorer.truncated, scorer.scored)


@dataclass
class _Row:
    name: str
    subset: str
    texts: list[str]
    num_right: int
    scores: list[float] | None = None

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.texts, self.num_right]).encode()).hexdigest()[:32]


def _row_of(row: Mapping[str, Any], place: int, render: Render) -> _Row:
    missing = [name for name in ("id", "prompt", "chosen", "rejected", "subset") if row.get(name) is None]
    if missing:
        raise ValueError(f"row {place} has no {', '.join(missing)}; it has {', '.join(map(str, row))}.")
    for name in ("chosen", "rejected"):
        given = row[name]
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(text, str) for text in given):
            raise ValueError(f"row {place}: {name!r} must be a list of at least one text, got {given!r:.80}.")
    answers = [*row["chosen"], *row["rejected"]]
    texts = [render(row["prompt"], answer) for answer in answers]
    return _Row(str(row["id"]), str(row["subset"]), texts, len(row["chosen"]))


def _windows(rows: Iterable[Mapping[str, Any]], scorer: _Scorer, stored: _Stored) -> Iterator[list[_Row]]:
    """Yield rows whose answers fill a few batches, so that they can be sorted by length."""
    window: list[_Row] = []
    for place, given in enumerate(rows):
        row = _row_of(given, place, scorer.render)
        row.scores = stored.find(row)
        window.append(row)
        if sum(len(row.texts) for row in window if row.scores is None) >= _WINDOW * scorer.batch_size:
            yield window
            window = []
    if window:
        yield window


@dataclass
class _Scorer:
    model: Any
    tokenizer: Any
    batch_size: int
    max_length: int
    render: Render
    is_rendered: bool
    truncated: int = 0
    scored: int = 0

    @classmethod
    def of(cls, model: Any, tokenizer: Any, batch_size: int, max_length: int, render: Render | None) -> _Scorer:
        if isinstance(model, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            model = AutoModelForSequenceClassification.from_pretrained(model)
        if tokenizer is None:
            raise ValueError("a loaded model needs tokenizer=.")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token. Set one, such as tokenizer.pad_token = its eos_token.")
        if model.config.num_labels != 1:
            raise RefusedError(f"the model has {model.config.num_labels} labels. A reward model has num_labels=1.")
        is_rendered = render is None
        if render is None:
            if getattr(tokenizer, "chat_template", None) is None:
                raise RefusedError(
                    "the tokenizer has no chat template. Pass render=, a function of prompt and answer that returns "
                    "the text that the model was trained on."
                )
            render = _Rendered(tokenizer)
        return cls(model, tokenizer, batch_size, max_length, render, is_rendered)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[float]:
        """Return a score for each text."""
        # A chat template has written the special tokens already.
        ids = [self.tokenizer(text, add_special_tokens=not self.is_rendered)["input_ids"] for text in texts]
        self.truncated += sum(len(row) > self.max_length for row in ids)
        self.scored += len(ids)
        ids = [row[: self.max_length] for row in ids]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        scores = [0.0] * len(ids)
        with _evaluating(self.model, self.tokenizer.pad_token_id):
            for first in range(0, len(order), self.batch_size):
                places = order[first : first + self.batch_size]
                batch = self.tokenizer.pad(
                    {"input_ids": [ids[place] for place in places]}, padding_side="right", return_tensors="pt"
                )
                logits = self.model(
                    input_ids=batch["input_ids"].to(self.model.device),
                    attention_mask=batch["attention_mask"].to(self.model.device),
                ).logits
                for place, score in zip(places, logits[:, 0].float().tolist(), strict=True):
                    scores[place] = score
        return scores


@dataclass
class _Rendered:
    """By the tokenizer's chat template."""

    tokenizer: Any

    def __call__(self, prompt: Any, answer: str) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages.append({"role": "assistant", "content": answer})
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))


@contextlib.contextmanager
def _evaluating(model: Any, pad_token_id: int) -> Iterator[None]:
    """Evaluation mode, and a pad token in the config, which tells transformers where a padded row ends."""
    modes = [module.training for module in model.modules()]
    config = model.config.get_text_config()
    before, config.pad_token_id = config.pad_token_id, pad_token_id
    model.eval()
    try:
        yield
    finally:
        config.pad_token_id = before
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode


class _Stored:
    """Scores on disk: a line that says of what, then a line for each row."""

    def __init__(self, path: str | os.PathLike | None, scorer: _Scorer) -> None:
        self.path = None if path is None else Path(path)
        self.found: dict[str, tuple[str, list[float]]] = {}
        if self.path is None:
            return
        head = {"schema": 1, "model": model_fingerprint(scorer.model), "max_length": scorer.max_length}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # the process was ended while it wrote
        if not lines:
            lines = [json.dumps(head) + "\n"]
        save_text(self.path, "".join(lines))
        self._read(lines, head)

    def _read(self, lines: list[str], head: dict[str, Any]) -> None:
        try:
            first, *rest = (json.loads(line) for line in lines)
            self.found = {row["id"]: (row["key"], [float(score) for score in row["scores"]]) for row in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenFileError(f"{self.path} is damaged ({error}). Delete it to score all rows anew.") from error
        if first != head:
            raise MismatchError(
                f"{self.path} holds scores of another model or max_length. Use another file, or delete it."
            )

    def find(self, row: _Row) -> list[float] | None:
        key, scores = self.found.get(row.name, (row.key, None))
        if key != row.key:
            raise MismatchError(f"{self.path} holds scores of other answers to row {row.name!r}. Use another file.")
        return scores

    def add(self, row: _Row) -> None:
        if self.path is not None:
            line = {"id": row.name, "subset": row.subset, "key": row.key, "scores": row.scores}
            append_text(self.path, json.dumps(line) + "\n")


@dataclass
class _Tally:
    ties: str | None
    weights: Sequence[float]
    credits: dict[str, list[float]] = field(default_factory=dict)
    tied: dict[str, dict[str, tuple[list[float], int]]] = field(default_factory=lambda: {"tied": {}, "ref": {}})
    ties_name: str = ""

    def add(self, row: _Row) -> None:
        scores = row.scores or []
        if row.subset.lower() != self.ties:
            self.credits.setdefault(row.subset, []).append(best_of_credit(scores, row.num_right))
            return
        kind, _, name = row.name.partition(":")
        if kind not in self.tied or not name or name in self.tied[kind]:
            raise ValueError(
                f"row {row.name!r} of {row.subset!r}: its id must be 'tied:<name>' or 'ref:<name>', each once. Pass "
                "ties=None if this subset is scored as the others."
            )
        self.ties_name, self.tied[kind][name] = row.subset, (scores, row.num_right)

    def result(self, truncated: int, scored: int) -> RewardBenchResult:
        subsets = {name: statistics.fmean(credits) for name, credits in self.credits.items()}
        counts = {name: len(credits) for name, credits in self.credits.items()}
        found = None
        if self.ties_name:
            found = ties_score(self.tied["tied"], self.tied["ref"], self.weights)
            subsets[self.ties_name] = found.score
            counts[self.ties_name] = sum(map(len, self.tied.values()))
        if not subsets:
            raise ValueError("there are no rows. Pass a dataset in the form of RewardBench 2.")
        return RewardBenchResult(subsets, counts, found, truncated, scored)
