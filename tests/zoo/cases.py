"""One class under one row of the design: the untouched model, its batch and what it computes."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from .builders import PAD, VOCAB, CannotBuild, Family, build
from .compare import largest_difference, measure
from .design import Row, change_config

ROWS, LENGTH, PADDED = 2, 16, 5
#: where documents of a packed row begin and end
DOCUMENTS = ((0, 7), (7, 12), (12, 16))
Call = Callable[[nn.Module], tuple[Tensor, dict[str, Tensor]]]


class StockFails(Exception):
    """The untouched model does not run this; the message is its own error."""


@contextlib.contextmanager
def stock() -> Iterator[None]:
    """What happens inside is upstream's: an error there says nothing about a feature."""
    try:
        yield
    except (StockFails, CannotBuild):
        raise
    except Exception as error:
        raise StockFails(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


class Case:
    """
    Args:
        family ([`Family`]): The class.
        row (`dict[str, str]`): Levels of the axes; axes that are absent are at their first level.
        layers (`int`, *optional*): At least so many layers.
        dtype (`torch.dtype`, *optional*, defaults to fp64): The one that is tried first; fp32 is the other.
    """

    def __init__(
        self, family: Family, row: Row, layers: int | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        self.family, self.row, self.layers = family, row, layers
        self.dtype, self.attention = dtype, "sdpa"
        self.cache: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"{self.family.name} {describe(self.row)}"

    @property
    def noisy(self) -> bool:
        return self.row.get("dropout", "none") != "none"

    @property
    def packed(self) -> bool:
        return self.row.get("packing", "no") == "yes"

    @functools.cached_property
    def pristine(self) -> nn.Module:
        """The untouched model, in evaluation mode, in fp64 and with sdpa where it runs so, else as it does."""
        if "fails" in self.cache:
            raise StockFails(self.cache["fails"])
        reasons = []
        for dtype in dict.fromkeys((self.dtype, torch.float32)):
            for attention in ("sdpa", "eager"):
                try:
                    model = self._build(dtype, attention)
                    found = measure(self._ready(copy.deepcopy(model)), self.call)
                    if not all(torch.isfinite(value).all() for value in found.values()):
                        raise StockFails("its loss or gradients are not finite")
                except CannotBuild as error:
                    reasons.append(str(error))
                except Exception as error:
                    reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                else:
                    self.dtype, self.attention = dtype, attention
                    self.cache["expected"] = found
                    return model
        self.cache["fails"] = next((r for r in reasons if "does not support an attention" not in r), reasons[0])
        raise StockFails(self.cache["fails"])

    def _build(self, dtype: torch.dtype, attention: str) -> nn.Module:
        change = functools.partial(change_config, row=self.row)
        model = build(self.family, change, layers=self.layers, dtype=dtype, attention=attention).model
        if self.row.get("lora") == "yes":
            model = add_lora(model)
        return model.eval()

    def _ready(self, model: nn.Module) -> nn.Module:
        if self.row.get("checkpointing") == "yes":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if self.row.get("lora") == "yes":
                model.enable_input_require_grads()
        return model.train()

    def fresh(self) -> nn.Module:
        """Return a copy of the untouched model in evaluation mode, as `from_pretrained` returns it."""
        with stock():
            return copy.deepcopy(self.pristine)

    def ready(self, model: nn.Module) -> nn.Module:
        """Put a model into training mode, with the checkpointing of the row."""
        with stock():
            return self._ready(model)

    def expected(self) -> dict[str, Tensor]:
        """Return loss, outputs and gradients of the untouched model."""
        with stock():
            _ = self.pristine
        return self.cache["expected"]

    @functools.cached_property
    def rounding(self) -> float:
        """How far the untouched model is from itself with the last bit of each weight changed, at most 1e-6."""
        model = self.ready(self.fresh())
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.is_floating_point():
                    signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight.dtype) * 2 - 1
                    weight.mul_(1 + signs * torch.finfo(weight.dtype).eps)
        return min(largest_difference(self.expected(), measure(model, self.call))[0], 1e-6)

    @functools.cached_property
    def repeats(self) -> bool:
        """Whether one seed gives the untouched model one loss."""
        again = measure(self.ready(self.fresh()), self.call)
        return torch.equal(self.expected()["loss"], again["loss"])

    @functools.cached_property
    def unsound(self) -> bool:
        """Whether the untouched model computes with uninitialized memory: then even two of its own runs differ."""
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills such memory with NaN
        try:
            found = measure(self.ready(self.fresh()), self.call)
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        return not all(torch.isfinite(value).all() for value in found.values())

    # --- the batch -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def batch(self) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        if self.packed:
            return packed_batch(ids[:1])
        batch = {"input_ids": ids}
        side = self.row.get("padding", "none")
        if side != "none":
            mask = torch.ones_like(ids)
            hidden = slice(0, PADDED) if side == "left" else slice(LENGTH - PADDED, LENGTH)
            mask[1, hidden] = 0
            batch = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
        return {**batch, **self._labels(batch)}

    def _labels(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if self.family.kind == "classifier":
            return {"labels": torch.tensor([0, 1])}
        if self.family.kind == "seq2seq":
            return {"labels": ids.flip(1)[:, : LENGTH // 2].contiguous()}
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
        if mask is not None and not mask[1, 0]:
            labels = labels.clone()
            labels[1, PADDED] = -100  # padding would have to predict it
        return {"labels": labels}

    def call(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the model's own loss and its logits at real tokens."""
        batch = {name: value for name, value in self.batch.items() if name in self._accepted(model)}
        extra = {"use_cache": False} if "use_cache" in self._accepted(model) else {}
        outputs = model(**batch, **extra)
        logits = outputs.logits
        loss = outputs.loss if "labels" in batch and getattr(outputs, "loss", None) is not None else None
        if loss is None:
            loss = next_token_loss(logits, self.batch["labels"])
        mask = self.batch.get("attention_mask")
        if mask is not None and logits.shape[:2] == mask.shape:
            logits = logits[mask.bool()]
        return loss, {"logits": logits}

    def _accepted(self, model: nn.Module) -> set[str]:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = inspect.signature(type(inner).forward).parameters
        known = {"input_ids", "attention_mask", "labels", "position_ids", "use_cache"}
        kinds = {p.kind for p in names.values()}
        return known if inspect.Parameter.VAR_KEYWORD in kinds else known & set(names)


def describe(row: Row) -> str:
    """Return the levels of a row that are not plain."""
    plain = {"none", "no", "default", "several", "as it is", "off", "always"}
    return ", ".join(f"{name}={level}" for name, level in row.items() if level not in plain) or "plain"


def packed_batch(ids: Tensor) -> dict[str, Tensor]:
    """One row of documents whose positions begin again; the first token of each has no label."""
    labels = ids.clone()
    for start, _ in DOCUMENTS:
        labels[:, start] = -100
    positions = torch.cat([torch.arange(end - start) for start, end in DOCUMENTS])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the next token, averaged over those with a label."""
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100)


def add_lora(model: nn.Module, rank: int = 4) -> nn.Module:
    """Wrap a model by PEFT with adapters that are not zero."""
    config = LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.data.normal_(0, 0.2)
    return wrapped
