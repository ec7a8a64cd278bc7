"""`QKClipCallback`: attention logits kept under a threshold by scaling the heads that exceed it."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..attention.logits import LogitWatch, attention_names
from ..attention.projections import MeasuredProjections, measure_projections
from ..errors import RefusedError
from ..functional import metrics
from ..functional.kept_arguments import keeps_arguments
from ..functional.qk_clip import check_alpha, check_threshold, clip_factors
from ..optim.report import innermost
from ..optim.schedule_free import is_schedule_free
from ..patching import is_sharded
from ._engines import is_fsdp2, sharding_engine
from ._qk_heads import ClippedAttention, Heads, clipped_attentions, scale_rows
from ._turns import WRITE, TurnCallback, in_turn
from .owners import Role
from .probing import in_probe, outside_probes

GQA, MODES = ("query", "min"), ("sampled", "bound")


class QKClipCallback(TurnCallback):
    """
    After an update, scales the query and key projections of exactly the heads whose attention logits exceeded a
    threshold in its batch; with any optimizer. The clip of MuonClip.

    Formula, for head h: `S_h` the largest logit of the batch, `gamma = min(1, threshold / S_h)`, then
    `W_q <- gamma^alpha W_q` and `W_k <- gamma^(1 - alpha) W_k` for the rows of this head. Where heads share their keys
    (GQA, or the latent attention of DeepSeek) the query takes all of `gamma`: the head has the same logits, and no
    other head changes. Paper: Kimi K2 (2507.20534).

    Which rows belong to a head is measured by one forward over three tokens. Its state is the weights alone.

    Args:
        threshold (`float`, *optional*, defaults to 100): Above 0; `inf` only measures.
        alpha (`float`, *optional*): Share of the factor that goes to the query, in `[0, 1]`; 0.5 by default. For heads
            with keys of their own, and with `gqa="min"`.
        gqa (`str`, *optional*, defaults to `"query"`): `"min"` scales the queries of a group and their shared key by
            the smallest factor of the group.
        mode (`str`, *optional*, defaults to `"sampled"`): `"sampled"` takes the logits themselves, in a second product
            of queries and keys. `"bound"` takes `max |q| max |k| scaling`, which is larger, so that it clips earlier
            than the method.
        every_steps (`int`, *optional*, defaults to 1): Measure in updates whose number is a multiple.

    Attributes:
        largest (`dict[str, list[float]]`): Name of an attention -> `S` of its heads in the last measured update.

    Raises:
        ValueError: an argument out of range, or `alpha` for a model in which no key is scaled.
        RefusedError: a model that bounds its logits itself (norms of queries and keys, capped logits), frozen
            projections (LoRA), attention outside of transformers' interface, `torch_compile`, DeepSpeed, FSDP 1,
            tensor and sequence parallelism.

    Example:
    ```python
    Trainer(model, args, train_dataset=rows, callbacks=[QKClipCallback(threshold=100)]).train()
    ```
    """

    role = Role("QK-Clip", "Two callbacks scale the same heads", "Keep one.")

    @keeps_arguments
    def __init__(
        self,
        threshold: float = 100.0,
        alpha: float | None = None,
        gqa: str = "query",
        mode: str = "sampled",
        every_steps: int = 1,
    ) -> None:
        check_threshold(threshold)
        if alpha is not None:
            check_alpha(alpha)
        if gqa not in GQA:
            raise ValueError(f"gqa={gqa!r} must be one of {', '.join(map(repr, GQA))}.")
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} must be one of {', '.join(map(repr, MODES))}.")
        if isinstance(every_steps, bool) or not isinstance(every_steps, int) or every_steps < 1:
            raise ValueError(f"every_steps={every_steps!r} must be an integer of at least 1.")
        self.threshold, self.alpha, self.gqa, self.mode, self.every_steps = threshold, alpha, gqa, mode, every_steps
        self.largest: dict[str, list[float]] = {}
        self._found: MeasuredProjections | None = None
        self._forget()

    def _forget(self) -> None:
        self._attentions: list[ClippedAttention] = []
        self._modules: dict[str, nn.Module] = {}
        self._watch: LogitWatch | None = None
        self._hooks: list[Any] = []
        self._norms: dict[tuple[str, str], Tensor] = {}
        self._measures = False
        self._last: tuple[int, float, int] | None = None

    # ---- events ----

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_init_end(args, state, control, **kwargs)
        if sharding_engine(args) == "FSDP" and kwargs.get("model") is not None:
            self._found = measure_projections(kwargs["model"])  # afterwards its weights are in parts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._stop()
        self._forget()
        model = kwargs["model"]
        self._check_run(args, model)
        if not is_sharded(model):
            self._found = measure_projections(model)
        if self._found is None:
            raise RefusedError(
                "QKClipCallback came after the Trainer was built. Under FSDP2 pass it in callbacks=[...]."
            )
        self._attentions = clipped_attentions(model, self._found, self.threshold, self.gqa)
        if self.alpha is not None and all(a.alpha(self.gqa, self.alpha) is None for a in self._attentions):
            raise ValueError(
                f"alpha={self.alpha} divides a factor between query and key, and this model shares its keys between "
                "heads, so that the query takes it all. Leave alpha out, or use gqa='min'."
            )
        self._modules = {a.name: model.get_submodule(a.name) for a in self._attentions}
        if self.mode == "sampled":
            self._watch = LogitWatch(self._modules.values())
        else:
            self._hook_projections(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self._measures = (state.global_step + 1) % self.every_steps == 0 and not in_probe(state, 1)
        self._norms = {}
        if self._measures and self._watch is not None:
            self._watch.start(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._watch is not None:
            self._watch.stop()

    @in_turn(WRITE)
    @outside_probes
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._measures:
            return
        self._measures = False
        largest = self._over_ranks(args)
        if not any(value > -math.inf for heads in largest for value in heads.tolist()):
            raise RefusedError(
                "QKClipCallback measured no attention in this update: the forward does not come by the attention "
                "function that the config names. Use mode='bound'."
            )
        optimizer = kwargs["optimizer"]
        clipped = 0
        for attention, heads in zip(self._attentions, largest, strict=True):
            self.largest[attention.name] = heads.tolist()
            gamma = clip_factors(heads, self.threshold)
            if bool((gamma < 1).any()):
                clipped += int((gamma < 1).sum())
                self._clip(kwargs["model"], attention, gamma, optimizer)
        self._last = (state.global_step, max(max(heads.tolist()) for heads in largest), clipped)

    @in_turn(WRITE)
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs and self._last is not None and self._last[0] == state.global_step:
            found = {metrics.QK_CLIP_MAX_LOGIT: self._last[1], metrics.QK_CLIP_HEADS: float(self._last[2])}
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()

    # ---- helpers ----

    def _check_run(self, args: TrainingArguments, model: nn.Module) -> None:
        engine = sharding_engine(args)
        if engine is not None and not is_fsdp2():
            raise RefusedError(
                f"QKClipCallback scales rows of weights, and {engine} trains from copies or parts that it cannot "
                "reach. Train with DDP, FSDP2 or on one device."
            )
        parallel = AcceleratorState().parallelism_config if is_initialized() else None
        split = parallel is not None and (parallel.cp_enabled or parallel.sp_enabled)
        if split or (getattr(args, "sequence_parallel_size", None) or 1) > 1:
            raise RefusedError(
                "QKClipCallback needs whole rows and all heads on a process, and sequence parallelism deals them to "
                "several. Train with sequence_parallel_size=1."
            )
        if args.torch_compile:
            raise RefusedError("QKClipCallback measures between compiled steps. Set torch_compile=False.")
        if self.mode == "sampled" and any("flex" in name for name in attention_names(model)):
            raise RefusedError(
                "mode='sampled' does not read the masks of flex attention. Use mode='bound', or load the model with "
                "attn_implementation='sdpa'."
            )

    def _clip(self, model: nn.Module, attention: ClippedAttention, gamma: Tensor, optimizer: Any) -> None:
        alpha = attention.alpha(self.gqa, 0.5 if self.alpha is None else self.alpha)
        averaged = is_schedule_free(optimizer)  # the weights are between two iterates, which move together
        for name, (rows, factors) in attention.factors(gamma, alpha).items():
            out_dim = self._found.out_dims[name]  # type: ignore[union-attr]
            state = innermost(optimizer).state if averaged else None
            scale_rows(model.get_submodule(name), out_dim, rows, factors, state)

    def _over_ranks(self, args: TrainingArguments) -> list[Tensor]:
        """Return the largest logits of each attention over the batch of all ranks."""
        counts = [len(attention.query) for attention in self._attentions]
        mine = torch.cat([self._own(attention).to(args.device) for attention in self._attentions])
        if args.world_size > 1:
            torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX)
        return list(mine.cpu().split(counts))

    def _own(self, attention: ClippedAttention) -> Tensor:
        nothing = torch.full((len(attention.query),), -math.inf)
        if self._watch is not None:
            return self._watch.largest.get(self._modules[attention.name], nothing)
        query, key = (self._norms.get((attention.name, part)) for part in ("query", "key"))
        if query is None or key is None:
            return nothing
        return query * key.repeat_interleave(len(query) // len(key)) * abs(attention.scaling)

    def _hook_projections(self, model: nn.Module) -> None:
        for attention in self._attentions:
            if not attention.keeps_length:
                raise RefusedError(
                    f"mode='bound' needs queries and keys as long as their projections, and {attention.name} scales "
                    "them in between (as long rotary embeddings do). Use mode='sampled'."
                )
            for part, heads in (("query", attention.query), ("key", attention.key)):
                names = {name for feeds in heads for name in feeds}
                if len(names) != 1:
                    raise RefusedError(
                        f"mode='bound' needs one projection for the {part} of {attention.name}, which has "
                        f"{len(names)}. Use mode='sampled'."
                    )
                name = names.pop()
                hook = self._note_norms((attention.name, part), name, heads)
                self._hooks.append(model.get_submodule(name).register_forward_hook(hook))

    def _note_norms(self, place: tuple[str, str], name: str, heads: Heads) -> Any:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._measures and torch.is_grad_enabled():
                with torch.no_grad():
                    found = torch.stack([output[..., feeds[name]].float().norm(dim=-1).amax() for feeds in heads])
                    known = self._norms.get(place)
                    self._norms[place] = found if known is None else torch.maximum(known, found)

        return note

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
