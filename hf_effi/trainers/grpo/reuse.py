"""SPEC-RL around the generation of a turn: verify the drafts of the last pass, keep what is accepted, generate on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from ...errors import BrokenFileError, MismatchError
from ...functional import metrics
from ...functional.rollouts import (
    Draft,
    DraftStore,
    SpeculativeReuse,
    acceptance,
    accepted_lengths,
    draw,
    hash_tokens,
    keep_top,
    number_rows,
    residual,
)
from .generation import Around, Turn
from .host import Host
from .reuse_checks import check_reuse as check_reuse
from .reuse_checks import check_run, refuse_this_turn
from .reuse_scores import logits_of, sampling_warpers

#: most logits of one forward: 512 MB in single precision
_MOST_LOGITS = 2**27


@dataclass
class _Row:
    """A row of this rank: its prompt, and its completion as far as it is known."""

    prompt: list[int]
    tokens: list[int]
    stored: list[tuple[Tensor, Tensor]]
    drafted: int = 0
    accepted: int = 0
    ended: bool = False

    @property
    def reused_whole(self) -> bool:
        return self.ended and self.accepted == len(self.tokens)

    def as_draft(self) -> Draft:
        values, names = zip(*self.stored, strict=True)
        return Draft(torch.tensor(self.tokens, dtype=torch.int32), torch.cat(values), torch.cat(names))


class ReuseTurn:
    """
    Stands around the generation of a turn; see [`~hf_effi.functional.rollouts.SpeculativeReuse`].

    Once for each generation, because what would make more turns of it (tools) is refused, and with the same number of
    collectives and of forwards on every rank.

    Args:
        host ([`Host`]): The trainer, with its model loaded.
        reuse ([`SpeculativeReuse`]): What the user asked for.
        around (`list[Around]`): The chain that this one stands in.

    Raises:
        RefusedError: something about model, sampling or run that reuse cannot reproduce, by name.
    """

    def __init__(self, host: Host, reuse: SpeculativeReuse, around: Sequence[Around]) -> None:
        check_run(host, reuse)
        self._host, self._reuse, self._around = host, reuse, around
        self.store = DraftStore(reuse.capacity(cast(int, host.max_completion_length)))
        #: generations that were asked for drafts: the random numbers of the next one follow from it
        self.turns = 0
        #: rows of each prompt in this update, which may have several generations and refills
        self._seen: Counter[str] = Counter()
        self._seen_in = -1

    def __call__(
        self, turn: Turn, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Return completions as [`Turn`] does: without log-probs, since vLLM is refused."""
        if not self._host.model.training:
            return turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        refuse_this_turn(images, multimodal_fields, self._around)
        keys, everybodys = self._keys(prompt_ids)
        rows = self._verified(prompt_ids, self._drafts(keys, everybodys))
        self._generate_on(lambda asked: turn(asked, images, multimodal_fields, *args, **kwargs)[0], rows)
        for key, row in zip(keys, rows, strict=True):
            if row.tokens:
                self.store.put(key, row.as_draft())
        self._log(rows)
        self.turns += 1
        return [row.tokens for row in rows], None

    # --- drafts, wherever they are ----------------------------------------------------------------------------------

    def _keys(self, prompt_ids: Sequence[Sequence[int]]) -> tuple[list[str], list[str]]:
        """Name the rows of this rank, and those of all: rows of one prompt may lie on several."""
        everybodys = self._gathered([hash_tokens(ids) for ids in prompt_ids])
        rank = self._host.accelerator.process_index
        begin = sum(map(len, everybodys[:rank]))
        if self._seen_in != self._host.state.global_step:
            self._seen_in = self._host.state.global_step
            self._seen.clear()
        # A prompt that comes again before the policy has moved must not get the completion that was just made of it.
        names = number_rows((name for hashes in everybodys for name in hashes), self._seen)
        return names[begin : begin + len(prompt_ids)], names

    def _drafts(self, keys: Sequence[str], everybodys: Sequence[str]) -> list[Draft | None]:
        """Take the drafts of these rows out of the store of whichever rank has them."""
        mine = set(keys)
        theirs = {key: draft for key in everybodys if key not in mine and (draft := self.store.take(key))}
        sent = {key: draft for part in self._gathered(theirs) for key, draft in part.items() if key in mine}
        return [self.store.take(key) or sent.get(key) for key in keys]

    def _gathered(self, value: Any) -> list[Any]:
        """Return the value of every rank. All ranks come here equally often."""
        return gather_object([value]) if self._host.accelerator.num_processes > 1 else [value]

    # --- verify -----------------------------------------------------------------------------------------------------

    def _verified(self, prompt_ids: list[list[int]], drafts: list[Draft | None]) -> list[_Row]:
        """Return the rows with what is accepted of their drafts, and with the token that replaces a rejected one."""
        limit = cast(int, self._host.max_completion_length)
        rows = [_Row(list(ids), [], []) for ids in prompt_ids]
        found = [(row, draft) for row, draft in zip(rows, drafts, strict=True) if draft is not None]
        random = torch.Generator().manual_seed(self._seed())

        def settle(numbers: Sequence[int], log_probs: Tensor) -> None:
            part = [found[number] for number in numbers]
            tokens, stored, names = self._padded([draft for _, draft in part], log_probs.size(1), log_probs.device)
            uniforms = torch.rand(len(part), log_probs.size(1) + 1, generator=random, dtype=torch.float64)
            uniforms = uniforms.to(log_probs.device)
            accepted = uniforms[:, :-1] < acceptance(tokens, log_probs, stored, names, self._reuse.lenience)
            lengths = [min(len(draft.tokens), limit) for _, draft in part]
            cuts = accepted_lengths(accepted, torch.tensor(lengths))
            # One more position than there may be rejected tokens is looked at, and not used.
            at = torch.arange(len(part), device=cuts.device), cuts.clamp(max=log_probs.size(1) - 1)
            drawn = (
                draw(residual(log_probs[at], stored[at], names[at]), uniforms[:, -1]) if self._reuse.strict else cuts
            )
            for i, (row, _) in enumerate(part):
                cut, row.drafted = int(cuts[i]), lengths[i]
                row.tokens, row.accepted = tokens[i, :cut].tolist(), cut
                if self._reuse.strict and cut < row.drafted:
                    row.tokens.append(int(drawn[i]))
                self._store(row, log_probs[i, : len(row.tokens)], row.tokens)
                row.ended = self._is_whole(row.tokens)

        self._score([(row.prompt, draft.tokens[:limit].tolist()) for row, draft in found], settle)
        return rows

    def _padded(self, drafts: Sequence[Draft], columns: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
        # A checkpoint may hold more tokens of each position than are stored now. The most probable come first, and any
        # number of them is exact.
        most = self._reuse.stored_tokens if self._reuse.strict else 1
        width = min(most, max(draft.stored.size(1) for draft in drafts))
        tokens = torch.zeros(len(drafts), columns, dtype=torch.long)
        stored = torch.full((len(drafts), columns, width), -torch.inf)
        names = torch.full((len(drafts), columns, width), -1, dtype=torch.int32)
        for i, draft in enumerate(drafts):
            length, own = min(len(draft.tokens), columns), min(draft.stored.size(1), width)
            tokens[i, :length] = draft.tokens[:length]
            stored[i, :length, :own] = draft.stored[:length, :own]
            names[i, :length, :own] = draft.stored_tokens[:length, :own]
        return tokens.to(device), stored.to(device), names.to(device)

    def _store(self, row: _Row, log_probs: Tensor, tokens: list[int]) -> None:
        """Remember of each position what the next pass will need."""
        if self._reuse.strict:
            values, names = keep_top(log_probs, self._reuse.stored_tokens)
        else:
            names = torch.tensor(tokens, dtype=torch.int32, device=log_probs.device).unsqueeze(1)
            values = log_probs.gather(1, names.long()).float()
        row.stored.append((values.cpu(), names.cpu()))

    def _is_whole(self, tokens: list[int]) -> bool:
        ends, limit = self._host.eos_token_ids, cast(int, self._host.max_completion_length)
        return bool(tokens) and (tokens[-1] in ends or len(tokens) >= limit)

    def _seed(self) -> int:
        name = f"{self._host.args.seed}/{self._host.accelerator.process_index}/{self.turns}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")

    # --- generate and score -----------------------------------------------------------------------------------------

    def _generate_on(self, generate: Callable[[list[list[int]]], list[list[int]]], rows: list[_Row]) -> None:
        """Generate what is missing, and remember the distributions that it was drawn from."""
        open_ones = [row for row in rows if not row.ended]
        if not any(self._gathered(len(open_ones))):
            return
        host, limit = self._host, cast(int, self._host.max_completion_length)
        asked = [row.prompt + row.tokens for row in open_ones] or [rows[0].prompt]  # a rank generates with the others
        room = max([limit - len(row.tokens) for row in open_ones], default=1)
        config, before = host.generation_config, host.generation_config.max_new_tokens
        config.max_new_tokens = room
        try:
            new = generate(asked)
        finally:
            config.max_new_tokens = before
        scored = []
        for row, tokens in zip(open_ones, new, strict=False):
            scored.append((row.prompt + row.tokens, tokens[: limit - len(row.tokens)]))
            row.tokens = row.tokens + scored[-1][1]

        def remember(numbers: Sequence[int], log_probs: Tensor) -> None:
            for number, of_row in zip(numbers, log_probs, strict=True):
                tokens = scored[number][1]
                self._store(open_ones[number], of_row[: len(tokens)], tokens)

        self._score(scored, remember)

    def _score(
        self, rows: Sequence[tuple[list[int], list[int]]], act: Callable[[Sequence[int], Tensor], None]
    ) -> None:
        """
        Compute the distributions that sampling draws from, at each token of each row, in one pass.

        Args:
            rows (`Sequence`): Prompt and completion of each; on every rank as many as it has.
            act (`Callable`): Called for parts of the rows, which are of similar length, with their numbers and with
                log-probs of shape `(rows of the part, columns, vocabulary)`.
        """
        host = self._host
        sizes = self._gathered((len(rows), max((len(tokens) for _, tokens in rows), default=0)))
        most_rows, columns = (max(values) for values in zip(*sizes, strict=True))
        if not most_rows or not columns:
            return
        model = host.accelerator.unwrap_model(host.model)
        size = min(host.args.per_device_train_batch_size, most_rows, _MOST_LOGITS // (columns * self._vocabulary()))
        size = max(1, -(-size // min(max(size // 8, 1), 8)))  # as many parts as a micro-batch has length buckets
        by_length = sorted(range(len(rows)), key=lambda number: (len(rows[number][1]), len(rows[number][0])))
        warpers: Any = sampling_warpers(host)  # none of them reads the tokens before
        policy: Any = host.model  # wrapped or not, as TRL hands it over itself
        checkpointing = disable_gradient_checkpointing(policy, host.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, host.accelerator.autocast():
            for begin in range(0, most_rows, size):
                numbers = by_length[begin : begin + size]
                # A rank that has fewer rows runs as many forwards: sharded weights are gathered in each.
                part = [rows[number] for number in numbers] or [([0], [0])]
                logits = logits_of(policy, model, part, host._tokenizer.pad_token_id, host.accelerator.device)
                if numbers:
                    flat = warpers(None, logits.float().flatten(0, 1))
                    act(numbers, flat.log_softmax(dim=-1).view_as(logits))

    def _vocabulary(self) -> int:
        return int(self._host.accelerator.unwrap_model(self._host.model).config.get_text_config().vocab_size)

    # --- what a checkpoint holds ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"strict": self._reuse.strict, "turns": self.turns, **self.store.state_dict()}

    def load_state_dict(self, *states: dict[str, Any], part: int = 0, parts: int = 1) -> None:
        """
        Go on with the drafts of a checkpoint.

        Args:
            states (`dict`): Of this rank, or of all ranks where their number changed.
            part, parts (`int`): As in [`~hf_effi.functional.rollouts.DraftStore.load_state_dict`].

        Raises:
            MismatchError: strict drafts cannot be verified leniently, nor the other way round.
            BrokenFileError: a state that this class does not store.
        """
        if any(state.get("strict") is not self._reuse.strict for state in states):
            rules = ("a lenience", "the strict rule")
            raise MismatchError(
                f"the rollouts in the checkpoint were kept for {rules[not self._reuse.strict]}, this run has "
                f"{rules[self._reuse.strict]}: the two keep other numbers. Resume with the lenience of that run, or "
                "start a new run from the weights."
            )
        turns: list[Any] = [state.get("turns") for state in states]
        if any(isinstance(turn, bool) or not isinstance(turn, int) or turn < 0 for turn in turns):
            raise BrokenFileError(
                f"the stored drafts of rollouts say that {turns!r} generations were made. Resume from another "
                "checkpoint."
            )
        self.store.load_state_dict(*states, vocabulary=self._vocabulary(), part=part, parts=parts)
        self.turns = max(turns)

    # --- metrics ----------------------------------------------------------------------------------------------------

    def _log(self, rows: list[_Row]) -> None:
        counts = [len(rows), *(sum(values) for values in zip(*map(_counts_of, rows), strict=True))]
        texts = [hash_tokens([*row.prompt, -1, *row.tokens]) for row in rows]
        everybodys = self._gathered((counts, texts))
        total, tokens, drafts, drafted, accepted, whole = map(sum, zip(*(of for of, _ in everybodys), strict=True))
        different = len({text for _, of_rank in everybodys for text in of_rank})
        log = self._host._metrics["train"]
        log[metrics.REUSED_TOKENS].append(accepted / max(tokens, 1))
        log[metrics.REUSED_WHOLE].append(whole / total)
        log[metrics.REUSE_DRAFTED].append(drafts / total)
        log[metrics.UNIQUE_COMPLETIONS].append(different / total)
        if drafts:
            log[metrics.REUSE_ACCEPTED_LENGTH].append(accepted / drafts)
            log[metrics.REUSE_ACCEPTED_SHARE].append(accepted / max(drafted, 1))


def _counts_of(row: _Row) -> tuple[int, ...]:
    return len(row.tokens), int(row.drafted > 0), row.drafted, row.accepted, int(row.reused_whole)


def add_reuse(trainer: Any, reuse: SpeculativeReuse | None, around: list[Around]) -> None:
    """
    Let a trainer reuse rollouts where it was asked to: inside of weight noise, outside of what makes rollouts cheaper.

    Args:
        trainer ([`EffiGRPOTrainer`]): Built. It gains `rollout_reuse` and `reuse_turn`.
        reuse ([`SpeculativeReuse`], *optional*): The argument of the trainer.
        around (`list[Around]`): What stands around the generation of its turns.
    """
    trainer.rollout_reuse = reuse
    if reuse is not None:
        trainer.reuse_turn = ReuseTurn(trainer, reuse, around)
        around.append(trainer.reuse_turn)
