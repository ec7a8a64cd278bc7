"""What will go wrong with a reward function in a run: `hf-effi check-reward`."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._untrusted import one_line, shorten
from ..data.row_files import read_rows
from .reward_calls import RewardCalls, same
from .reward_findings import RewardFinding, RewardReport, read_table, summarize
from .reward_probes import FORMS, Probe, fill, make_probes

#: seconds per completion above which a reward function is called slow: 512 completions take 5 seconds
SLOW = 0.01
_FEW, _LONG = 16, 1_000_000
_RETURN_ZERO = "a policy emits such texts and the run ends there; return 0.0 for what cannot be read"
_ROWS = 64


def check_reward(
    reward: Callable[..., Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    answer: str = "answer",
    template: str | None = None,
    completion: str | None = None,
    tokenizer: Any = None,
    other_process: bool = True,
    seed: int = 0,
) -> RewardReport:
    """
    Call a reward function on completions of which one knows what it should say, and say what will go wrong in a run.

    Right, wrong, empty, cut and copied completions are made from the answer of each row; then the function is called
    again, in another order, row by row, and in another process, and timed.

    Args:
        reward (`Callable`): As `GRPOTrainer` takes it: called with `prompts`, `completions`, `completion_ids`, the
            columns of the rows and `trainer_state`; may be asynchronous.
        rows (`Sequence[Mapping]`): Rows of the dataset, with `prompt` (text or messages) and what the reward reads; 64
            are plenty.
        answer (`str`, *optional*): Column of the right answer; numbers are made text.
        template (`str`, *optional*): How a completion gives the answer, a text with `{answer}`. By default the form of
            `FORMS` that is rewarded most.
        completion (`str`, *optional*): Column of whole right completions, in which the answer occurs.
        tokenizer (*optional*): Makes the `completion_ids`. Without it they are the bytes of the text, which is wrong
            for a reward that reads tokens.
        other_process (`bool`, *optional*): Whether to call it in another process too.
        seed (`int`, *optional*): Of the choice of other rows' answers and of the order.

    Returns:
        [`RewardReport`]: print it.

    Raises:
        TypeError: `reward` cannot be called.
        ValueError: no rows, a column is not there, or a template without `{answer}`.

    Example:
    ```python
    >>> def last_word(completions, answer, **kwargs):
    ...     return [float(text.split(" ")[-1] == right) for text, right in zip(completions, answer)]
    >>> rows = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(5)]
    >>> report = check_reward(last_word, rows, other_process=False)
    >>> report.form, [one.rule for one in report.findings]
    ('plain', ['reads_one_of_two'])
    ```
    """
    name = str(getattr(reward, "__name__", type(reward).__name__))
    answers = _answers(reward, rows, answer, template, completion, name)
    calls = RewardCalls(reward, [dict(row) for row in rows], _tokenize_with(tokenizer), name)
    report = RewardReport(name, rows=len(rows))
    found = report.findings
    try:
        report.form, form, rights = _rights(calls, answers, template, completion, found)
    except Exception as error:  # whatever somebody's function raises
        found[:] = [_raised("raises", "on a right answer", error, "repair that first; nothing else was looked at")]
        report.form = template or completion or ", ".join(FORMS)
        return report
    probes = make_probes(rights, answers, form, [row["prompt"] for row in rows], seed)
    values = _measure(calls, probes, found)
    report.table = [summarize(probe, values[probe.kind], values["right"]) for probe in probes if probe.kind in values]
    report.seconds_per_completion = _agreement(calls, rights, "empty" in values, found, other_process, seed)
    if "not_repeatable" not in {one.rule for one in found}:  # otherwise the table is one draw of many
        found += read_table({row["kind"]: row for row in report.table})
    _long_text(calls, rights[0], found)
    if calls.changed:
        found.append(
            RewardFinding(
                "changes_arguments",
                f"It changes what it is given ({', '.join(sorted(calls.changed))}), which the "
                "functions after it and the log get too",
                "work on a copy",
            )
        )
    found.sort(key=lambda one: one.severity == "note")
    return report


def _answers(
    reward: Any, rows: Any, answer: str, template: str | None, completion: str | None, name: str
) -> list[str]:
    if not callable(reward):
        raise TypeError(f"reward must be a function or an object that can be called, got {shorten(reward)}.")
    if not len(rows):
        raise ValueError("there are no rows to call the reward for.")
    if template is not None and "{answer}" not in template:
        raise ValueError(f"template={template!r} must have {{answer}} where the answer stands.")
    if template is not None and completion is not None:
        raise ValueError("template and completion both say what a right completion is: give one of them.")
    for number, row in enumerate(rows):
        for column in ("prompt", answer, *([completion] if completion else [])):
            if row.get(column) is None:
                raise ValueError(
                    f"row {number} has no {column!r}; it has {', '.join(map(str, row))}. Say which column holds the "
                    f"right answer (now {answer!r})."
                )
    answers = [str(row[answer]) for row in rows]
    if all(not text.strip() for text in answers):
        raise ValueError(f"the column {answer!r} is empty in all {len(rows)} rows, so that {name} cannot be checked.")
    return answers


def _tokenize_with(tokenizer: Any) -> Callable[[str], list[int]]:
    if tokenizer is None:
        return lambda text: list(text.encode("utf-8", "replace"))
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _rights(
    calls: RewardCalls,
    answers: list[str],
    template: str | None,
    completion: str | None,
    found: list[RewardFinding],
) -> tuple[str, str | None, list[str]]:
    """Return what right completions are called, their form, and their texts; raises where it raises on all of them."""
    rows = list(range(len(answers)))
    if completion is not None:
        texts = [str(row[completion]) for row in calls.rows]
        calls(rows, texts)
        return completion, None, texts
    best: tuple[float, str, str, list[str]] | None = None
    failed: tuple[str, Exception] | None = None
    for name, form in {template: template}.items() if template is not None else FORMS.items():
        texts = [fill(str(form), text) for text in answers]
        try:
            mean = _mean(calls(rows, texts))
        except Exception as error:  # whatever somebody's function raises
            failed = failed or (texts[0], error)
            continue
        score = -math.inf if mean is None else mean
        if best is None or score > best[0] + 1e-9:
            best = (score, str(name), str(form), texts)
    if failed is not None:
        text, error = failed
        if best is None:
            raise error
        found.append(_raised("raises", f"on a completion such as {shorten(text, 60)}", error, _RETURN_ZERO))
    if best is None:
        raise ValueError("no form of a right answer was given.")
    return best[1], best[2], best[3]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _raised(rule: str, on: str, error: Exception, advice: str) -> RewardFinding:
    return RewardFinding(rule, f"It raises {type(error).__name__} {on} ({one_line(error, 200).rstrip('.')})", advice)


def _measure(calls: RewardCalls, probes: list[Probe], found: list[RewardFinding]) -> dict[str, list[float | None]]:
    """Return the rewards by kind of completion, of those on which it does not raise."""
    values: dict[str, list[float | None]] = {}
    failed: dict[str, Exception] = {}
    for probe in probes:
        if not probe.rows:
            continue
        try:
            values[probe.kind] = calls(probe.rows, probe.texts)
        except Exception as error:  # whatever somebody's function raises
            failed[f"{probe.kind} ({shorten(probe.texts[0], 40)})"] = error
    if failed and not found:  # one sentence is enough
        on = f"on completions of the kind{'s' * (len(failed) > 1)} {', '.join(failed)}"
        found.append(_raised("raises", on, next(iter(failed.values())), _RETURN_ZERO))
    return values


def _agreement(
    calls: RewardCalls,
    rights: list[str],
    with_empty: bool,
    found: list[RewardFinding],
    other: bool,
    seed: int,
) -> float:
    """Call it again in other ways; returns seconds per completion."""
    rows = list(range(len(rights)))
    # Right and empty ones in turns, so that rewards differ between rows.
    texts = [text if row % 2 == 0 or not with_empty else "" for row, text in enumerate(rights)]
    try:
        timed = [calls.timed(rows, texts) for _ in range(3)]
        first = timed[0][0]
        order = random.Random(seed).sample(rows, len(rows))
        back = dict(zip(order, calls(order, [texts[row] for row in order]), strict=True))
        alone = [calls([row], [texts[row]])[0] for row in rows[:_FEW]]
    except Exception as error:  # whatever somebody's function raises
        found.append(_raised("raises", "when it is called again, or for one completion", error, "keep no state"))
        return math.nan
    seconds = statistics.median(one for _, one in timed) / len(rows)
    ways = [
        (
            "not_repeatable",
            all(same(first, again) for again, _ in timed),
            "The same call gives other rewards the second time",
            "draw nothing at random and keep no state, or equal completions get different advantages",
        ),
        (
            "depends_on_order",
            same(first, [back[row] for row in rows]),
            "In another order the rows get other rewards",
            "return the rewards in the order of the completions",
        ),
        (
            "depends_on_batch",
            same(first[:_FEW], alone),
            "A completion alone gets another reward than among others",
            "a reward of a whole group must be wrapped in group_reward, since a process may hold a part of the group",
        ),
    ]
    # A function that draws at random fails all of them; one sentence is enough.
    found += [RewardFinding(rule, problem, advice) for rule, fine, problem, advice in ways if not fine][:1]
    if other:
        _other_process(calls, rows, texts, first, found)
    if seconds > SLOW:
        found.append(
            RewardFinding(
                "slow",
                f"It takes {seconds:.2g} seconds per completion, {512 * seconds:.3g} for 512, while the model waits",
                "make it asynchronous (async def), work on the batch, or use processes",
            )
        )
    return seconds


def _other_process(
    calls: RewardCalls, rows: list[int], texts: list[str], first: list[float | None], found: list[RewardFinding]
) -> None:
    try:
        there = calls.in_another_process(rows, texts)
    except Exception as error:  # whatever happens there
        found.append(
            RewardFinding(
                "one_process",
                f"It could not be called in another process: {one_line(error, 200).rstrip('.')}",
                "that is fine for one process; several need a function of a module, or an object that can be pickled",
                "note",
            )
        )
        return
    if not same(first, there) and "not_repeatable" not in {one.rule for one in found}:
        found.append(
            RewardFinding(
                "depends_on_process",
                "Another process, whose hash seed is another one, gives other rewards",
                "use no hash(), no order of a set, and no state of the module",
            )
        )


def _long_text(calls: RewardCalls, right: str, found: list[RewardFinding]) -> None:
    """Compare the time for a text of a tenth of a megabyte with that for a whole one."""
    texts = [("so " * (size // 3)) + right for size in (_LONG // 10, _LONG)]
    short = long = math.inf
    try:
        for _ in range(3):  # another process may have had the processor
            times = [calls.timed([0], [text])[1] for text in texts]
            short, long = min(short, times[0]), min(long, times[1])
            if long <= 1 or long <= 30 * short:
                break
    except Exception as error:  # whatever somebody's function raises
        found.append(_raised("raises", "on a completion of a megabyte", error, "bound what it reads"))
        return
    if long > 1 and long > 30 * short:
        found.append(
            RewardFinding(
                "slow_on_long",
                f"A megabyte of text takes {long:.2g} seconds, {long / max(short, 1e-9):.0f} times a tenth of it",
                "some step looks at each pair of places, often a regular expression with two stars: cut the text",
            )
        )


# --- the command -----------------------------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-effi check-reward`."""
    parser.add_argument("reward", metavar="MODULE.NAME", help="a reward function, as in reward_funcs of a YAML")
    parser.add_argument("file", type=Path, help="rows of the dataset: .jsonl, .json, .csv, .parquet or a folder")
    parser.add_argument("--answer", default="answer", metavar="COLUMN", help="the right answer (default: answer)")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--template", metavar="TEXT", help="a right completion, with {answer} where the answer stands")
    given.add_argument("--completion", metavar="COLUMN", help="whole right completions, in which the answer occurs")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="makes completion_ids; without it they are bytes")
    parser.add_argument("--rows", type=int, default=_ROWS, metavar="N", help=f"rows to use (default {_ROWS})")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen at random (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def load_reward(name: str) -> Callable[..., Any]:
    """
    Return what a dotted name names; a class of [`~hf_effi.rewards.Reward`] is made without arguments.

    TRL's own names without a dot work too.

    Raises:
        ValueError: there is no such module or name, or it cannot be called.
    """
    module, _, attribute = name.rpartition(".")
    try:
        # As TRL's script does, a module in the current folder counts.
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        found = getattr(importlib.import_module(module or "trl.rewards"), attribute)
    except Exception as error:  # whatever somebody's module says while it is imported
        raise ValueError(f"{name}: {one_line(error)}. Give module.function of a module that is installed.") from None
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise ValueError(
                f"{name} is a class that needs arguments ({error}). Make one in a module of yours."
            ) from None
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}, which cannot be called.")
    return found


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 without problems, 1 with some, 2 where nothing could be checked."""
    try:
        if args.rows < 2:
            raise ValueError(f"--rows must be at least 2, got {args.rows}.")
        rows = read_rows(args.file, ("prompt", args.answer))[: args.rows]
        reward = load_reward(args.reward)
        tokenizer = None
        if args.tokenizer is not None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        report = check_reward(
            reward, rows, answer=args.answer, template=args.template, completion=args.completion,
            tokenizer=tokenizer, seed=args.seed,
        )  # fmt: skip
    except (ValueError, TypeError, OSError) as error:
        print(f"hf-effi check-reward: {one_line(error, 500)}", file=sys.stderr)
        return 2
    report.name = args.reward
    if args.json:
        print(json.dumps({**asdict(report), "problems": len(report.problems)}, indent=1))
    else:
        print(report)
    return 1 if report.problems else 0
