"""What `rollout_savings` is worth: CPU seconds of a generation against stock `generate` and continuous batching.

    python -m bench.rollouts [--seeds 3] [--repeats 1]

A batch of 64 rows, in groups of 8 or 16 of one prompt, is generated greedily by a random model that never chooses
the end token by itself. A logits processor ends each row at a length of its own: log-normal (median 48, sigma 0.6),
at most 256, drawn once for each seed and the same in all arms; continuous batching is given the lengths as
`max_new_tokens` of each request. The arms alternate in one process, on one thread; a figure is a ratio of medians of
CPU seconds.

Tokens of the arms are compared with those of stock. All prompts of a batch have one length in the short case (16) and
lengths from 200 to 256 in the long one, so that there is left padding.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from bench._schema import headline, write_result
from hf_effi.functional import metrics
from hf_effi.trainers.grpo.decoding import SparseDecoding

ROWS, LONGEST, MEDIAN, SIGMA = 64, 256, 48, 0.6
VOCABULARY, PAD, END = 512, 0, 1
GROUPS = (8, 16)
#: tokens of a prompt, from and to
PROMPTS = {"short": (16, 16), "long": (200, 256)}
#: arm -> what `SparseDecoding` saves; `None` is stock
ARMS: dict[str, tuple[bool, bool] | None] = {
    "stock": None,
    "prefill": (True, False),
    "compact": (False, True),
    "prefill,compact": (True, True),
}
CONTINUOUS = "continuous batching"


class EndsAt(LogitsProcessor):
    """Ends each row at its own length, counted from the end of the prompt."""

    def __init__(self, lengths: list[int], prompt: int) -> None:
        self.lengths, self.prompt = torch.tensor(lengths), prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        due = self.lengths <= input_ids.shape[1] - self.prompt + 1
        scores[due, END] = scores.max() + 1
        return scores


def build_model(seed: int) -> Qwen3ForCausalLM:
    """Return a model of 3.7 million parameters whose most likely token is never the end."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, initializer_range=0.1,
        tie_word_embeddings=False, pad_token_id=PAD, eos_token_id=END, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[[PAD, END]] = 0.0  # a logit of 0, below the largest one
    return model


def draw(seed: int, group: int, prompts: str) -> tuple[list[list[int]], list[int]]:
    """Return the prompts of all rows, and how many tokens each completion has, its end included."""
    rng = random.Random(seed)
    texts = [
        [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(*PROMPTS[prompts]))] for _ in range(ROWS // group)
    ]
    lengths = [min(LONGEST, max(2, round(rng.lognormvariate(math.log(MEDIAN), SIGMA)))) for _ in range(ROWS)]
    return [texts[row // group] for row in range(ROWS)], lengths


def by_generate(
    model: Any, rows: list[list[int]], lengths: list[int], saved: tuple[bool, bool] | None
) -> tuple[list[list[int]], SparseDecoding | None]:
    """Return the completions of `generate`, cut after their end, as TRL calls it."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=LONGEST, pad_token_id=PAD, eos_token_id=END, disable_compile=True
    )
    decoding = None if saved is None else SparseDecoding(*saved)
    with contextlib.nullcontext() if decoding is None else decoding.within(model):
        tokens = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([EndsAt(lengths, width)]),
        )
    return [row[:length] for row, length in zip(tokens[:, width:].tolist(), lengths, strict=True)], decoding


def by_continuous_batching(model: Any, rows: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Return the completions of transformers' continuous batching, made anew for each call as TRL does."""
    config = GenerationConfig(do_sample=False, max_new_tokens=LONGEST, pad_token_id=PAD, eos_token_id=-1)
    # The best of seven settings for long prompts on a CPU; short ones take as long with all of them.
    batching = ContinuousBatchingConfig(num_blocks=17 * ROWS, max_batch_tokens=ROWS, page_size=32)
    attention = model.config._attn_implementation
    done: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=batching, block=True, timeout=60
    ) as manager:
        # In the order in which the library itself adds a batch, so that equal prompts follow each other.
        for index in sorted(range(ROWS), key=lambda row: rows[row], reverse=True):
            manager.add_request(rows[index], request_id=str(index), max_new_tokens=lengths[index])
        while len(done) < ROWS:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError("Continuous batching ended before all rows did.")
    model.set_attn_implementation(attention)
    return [done[str(index)] for index in range(ROWS)]


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of all threads of this process, and what the call returned."""
    start = time.process_time()
    out = run()
    return time.process_time() - start, out


def measure(seeds: int, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each kind of prompts, size of groups and arm."""
    arms = [*ARMS, CONTINUOUS]
    rows = []
    for prompts in PROMPTS:
        for group in GROUPS:
            seconds: dict[str, list[float]] = {arm: [] for arm in arms}
            equal, tokens = dict.fromkeys(arms, True), 0
            counts: dict[str, list[SparseDecoding]] = {arm: [] for arm in arms}
            for seed in range(seeds):
                model = build_model(seed)
                texts, lengths = draw(seed, group, prompts)
                for _ in range(repeats):
                    tokens += sum(lengths)
                    for arm in arms:
                        if arm == CONTINUOUS:
                            taken, made = cpu_seconds(
                                lambda m=model, t=texts, n=lengths: by_continuous_batching(m, t, n)
                            )
                        else:
                            call = lambda m=model, t=texts, n=lengths, s=ARMS[arm]: by_generate(m, t, n, s)  # noqa: E731
                            taken, (made, decoding) = cpu_seconds(call)
                            counts[arm] += [decoding] if decoding else []
                        seconds[arm].append(taken)
                        if arm == "stock":
                            reference = made
                        # The last token of a row is its end, which a request of continuous batching does not have.
                        same = [row[:-1] for row in made] == [row[:-1] for row in reference]
                        equal[arm] = equal[arm] and same
            for arm in arms:
                saved = [decoding.counts for decoding in counts[arm]]
                forwarded = sum(c[metrics.DECODE_ROWS] for c in saved)
                of_stock = forwarded + sum(c[metrics.DECODE_ROWS_SAVED] for c in saved)
                ratio = statistics.median(seconds[arm]) / statistics.median(seconds["stock"])
                rows.append(
                    {
                        "prompts": prompts,
                        "group": group,
                        "arm": arm,
                        "generation_cpu_seconds": round(statistics.median(seconds[arm]), 3),
                        "ratio_to_stock": round(ratio, 3),
                        "tokens_equal_stock": equal[arm],
                        "decode_rows_of_stock": round(forwarded / of_stock, 3) if of_stock else None,
                        "completion_tokens": tokens,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def headlines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures that have a goal, of the worst of the cases, and continuous batching beside it."""

    def worst(arm: str) -> float:
        return max(row["ratio_to_stock"] for row in rows if row["arm"] == arm)

    unequal = sum(not row["tokens_equal_stock"] for row in rows if row["arm"] in ARMS)
    return [
        headline("generation_seconds_ratio_to_stock", worst("prefill,compact"), "<= 0.5"),
        headline("cases_with_other_tokens", unequal, "<= 0"),
        headline("generation_seconds_ratio_prefill_alone", worst("prefill")),
        headline("generation_seconds_ratio_compact_alone", worst("compact")),
        headline("generation_seconds_ratio_continuous_batching", worst(CONTINUOUS)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="alternations of all arms, for each seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    by_generate(build_model(0), *draw(0, GROUPS[0], "short"), None)  # what is made once
    rows = measure(args.seeds, args.repeats)
    write_result(
        "rollouts",
        command=f"python -m bench.rollouts --seeds {args.seeds} --repeats {args.repeats}",
        seeds=list(range(args.seeds)),
        headline=headlines(rows),
        rows=rows,
    )


if __name__ == "__main__":
    main()
