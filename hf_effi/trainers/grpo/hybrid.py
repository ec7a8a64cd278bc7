"""Demonstrations in the place of the completions of hopeless groups, and their term of the loss.

Hooks, each one line: the pipeline calls `swap` once for each generation, when its advantages are settled and before
rows are chosen. The trainer hands `_compute_loss` to `loss`, and what a forward with a gradient returns to `seen`.

A demonstration takes the place of one completion of its group: `completion_mask` is 1 on its tokens, so that they are
forwarded, and `tool_mask` is 0, by which TRL leaves tokens out of every loss it has, of its counts and its metrics. So
there is one forward for both terms, and as many on every rank as without demonstrations. The other completions of the
group have no token. An entry `effi_demonstration` says which rows these are, and what a token of theirs weighs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from ...errors import RefusedError
from ...functional import metrics
from ...functional.rollouts import DEMONSTRATED, DEMONSTRATION, REINFORCED
from ...protocols import RolloutGroups
from ...selection.hybrid import HybridGate
from .accounting import StepAccounting
from .host import Host
from .rows import LOSS_SCALE, Generation, Ratios, Rows

logger = logging.get_logger(__name__)

#: losses that take a mean over rows, so that rows without a token must be left out of it
ROW_LOSSES = ("grpo", "sapo", "luspo", "dr_grpo")
KNOWN_LOSSES = (*ROW_LOSSES, "bnpo", "dapo", "cispo", "vespo")
#: entries of log-probs, of which a demonstration has none
_LOG_PROBS = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
#: what TRL sees as the log-prob of a token of a demonstration, whatever it is: its exponential must be finite
_LOWEST = -30.0

#: TRL's `_compute_loss`
Loss = Callable[[Any, dict[str, Any]], Tensor]


class Budgeted(Protocol):
    """The part of the token budget of the loss that is known here."""

    def loss(self, stock: Loss, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return the loss of a micro-batch, whose rows may be forwarded in pieces."""


class Hybrid:
    """
    What [`~hf_effi.selection.HybridGate`] does in a trainer.

    Args:
        host ([`Host`]): The trainer.
        gate ([`~hf_effi.selection.HybridGate`], *optional*): Without it nothing is done.
        accounting ([`StepAccounting`]): Counts the tokens of demonstrations and their negative log-likelihood.

    Raises:
        RefusedError: the trainer cannot have demonstrations in its batches.
        ValueError: the dataset has no such column, or nothing usable in it.
    """

    def __init__(self, host: Host, gate: HybridGate | None, accounting: StepAccounting) -> None:
        self._host, self._gate, self._accounting = host, gate, accounting
        self._warned = False
        #: what a token of each row in hand weighs, and which of its tokens are; `None` where no row is a demonstration
        self._weights: Tensor | None = None
        self._mask: Tensor | None = None
        #: of the last forward: the weighted negative log-likelihood of the demonstrations, and its plain sum
        self._term: Tensor | None = None
        self._sum = 0.0
        if gate is not None:
            self._check(gate)

    def _check(self, gate: HybridGate) -> None:
        host, data = self._host, self._host.train_dataset
        if (size := getattr(host.args, "sequence_parallel_size", 1)) > 1:
            raise RefusedError(f"hybrid_gate= does not work with sequence_parallel_size={size}. Set it to 1.")
        for name, value in (
            ("tools", host.tools),
            ("environment_factory", host.environment_factories),
            ("rollout_func", host.rollout_func),
            ("a model of images and text", host._is_vlm),
        ):
            if value:
                raise RefusedError(
                    f"hybrid_gate= does not work with {name} yet: a demonstration would stand in the place of what it "
                    "made. Drop one of the two."
                )
        if host.loss_type not in KNOWN_LOSSES:
            raise RefusedError(
                f"hybrid_gate= does not know what loss_type={host.loss_type!r} divides by. Known: "
                f"{', '.join(KNOWN_LOSSES)}."
            )
        beside = {"an entropy bonus": host._entropy_bonus_enabled, "the router's loss": host.aux_loss_enabled}
        if host.loss_type in ROW_LOSSES and (found := [name for name, on in beside.items() if on]):
            raise RefusedError(
                f"hybrid_gate= scales loss_type={host.loss_type!r} to the rows that keep their completions, and "
                f"{found[0]} with it, which is no mean over rows. Turn that off, or use loss_type='dapo'."
            )
        names = getattr(data, "column_names", None)
        if not hasattr(data, "__len__") or names is None:
            raise RefusedError(
                "hybrid_gate= reads demonstrations by row number, which a streaming dataset cannot serve. Use a "
                "map-style datasets.Dataset."
            )
        if gate.column not in names:
            raise ValueError(
                f"hybrid_gate= needs a column {gate.column!r} of demonstrations in train_dataset, whose columns are "
                f"{', '.join(names)}. Add it (None for rows without one), or name it: HybridGate(column=...)."
            )
        first = None
        for row, (prompt, value) in enumerate(zip(data["prompt"], data[gate.column], strict=True)):
            if value is None:
                continue
            self._check_row(row, prompt, value)
            first = first or (prompt, value, row)
        if first is None:
            raise ValueError(f"all rows have None in {gate.column!r}: there is no demonstration to learn from.")
        self._tokens(*first)  # a template that does not go on from prompts is told now, and not at the first wrong one

    def _check_row(self, row: int, prompt: Any, value: Any) -> None:
        column = self._gate and self._gate.column
        if not isinstance(value, (str, list)):
            raise ValueError(
                f"{column!r} of row {row} is {type(value).__name__}: a demonstration is a text, a list of messages, "
                "or None."
            )
        if not value:
            raise ValueError(
                f"{column!r} of row {row} is empty, which would teach to answer nothing. Use None for a row without a "
                "demonstration."
            )
        if isinstance(prompt, str) and not isinstance(value, str):
            raise ValueError(f"row {row}: the prompt is a text, so that the demonstration must be one too.")
        if isinstance(value, list) and not all(isinstance(one, dict) and "role" in one for one in value):
            raise ValueError(f"{column!r} of row {row} has {value[0]!r}: a message is a dict of role and content.")

    # --- a generation ------------------------------------------------------------------------------------------------

    def swap(self, generation: Generation, ids: Sequence[int], groups: RolloutGroups) -> bool:
        """
        Put demonstrations in the place of completions, the same ones on every rank.

        Args:
            generation ([`Generation`]): Whose rows are changed.
            ids (`Sequence[int]`): The groups that could be trained on.
            groups ([`~hf_effi.protocols.RolloutGroups`]): The view of these.

        Returns:
            `bool`: Whether anything was changed, so that the view is an old one.
        """
        gate = self._gate
        if gate is None:
            return False
        texts = groups.column(gate.column)
        verdicts = gate.decide(groups, texts).tolist()
        log, count = self._host._metrics["train"], max(1, len(verdicts))
        shown = [i for i, verdict in enumerate(verdicts) if verdict == DEMONSTRATED]
        gated = [i for i, verdict in enumerate(verdicts) if verdict != REINFORCED]
        log[metrics.HYBRID_SFT_FRACTION].append(len(shown) / count)
        log[metrics.HYBRID_DROPPED_FRACTION].append((len(gated) - len(shown)) / count)
        if not gated:
            return False
        places = [generation.members[ids[i]] for i in range(len(verdicts))]
        cleared = {row for i in gated for row in places[i]}
        prompts = groups.column("prompt") if shown else []
        tokens = {places[i][0]: self._tokens(prompts[i], texts[i], groups.rows[i]) for i in shown}
        kept = sum(map(len, places)) - len(cleared)
        share = (kept + len(cleared)) / kept if kept and self._host.loss_type in ROW_LOSSES else 1.0
        self._write(generation, cleared, tokens, share)
        return True

    def _tokens(self, prompt: Any, demonstration: Any, row: int) -> list[int]:
        """Return the tokens of a demonstration behind its prompt, as a completion would have them."""
        host: Any = self._host
        gate, end = self._gate, host._tokenizer.eos_token_id
        if isinstance(prompt, str):
            ids = list(host._tokenizer(text=demonstration, add_special_tokens=False)["input_ids"])
            ids = [*ids, end] if end is not None and ids[-1:] != [end] else ids
        else:
            answer = demonstration
            if isinstance(demonstration, str):
                answer = [{"role": "assistant", "content": demonstration}]
            options = {"chat_template": host.chat_template, "tokenize": True, **host.chat_template_kwargs}
            before, whole = (
                list(host._tokenizer.apply_chat_template(messages, return_dict=True, **options, **more)["input_ids"])
                for messages, more in ((prompt, {"add_generation_prompt": True}), ([*prompt, *answer], {}))
            )
            if whole[: len(before)] != before:
                raise ValueError(
                    f"row {row}: the chat template does not continue the prompt by the demonstration in "
                    f"{gate and gate.column!r}. Use a template whose text of a prompt is the beginning of that of the "
                    "whole conversation."
                )
            ids = whole[len(before) :]
            ids = ids[: ids.index(end) + 1] if end in ids else ids
        most = self._host.max_completion_length
        if most is not None and len(ids) > most:
            if not self._warned:
                self._warned = True
                logger.warning(
                    f"The demonstration of row {row} has {len(ids)} tokens and is cut at max_completion_length="
                    f"{most}, as others may be. Raise it, or leave long demonstrations out."
                )
            ids = ids[:most]
        if not ids:
            raise ValueError(f"row {row}: the demonstration has no tokens. Use None for a row without one.")
        return ids

    def _write(self, generation: Generation, cleared: set[int], tokens: dict[int, list[int]], share: float) -> None:
        """Write demonstrations into the rows of this rank, and what all ranks must know of them."""
        accelerator = self._host.accelerator
        weight = accelerator.num_processes / max(1, sum(map(len, tokens.values())))
        first = 0
        for number, (mine, everybodys) in enumerate(zip(generation.mine, generation.rounds, strict=True)):
            rows = range(first, first + len(everybodys.rewards))
            start, first = rows.start + accelerator.process_index * len(mine), rows.stop
            own = {row - start for row in cleared if start <= row < start + len(mine)}
            shown = {row - start: ids for row, ids in tokens.items() if start <= row < start + len(mine)}
            pads_ratio = Ratios.of(self._host).padding is not None
            batch = with_demonstrations(mine, own, shown, weight, self._host._tokenizer.pad_token_id, pads_ratio)
            if share != 1.0:
                batch[LOSS_SCALE] = torch.tensor(share, device=accelerator.device)
            generation.mine[number] = replace(mine, batch=batch)
            there = [row - rows.start for row in cleared if row in rows]
            advantages, loss_tokens = everybodys.advantages.clone(), everybodys.loss_tokens.clone()
            advantages[there], loss_tokens[there] = 0, 0
            generation.rounds[number] = replace(everybodys, advantages=advantages, loss_tokens=loss_tokens)

    # --- the loss ----------------------------------------------------------------------------------------------------

    def loss(self, budget: Budgeted, stock: Loss, model: Any, inputs: dict[str, Any]) -> Tensor:
        """
        Return the loss of a micro-batch with the term of its demonstrations.

        Args:
            budget ([`Budgeted`]): Calls `stock`, once or for each piece of the micro-batch.
            stock (`Callable`): The next `_compute_loss`.
            model (`nn.Module`): As the trainer wrapped it.
            inputs (`dict`): The micro-batch.
        """
        weights = inputs.get(DEMONSTRATION)
        if weights is None or self._gate is None or not self._host.model.training:
            return budget.loss(stock, model, inputs)
        coefficient = self._gate.sft_coef * self._windows()
        scale = inputs.get(LOSS_SCALE, 1.0)

        def both(model: Any, inputs: dict[str, Any]) -> Tensor:
            policy = stock(model, inputs)
            return policy if self._term is None else policy + coefficient * self._term / scale

        self._weights, self._mask = weights, inputs["completion_mask"]
        try:
            loss = budget.loss(both, model, inputs)
        finally:
            self._weights = self._mask = self._term = None
        self._accounting.counts[metrics.HYBRID_SFT_TOKENS] += int(inputs["completion_mask"][weights > 0].sum())
        self._accounting.nll += self._sum
        return loss

    def _windows(self) -> float:
        """A generation over several updates has a share of its demonstrations in each, as TRL's `dapo` of tokens."""
        return self._host.args.steps_per_generation / self._host.current_gradient_accumulation_steps

    def seen(self, scores: tuple[Tensor, Any, Any]) -> tuple[Tensor, Any, Any]:
        """
        Take the log-probs of the demonstrations out of what a forward with a gradient returned.

        Args:
            scores (`tuple`): Log-probs of the micro-batch in hand, shape `(rows, tokens)`, and whatever else.
        """
        weights, mask = self._weights, self._mask
        if weights is None or mask is None:
            return scores
        logps = scores[0]
        rows = weights > 0
        sums = -(logps * mask)[rows].sum(1)
        self._term = (sums * weights[rows].to(sums)).sum()
        self._sum = float(sums.detach().sum())
        # TRL multiplies what it makes of them by a mask of 0, which leaves NaN of what is not finite.
        hidden = logps.detach().clamp(min=_LOWEST)
        return torch.where(rows.unsqueeze(1), hidden, logps), *scores[1:]


def with_demonstrations(
    rows: Rows,
    cleared: set[int],
    shown: dict[int, list[int]],
    weight: float,
    pad_token_id: int,
    pads_ratio: bool = True,
) -> dict[str, Any]:
    """
    Return a batch in which some rows have no token in the loss, and some of these are demonstrations.

    Args:
        rows ([`Rows`]): Of one rank.
        cleared (`set[int]`): Rows that lose their completion.
        shown (`dict[int, list[int]]`): Row -> tokens of the demonstration that it becomes.
        weight (`float`): Of a token of a demonstration.
        pad_token_id (`int`): Behind the tokens.
        pads_ratio (`bool`, *optional*, defaults to `True`): Whether vLLM's ratio is one number for each token.

    Example:
    ```python
    >>> ids = torch.tensor([[5, 6], [7, 0]])
    >>> batch = {"completion_ids": ids, "completion_mask": (ids > 0).long(), "advantages": torch.ones(2)}
    >>> found = with_demonstrations(Rows(batch), {0, 1}, {1: [8, 9, 2]}, 0.5, 0)
    >>> found["completion_ids"].tolist(), found["completion_mask"].tolist(), found["tool_mask"].tolist()
    ([[0, 0, 0], [8, 9, 2]], [[0, 0, 0], [1, 1, 1]], [[1, 1, 1], [0, 0, 0]])
    >>> found["advantages"].tolist(), found["effi_demonstration"].tolist()
    ([0.0, 0.0], [0.0, 0.5])
    ```
    """
    batch = dict(rows.batch)
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    width = max([ids.size(1), *map(len, shown.values())])
    index = sorted(cleared)
    if batch.get("tool_mask") is None:
        batch["tool_mask"] = torch.ones_like(mask)
    fills = {"completion_ids": pad_token_id, "tool_mask": 1, "importance_sampling_ratio": 1.0}
    per_token = ("completion_ids", "completion_mask", "tool_mask", "importance_sampling_ratio", *_LOG_PROBS)
    for name in (*per_token, "advantages"):
        value = batch.get(name)
        if not isinstance(value, Tensor):
            continue
        if value.ndim == 2 and value.size(1) == ids.size(1) and (name != "importance_sampling_ratio" or pads_ratio):
            value = F.pad(value, (0, width - value.size(1)), value=fills.get(name, 0))
        value = value.clone()
        value[index] = fills.get(name, 0)
        batch[name] = value
    weights = torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    for row, tokens in shown.items():
        batch["completion_ids"][row, : len(tokens)] = torch.tensor(tokens, device=ids.device)
        batch["completion_mask"][row, : len(tokens)] = 1
        batch["tool_mask"][row] = 0
        weights[row] = weight
    batch[DEMONSTRATION] = weights
    return batch
