"""Which metric says at a tenth of a run which of six runs will win?

    python -m bench.early_eval            # some minutes on one core
    python -m bench.early_eval --smoke    # seconds: does every part run; nothing is written

Decoders of two widths at three rates, decayed to zero, on the source text of Python's standard library log the
held-out loss, the norm of the gradient, and the accuracy on held-out beginnings with four continuations each, by their
likelihood and by letters: Kendall's tau of the runs' order at a tenth of the run with that at the end.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench._schema import command_line, headline, write_result
from bench.forecast import Text, build, train
from hf_effi.functional import schedules as ours
from hf_effi.functional.cloze import cloze_accuracy
from hf_effi.functional.early_signals import rank_metrics

#: letters need a prompt that lists the answers
LENGTH, BATCH, PROMPT, ANSWER = 80, 8, 20, 8
RATES, WIDTHS = (5e-4, 2e-3, 8e-3), (32, 64)


@dataclass(frozen=True)
class Size:
    """
    How much is run.

    Args:
        updates (`int`): Of each run.
        rows (`int`): Questions.
        seeds (`tuple[int, ...]`): Of the sweep.
    """

    updates: int = 100
    rows: int = 24
    seeds: tuple[int, ...] = (0, 1, 2)


WHOLE = Size()
SMOKE = Size(updates=20, rows=4, seeds=(0,))


class Bytes:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(one) for one in text]}


def questions(text: Text, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return held-out beginnings with four continuations each, as they are and with letters."""
    crops = ["".join(map(chr, row.tolist())) for row in text.crops(text.valid, 4 * count, 777)]
    draw, plain, letters = random.Random(0), [], []
    for i in range(count):
        own = crops[4 * i : 4 * i + 4]
        answers, right = [one[PROMPT : PROMPT + ANSWER] for one in own], draw.randrange(4)
        answers[0], answers[right] = answers[right], answers[0]
        prompt = own[0][:PROMPT]
        plain.append({"prompt": prompt, "choices": answers, "answer": right})
        listed = "".join(f"\n{letter}.{one}" for letter, one in zip("ABCD", answers, strict=True))
        letters.append({"prompt": f"{prompt}{listed}\n:", "choices": list("ABCD"), "answer": right})
    return plain, letters


def sweep(text: Text, size: Size) -> Iterator[dict[str, Any]]:
    """Train six runs for each seed, and say how early each metric orders them."""
    plain, letters = questions(text, size.rows)
    every = max(1, size.updates // 20)
    for seed in size.seeds:
        runs = []
        for width in WIDTHS:
            for rate in RATES:
                model = build(width, seed, LENGTH)
                logs: dict[str, dict[float, float]] = {
                    name: {} for name in ("eval_loss", "grad_norm", "cloze_accuracy", "letter_accuracy")
                }

                def look(step: int, norm: float, model: Any = model, logs: Any = logs) -> None:
                    logs["eval_loss"][step] = text.loss(model)
                    logs["grad_norm"][step] = norm
                    logs["cloze_accuracy"][step] = cloze_accuracy(model, Bytes(), plain)
                    logs["letter_accuracy"][step] = cloze_accuracy(model, Bytes(), letters, "none")

                trace = [rate * one for one in ours.linear(size.updates, warmup_fraction=0.05).trace()]
                train(model, text, trace, seed, every, look)
                runs.append(logs)
                ended = {name: round(list(values.values())[-1], 4) for name, values in logs.items()}
                yield {"part": "run", "seed": seed, "width": width, "rate": rate, **ended}
        for found in rank_metrics(runs, draws=200):
            yield {
                "part": "metric",
                "seed": seed,
                "metric": found.name,
                "monotonicity": round(found.monotonicity, 3),
                "signal_to_noise": round(found.signal_to_noise, 2),
                "spread": round(found.spread, 3),
                "tau": found.ranking.value,
                "tau_interval": [found.ranking.low, found.ranking.high],
                "tau_to_final_loss": found.to_target.value,
                "earliest": found.earliest,
                "score_of_0.6": None if found.score is None else round(found.score, 3),
            }


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the headline: means over the seeds."""

    def tau(metric: str, name: str = "tau") -> float | None:
        found = [row[name] for row in rows if row["part"] == "metric" and row["metric"] == metric]
        values = [value for value in found if value is not None]
        return round(statistics.fmean(values), 3) if values else None

    return [
        headline("tau_at_a_tenth_eval_loss", tau("eval_loss"), ">= 0.8"),
        headline("tau_at_a_tenth_cloze_accuracy", tau("cloze_accuracy")),
        headline("tau_at_a_tenth_letter_accuracy", tau("letter_accuracy")),
        headline("tau_of_cloze_to_final_loss", tau("cloze_accuracy", "tau_to_final_loss"), "<= -0.4"),
        headline("tau_of_letters_to_final_loss", tau("letter_accuracy", "tau_to_final_loss")),
        headline("tau_of_gradient_norm_to_final_loss", tau("grad_norm", "tau_to_final_loss")),
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part in seconds; nothing is written")
    smoke = parser.parse_args(arguments).smoke
    torch.set_num_threads(1)
    size = SMOKE if smoke else WHOLE
    rows: list[dict[str, Any]] = []
    for row in sweep(Text(LENGTH, BATCH, 4 if smoke else 64), size):
        rows.append(row)
        print(row, flush=True)
    found = figures(rows)
    for figure in found:
        print(figure)
    if not smoke:
        write_result(
            "early_eval", command=command_line("bench.early_eval"), seeds=size.seeds, headline=found, rows=rows
        )
    return rows


if __name__ == "__main__":
    main()
