"""Easy-to-hard self-improvement: answer problems a little harder than the data, filter, mix, train on, repeat."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed

from .._files import load_json, save_aside, save_json
from ..errors import BrokenFileError, MismatchError
from ..functional.data import check_count, check_number, keep_by_length, majority_answers
from ..functional.options import refuse_idle

#: `answer(prompts)` returns one completion per prompt, `None` where there is none.
Answerer = Callable[[list[str]], Sequence[str | None]]
Row = dict[str, Any]


class GreedyAnswers:
    """
    Greedy completions of `model.generate`, in batches of prompts of similar length; `None` where no end came in time.

    Args:
        model: Causal language model; it is put into eval mode while it answers, and back.
        tokenizer: Its tokenizer, with a pad token; padding is on the left whatever its setting.
        max_new_tokens (`int`): Tokens of an answer with its end-of-sequence token.
        batch_size (`int`, *optional*, defaults to 64): Prompts answered at once.

    Raises:
        ValueError: no pad token, no end-of-sequence token, or an argument out of range.

    Example:
    ```python
    answers = GreedyAnswers(model, tokenizer, max_new_tokens=32)(["12+34=", "5+6="])
    ```
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int, batch_size: int = 64) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self.batch_size = check_count("batch_size", batch_size)
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        if tokenizer.pad_token_id is None or ends is None:
            raise ValueError("The tokenizer needs a pad token and an end-of-sequence token. Set both.")
        self.ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}

    def __call__(self, prompts: list[str]) -> list[str | None]:
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        answers: list[str | None] = [None] * len(prompts)
        training = self.model.training
        self.model.eval()
        try:
            for first in range(0, len(order), self.batch_size):
                places = order[first : first + self.batch_size]
                for place, answer in zip(places, self._generate([ids[place] for place in places]), strict=True):
                    answers[place] = answer
        finally:
            self.model.train(training)
        return answers

    def _generate(self, ids: list[list[int]]) -> list[str | None]:
        padded = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            made = self.model.generate(
                input_ids=padded["input_ids"].to(self.model.device),
                attention_mask=padded["attention_mask"].to(self.model.device),
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=sorted(self.ends),
            )
        return [self._text(row) for row in made[:, padded["input_ids"].shape[1] :].tolist()]

    def _text(self, row: list[int]) -> str | None:
        end = next((place for place, token in enumerate(row) if token in self.ends), None)
        return None if end is None else self.tokenizer.decode(row[:end], skip_special_tokens=True)


class SelfImprovement:
    """
    Rounds of easy-to-hard self-improvement around any Trainer, with the data of each round on disk.

    Round `r` draws `per_round` problems of `levels[r]`, has the models answer them, drops what the filters drop, and
    hands out the rest mixed with all earlier rows. You train on them with the Trainer you have and call
    [`~SelfImprovement.finish`]. A script that is started again goes on with the round that was not finished, on the
    same rows. With several processes each answers a part, and all get the same rows.

    Filters, in this order: answers without an end; disagreement of the models (with two or more); answers more than
    `length_slack` characters shorter than the longest of their level; your own `keep`.

    Args:
        folder (`str`): Where rounds and models are stored.
        rows (`Sequence[dict]`): Supervised rows, strings `prompt` and `completion`.
        problem (`Callable[[level, random.Random], str]`): Draws a prompt of a level. All chance comes from its
            argument.
        levels (`Sequence`): Of each round: a level, or a tuple of levels that share the round. More may be added
            later.
        per_round (`int`): Problems of a round. The paper: 50,000 for addition, 20,000 for copying.
        min_agreement (`float`, *optional*, defaults to 0.5): See [`majority_answers`].
        length_slack (`int`, *optional*): See [`keep_by_length`]; no length filter if `None`.
        length_quantile (`float`, *optional*, defaults to 1.0): Its `quantile`.
        keep (`Callable[[str, str], bool]`, *optional*): `keep(prompt, completion)`, such as a verifier.
        exclude (`Collection[str]`, *optional*): Prompts that are never drawn: those that you test on.
        seed (`int`, *optional*, defaults to 0): Seed of the problems.

    Attributes:
        finished (`int`): Rounds that are done.
        history (`list[dict]`): Counts of each round: `asked`, `unfinished`, `disagreed`, `short`, `rejected`,
            `accepted`.

    Raises:
        ValueError: rows without the two columns, or an argument out of range.
        MismatchError: a folder of other rows, levels or settings; `problem` and `keep` are functions and are not
            compared.
        BrokenFileError: a file of the folder is damaged.

    Example:
    ```python
    improve = SelfImprovement("runs/copy", rows, problem, levels=range(11, 16), per_round=1000)
    model = AutoModelForCausalLM.from_pretrained(improve.checkpoint or "base")
    while not improve.done:
        rows = improve.extend(GreedyAnswers(model, tokenizer, max_new_tokens=32))
        if rows:
            Trainer(model, args, train_dataset=tokenize(rows)).train()
            improve.finish(model)
    ```
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        rows: Sequence[Row],
        problem: Callable[[Any, random.Random], str],
        levels: Iterable[Any],
        *,
        per_round: int,
        min_agreement: float = 0.5,
        length_slack: int | None = None,
        length_quantile: float = 1.0,
        keep: Callable[[str, str], bool] | None = None,
        exclude: Collection[str] = (),
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder)
        for place, row in enumerate(rows):
            if not all(isinstance(row.get(name), str) for name in ("prompt", "completion")):
                raise ValueError(f"rows[{place}] has no strings 'prompt' and 'completion'. It has {sorted(row)}.")
        self.rows = [{"prompt": row["prompt"], "completion": row["completion"], "round": 0} for row in rows]
        self.levels = [tuple(level) if isinstance(level, (tuple, list)) else (level,) for level in levels]
        if not all(self.levels):
            raise ValueError("A round has no level. Give each round a level, or a tuple of levels.")
        self.problem, self.keep, self.exclude = problem, keep, frozenset(exclude)
        self.per_round = check_count("per_round", per_round)
        self.min_agreement = check_number("min_agreement", min_agreement, 0, 1, open_low=True)
        self.length_slack = None if length_slack is None else check_count("length_slack", length_slack, 0)
        self.length_quantile = check_number("length_quantile", length_quantile, 0, 1, open_low=True)
        refuse_idle("length_quantile", length_quantile, 1.0, length_slack is not None, "with length_slack=")
        self.seed = check_count("seed", seed, 0)
        self.finished = 0
        self.history: list[dict[str, Any]] = []
        self._restore()

    @property
    def done(self) -> bool:
        """Whether all rounds are finished, or the last one accepted nothing."""
        return self.finished >= len(self.levels) or (bool(self.history) and not self.history[-1]["accepted"])

    @property
    def checkpoint(self) -> str | None:
        """Folder of the model of the last finished round, or `None`."""
        path = self.folder / f"model-{self.finished}"
        return str(path) if path.is_dir() else None

    def extend(self, *answerers: Answerer) -> list[Row]:
        """
        Return the rows to train on in this round: all earlier ones, then those it accepted; none if it accepted none.

        A round whose data is on disk is not answered again.

        Args:
            answerers (`Callable[[list[str]], Sequence[str | None]]`): [`GreedyAnswers`] of one model, or of several
                that vote.

        Raises:
            ValueError: all rounds are done, no answerer, a wrong number of answers, or problems that are all
                excluded. All processes raise where one does.
        """
        if self.done:
            raise ValueError(f"The {self.finished} rounds are done. Add levels for more.")
        stored = _from_main(self._read(self.finished + 1) if _rank() == 0 else None)
        if stored is None:
            self._save()  # before any row is written, so that rows of other settings are never taken for ours
            stored = self._answer(answerers)
            if _rank() == 0:
                self._write(f"round-{self.finished + 1}.json", stored)
        if len(self.history) == self.finished:
            self.history.append(stored["counts"])
            self._save()
        if not stored["rows"]:
            return []
        earlier = [row for number in range(1, self.finished + 1) for row in self._rows_of(number)]
        return [*self.rows, *earlier, *stored["rows"]]

    def finish(self, model: Any = None) -> None:
        """
        Close the round, after its training.

        Args:
            model (*optional*): Saved as `model-<round>` in the folder: what a restart goes on with.

        Raises:
            ValueError: `extend` was not called in this round.
        """
        if len(self.history) != self.finished + 1:
            raise ValueError("There is no round to finish. Call extend(...) and train on its rows first.")
        if model is not None and _rank() == 0:
            save_aside(self.folder / f"model-{self.finished + 1}", model.save_pretrained)
        self.finished += 1
        self._save()

    # ---- one round ----

    def prompts(self, number: int) -> list[tuple[Any, str]]:
        """
        Return `(level, prompt)` of the problems of round `number`, counted from 1.

        Raises:
            ValueError: 1000 draws in a row were excluded.
        """
        levels, found = self.levels[number - 1], []
        rng = random.Random(f"{self.seed} {number}")
        for place in range(self.per_round):
            level = levels[place % len(levels)]
            draws = (self.problem(level, rng) for _ in range(1000))
            prompt = next((draw for draw in draws if draw not in self.exclude), None)
            if prompt is None:
                raise ValueError(f"1000 problems of level {level!r} in a row are excluded. Exclude fewer prompts.")
            found.append((level, prompt))
        return found

    def _answer(self, answerers: Sequence[Answerer]) -> dict[str, Any]:
        if not answerers:
            raise ValueError("extend() needs somebody who answers: extend(GreedyAnswers(model, tokenizer, ...)).")
        needs = "where two or more answerers vote"
        refuse_idle("min_agreement", self.min_agreement, 0.5, len(answerers) > 1, needs)
        problems = self.prompts(self.finished + 1)
        texts = [prompt for _, prompt in problems]
        answers = [_answers_of(answerer, texts) for answerer in answerers]
        rows, counts = self._filtered(problems, answers)
        return {"rows": rows, "counts": counts}

    def _filtered(
        self, problems: list[tuple[Any, str]], answers: list[list[str | None]]
    ) -> tuple[list[Row], dict[str, Any]]:
        reasons: list[str] = ["accepted"] * len(problems)
        # Of answers, which are texts, the winner is one of them.
        winners = cast(list[str | None], majority_answers(answers, self.min_agreement))
        for place, winner in enumerate(winners):
            if winner is None:
                silent = all(voter[place] is None for voter in answers)
                reasons[place] = "unfinished" if silent else "disagreed"
        if self.length_slack is not None:
            for level in {level for level, _ in problems}:
                places = [p for p, (own, _) in enumerate(problems) if own == level and winners[p] is not None]
                lengths = [len(winner) for p in places if (winner := winners[p]) is not None]
                long_enough = keep_by_length(lengths, self.length_slack, self.length_quantile)
                for place, kept in zip(places, long_enough.tolist(), strict=True):
                    reasons[place] = "accepted" if kept else "short"
        if self.keep is not None:
            for place, (_, prompt) in enumerate(problems):
                winner = winners[place]
                if reasons[place] == "accepted" and winner is not None and not self.keep(prompt, winner):
                    reasons[place] = "rejected"
        number = self.finished + 1
        rows = [
            {"prompt": prompt, "completion": winner, "round": number}
            for (_, prompt), winner, reason in zip(problems, winners, reasons, strict=True)
            if reason == "accepted"
        ]
        found = Counter(reasons)
        names = ("unfinished", "disagreed", "short", "rejected", "accepted")
        levels = [str(level) for level in self.levels[number - 1]]
        return rows, {"levels": levels, "asked": len(problems), **{name: found[name] for name in names}}

    # ---- state ----

    def _fingerprint(self) -> str:
        settings = [
            self.per_round,
            self.min_agreement,
            self.length_slack,
            self.length_quantile,
            self.seed,
            sorted(self.exclude),
        ]
        return hashlib.sha256(json.dumps([self.rows, settings]).encode()).hexdigest()

    def _restore(self) -> None:
        path = self.folder / "state.json"
        state = _from_main(_stored(path) if _rank() == 0 and path.exists() else None)
        if state is None:
            return
        history, finished = state.get("history"), state.get("finished")
        if (
            not isinstance(history, list)
            or not all(isinstance(entry, dict) and {"levels", "accepted"} <= set(entry) for entry in history)
            or finished not in range(len(history) + 1)
        ):
            raise BrokenFileError(f"{path} is damaged: it holds no rounds. Delete {self.folder} to begin again.")
        same_levels = all(
            entry["levels"] == [str(level) for level in levels]
            for entry, levels in zip(history, self.levels, strict=False)
        )
        if state.get("fingerprint") != self._fingerprint() or not same_levels or len(history) > len(self.levels):
            raise MismatchError(
                f"{self.folder} holds rounds of other rows, levels or settings. Build SelfImprovement as they were "
                "built (levels may be added at the end), or use another folder."
            )
        self.finished, self.history = finished, history

    def _save(self) -> None:
        if _rank() == 0:
            state = {"fingerprint": self._fingerprint(), "finished": self.finished, "history": self.history}
            self._write("state.json", state)

    def _write(self, name: str, content: Any) -> None:
        save_json(self.folder / name, content)

    def _read(self, number: int) -> dict[str, Any] | None:
        path = self.folder / f"round-{number}.json"
        return _stored(path) if path.exists() else None

    def _rows_of(self, number: int) -> list[Row]:
        return _from_main(self._read(number) if _rank() == 0 else None)["rows"]


def _stored(path: Path) -> dict[str, Any]:
    """Return what the main process stored; a file that somebody else damaged gets one sentence."""
    try:
        value = load_json(path)
    except BrokenFileError as error:
        raise BrokenFileError(
            f"{path} is damaged ({error.__cause__}). Delete {path.parent} to begin again."
        ) from error
    if not isinstance(value, dict):
        raise BrokenFileError(
            f"{path} is damaged: it holds {type(value).__name__}. Delete {path.parent} to begin again."
        )
    return value


def _world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    return distributed.get_rank() if _world() > 1 else 0


def _from_main(value: Any) -> Any:
    """Return the value of process 0."""
    if _world() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def _answers_of(answerer: Answerer, prompts: list[str]) -> list[str | None]:
    """Return all answers, of which each process gives a part."""
    world = _world()
    mine, error = prompts[_rank() :: world], None
    try:
        found = list(answerer(mine))
        if len(found) != len(mine):
            error = f"An answerer gave {len(found)} answers to {len(mine)} prompts. Return one each."
    except Exception as failure:
        if world == 1:
            raise
        found, error = [], f"An answerer failed: {failure!r}"
    parts: list[Any] = [(found, error)]
    if world > 1:
        parts = [None] * world
        distributed.all_gather_object(parts, (found, error))
    # All leave together: a process that raised alone would leave the others waiting for it.
    errors = [message for _, message in parts if message]
    if errors:
        raise ValueError(errors[0])
    answers: list[str | None] = [None] * len(prompts)
    for rank, (part, _) in enumerate(parts):
        answers[rank::world] = part
    return answers
