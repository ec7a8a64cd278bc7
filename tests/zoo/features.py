"""Each feature that promises the untouched model's numbers, on one case."""

from __future__ import annotations

import contextlib
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

import hf_effi
from hf_effi.attention import check_varlen_attention, plan_shared_prefix, register_varlen_attention
from hf_effi.attention.shared_prefix import check_shared_prefix
from hf_effi.kernels import patch, tile_mlp
from hf_effi.kernels._targets import kernel_name
from hf_effi.layers.random_ltd import TokenDropping, drop_layer_tokens
from hf_effi.memory import ChunkFlow, stream_layers, tile_loss
from hf_effi.memory.layer_modes import LayerModes, decoder_layers
from hf_effi.trainers.mixins import ChunkFlowMixin

from .builders import CannotBuild
from .cases import DOCUMENTS, Call, Case, StockFails, next_token_loss, stock
from .compare import TOLERANCE, gradient_name, largest_difference, measure
from .grpo import exact_saving
from .planner import WITHIN, held_bytes, planned_bytes

#: roundings of every weight that a difference may have
_ROUNDINGS = 100
PACKAGE = str(Path(hf_effi.__file__).resolve().parent)


@dataclass
class Pair:
    """
    What a feature's context gives: what is expected, and how to compute the same with the feature on.

    Args:
        expected (`dict`): Of the untouched model, by name.
        model (`nn.Module`): With the feature on, in training mode.
        call (`Callable`): Returns the loss, with a graph unless the backward was run already, and the outputs.
        tolerance (`float`, *optional*, defaults to 0): What is allowed where that is more than the dtype's own.
        recomputes (`bool`, *optional*, defaults to `True`): Whether the feature runs parts of the model twice, so that
            under dropout the gradient could belong to other masks than the loss.
        case ([`Case`], *optional*): Whose rounding counts, where the untouched model is another one.
    """

    expected: dict[str, Tensor]
    model: nn.Module | None
    call: Call
    tolerance: float = 0.0
    recomputes: bool = True
    case: Case | None = None

    def measure(self, seed: int = 7) -> dict[str, Tensor]:
        if self.model is None:
            return self.call(None)[1]
        return measure(self.model, self.call, seed)


@dataclass(frozen=True)
class Feature:
    """
    Args:
        key (`str`): Short name: the column.
        open (`Callable`): `case -> context manager of a Pair`.
        kinds (`tuple[str, ...]`): Kinds of models that it is tried on.
        axes (`tuple[str, ...]`, *optional*): Axes that it does not look at, and that stay plain.
        layers (`int`, *optional*): It needs at least so many.
    """

    key: str
    open: Callable[[Case], AbstractContextManager[Pair]]
    kinds: tuple[str, ...] = ("causal",)
    without: tuple[str, ...] = ()
    layers: int | None = None
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Outcome:
    """
    Args:
        status (`str`): `"equal"`; `"refused"`; `"stock"`: the untouched model does not run; `"different"`; `"error"`:
            what the feature raised is not its own refusal.
        note (`str`): The reason, the difference or the error.
        difference (`float`): The largest, relative.
    """

    status: str
    note: str = ""
    difference: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status not in ("different", "error")


def run(feature: Feature, case: Case) -> Outcome:
    """Return what a feature does on a case."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.expected()
            with feature.open(case) as pair:
                return _compare(case, pair)
    except (StockFails, CannotBuild) as error:
        return Outcome("stock", str(error))
    except Exception as error:
        return _judge(error)


def _judge(error: Exception) -> Outcome:
    """A refusal is a ValueError that this package raises itself, or transformers on being given its attention."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    text = " ".join(str(error).split())
    ours = last.filename.startswith(PACKAGE)
    by_transformers = "attn_implementation" in text or "attention implementation" in text
    if isinstance(error, ValueError) and text and (ours or by_transformers):
        return Outcome("refused", text)
    mine = next((f for f in reversed(frames) if f.filename.startswith(PACKAGE)), None)
    where = f"{Path(last.filename).name}:{last.lineno} in {last.name}"
    if mine is not None and mine is not last:
        where += f", under {Path(mine.filename).name}:{mine.lineno} {mine.name}"
    return Outcome("error", f"{type(error).__name__}: {text[:240]} [{where}]")


def _compare(case: Case, pair: Pair) -> Outcome:
    tolerance = pair.tolerance or TOLERANCE[case.dtype]
    if pair.tolerance:
        tolerance = max(pair.tolerance, 0 if pair.model is None else TOLERANCE[case.dtype])
    if not all(torch.isfinite(value).all() for value in pair.expected.values()):
        return Outcome("stock", "the loss or a gradient of the untouched model is not finite")
    actual = pair.measure()
    shared = {name: value for name, value in pair.expected.items() if name in actual or name.startswith("grad")}
    if pair.model is not None and not any(name.startswith("grad") for name in pair.expected):
        return Outcome("stock", "the untouched model has no gradient")
    if pair.model is not None and not any(name.startswith("grad") for name in actual):
        return Outcome("error", "no gradient at all")
    worst, name = largest_difference(shared, actual)
    if worst <= tolerance:
        return Outcome("equal", difference=worst)
    if worst <= _ROUNDINGS * (pair.case or case).rounding:
        return Outcome("equal", "as far as the rounding of its weights goes", worst)
    if case.unsound:
        return Outcome("stock", "the untouched model reads memory that nobody wrote to")
    if case.noisy and pair.model is not None:
        problem = _inconsistent(pair)
        if problem is None:
            return Outcome("equal", "other dropout masks of the same law")
        if not (pair.case or case).repeats:
            return Outcome("stock", "one seed gives two losses of the untouched model")
        return Outcome("different", problem, worst)
    if pair.model is None:
        return Outcome(
            "different", f"{name}: planned {float(actual[name]):.0f}, real {float(shared[name]):.0f}", worst
        )
    return Outcome("different", f"{name} off by {worst:.1e}", worst)


def _inconsistent(pair: Pair) -> str | None:
    """With dropout: say what is wrong unless the loss is noisy and its gradient is the one of the same masks."""
    model = pair.model
    if torch.equal(pair.measure(7)["loss"], pair.measure(8)["loss"]):
        return "the dropout of the model is lost"
    if not torch.equal(pair.measure(7)["loss"], pair.measure(7)["loss"]):
        return "one seed gives two losses"
    weights = {gradient_name(n): weight for n, weight in model.named_parameters() if weight.requires_grad}
    if not pair.recomputes:
        return None
    grads = pair.measure(7)
    generator = torch.Generator().manual_seed(5)
    ways = {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) for n, w in weights.items()}
    for module in model.modules():
        # The row of padding is read and gets no gradient, by torch's own rule.
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            for name in (name for name, weight in weights.items() if weight is module.weight):
                ways[name][module.padding_idx] = 0
    slope = sum(float((grads[name] * way).sum()) for name, way in ways.items() if name in grads)
    size = 1e-6 if all(w.dtype == torch.float64 for w in weights.values()) else 1e-3
    values = []
    for step in (size, -2 * size):
        with torch.no_grad():
            for name, weight in weights.items():
                weight.add_(ways[name], alpha=step)
        values.append(float(pair.measure(7)["loss"]))
    true = (values[0] - values[1]) / (2 * size)
    if abs(true - slope) <= (1e-3 if size == 1e-6 else 5e-2) * max(abs(true), abs(slope)) + 1e-6:
        return None
    return f"gradient along a direction {slope:.5g}, finite difference {true:.5g}: it belongs to other dropout masks"


# --- features that are put on a model -------------------------------------------------------------------------------


def _patched(apply: Callable[[nn.Module], Any]) -> Callable[[Case], AbstractContextManager[Pair]]:
    """Put on the model in evaluation mode, as it was loaded, then trained."""

    @contextlib.contextmanager
    def open_(case: Case) -> Iterator[Pair]:
        model = case.fresh()
        with apply(model):
            yield Pair(case.expected(), case.ready(model), case.call)

    return open_


def _gated_mlp_key(model: nn.Module) -> str:
    names = [kernel_name(module) for module in model.modules()]
    return next((key for key in ("SwiGLUMLP", "GeGLUMLP") if key in names), "SwiGLUMLP")


@contextlib.contextmanager
def _loss_in_tiles(case: Case) -> Iterator[Pair]:
    model = case.fresh()

    def call(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        names = case._accepted(model)
        batch = {name: value for name, value in case.batch.items() if name in names}
        return model(**batch, **({"use_cache": False} if "use_cache" in names else {})).loss, {}

    with tile_loss(model, num_shards=3):
        expected = {name: value for name, value in case.expected().items() if name != "logits"}
        yield Pair(expected, case.ready(model), call)


@contextlib.contextmanager
def _head(case: Case) -> Iterator[Pair]:
    """Against TRL's own head, which it stands in for."""

    def with_head() -> nn.Module:
        model = case.fresh()
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_fused_lm_head(inner, outputs=("log_probs", "entropy"))
        return model

    def call(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        names = case._accepted(model) - {"use_cache"}
        batch = {name: value for name, value in case.batch.items() if name in names | {"labels"}}
        out = model(**batch, fused_lm_head=True)
        return out.loss + 0.1 * out.entropy.sum(), {"log_probs": out.log_probs, "entropy": out.entropy}

    with stock():
        untouched = with_head()
        expected = measure(case.ready(untouched), call)
    model = with_head()
    with patch(model, {"LMHead": "hf_effi"}):
        yield Pair(expected, case.ready(model), call)


@contextlib.contextmanager
def _fused_lora(case: Case) -> Iterator[Pair]:
    if case.row.get("lora") != "yes":
        case = Case(case.family, {**case.row, "lora": "yes"}, case.layers, case.dtype)
    model = case.fresh()
    with patch(model, {"LoRALinear": "hf_effi"}):
        yield Pair(case.expected(), case.ready(model), case.call, case=case)


@contextlib.contextmanager
def _modes(case: Case, modes: tuple[str, ...]) -> Iterator[Pair]:
    """Against the model without checkpointing."""
    model = case.fresh()
    with stock():
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if case.row.get("lora") == "yes":
            model.enable_input_require_grads()
        expected = case.expected()
    layers = len(decoder_layers(model))
    with LayerModes(model, [modes[index % len(modes)] for index in range(layers)]):
        yield Pair(expected, model.train(), case.call)


# --- attention ------------------------------------------------------------------------------------------------------


def _documents_call(case: Case) -> Call:
    """The documents of the packed row, each as a row of its own."""

    def call(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        ids, labels = case.batch["input_ids"], case.batch["labels"]
        extra = {"use_cache": False} if "use_cache" in case._accepted(model) else {}
        logits = [model(input_ids=ids[:, start:end], **extra).logits for start, end in DOCUMENTS]
        loss = sum(
            F.cross_entropy(z[0, :-1], labels[0, start + 1 : end], reduction="sum")
            for z, (start, end) in zip(logits, DOCUMENTS, strict=True)
        )
        return loss / (labels != -100).sum(), {"logits": torch.cat(logits, 1)}

    return call


def _packed_call(case: Case) -> Call:
    def call(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        batch = {name: value for name, value in case.batch.items() if name != "labels"}
        extra = {"use_cache": False} if "use_cache" in case._accepted(model) else {}
        logits = model(**batch, **extra).logits
        return next_token_loss(logits, case.batch["labels"]), {"logits": logits}

    return call


@contextlib.contextmanager
def _varlen(case: Case) -> Iterator[Pair]:
    if "packed" not in case.cache:
        case.cache["packed"] = None
        if case.packed:
            with stock():
                case.cache["packed"] = measure(case.ready(case.fresh()), _documents_call(case))
    expected = case.cache["packed"] if case.packed else case.expected()
    model = case.fresh()
    model.set_attn_implementation(register_varlen_attention())
    check_varlen_attention(model)
    yield Pair(expected, case.ready(model), _packed_call(case) if case.packed else case.call)


_PROMPT, _COMPLETIONS = [3, 4, 5, 6, 7], [[8, 9, 10], [11, 12], [13, 14, 15, 16]]


@contextlib.contextmanager
def _shared_prefix(case: Case) -> Iterator[Pair]:
    prompts = [_PROMPT, _PROMPT, [20, 21, 22]]
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, _COMPLETIONS, strict=True)]
    total = sum(map(len, _COMPLETIONS))

    def separately(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        extra = {"use_cache": False} if "use_cache" in case._accepted(model) else {}
        scores = []
        for prompt, row in zip(prompts, rows, strict=True):
            log_p = model(input_ids=torch.tensor([row]), **extra).logits.log_softmax(-1)[0]
            scores.append(log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(row[len(prompt) :])[:, None])[:, 0])
        return -sum(score.sum() for score in scores) / total, {"log_probs": torch.cat(scores)}

    layout = plan_shared_prefix(prompts, [len(c) for c in _COMPLETIONS])

    def together(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = layout.model_inputs(rows)
        del inputs["labels"]
        extra = {"use_cache": False} if "use_cache" in case._accepted(model) else {}
        log_p = model(**inputs, **extra).logits.log_softmax(-1)[:, :-1]
        values = F.pad(log_p.gather(2, inputs["input_ids"][:, 1:, None])[..., 0], (0, 1))
        scores = layout.to_completions(values)
        kept = torch.cat([scores[i, : len(c)] for i, c in enumerate(_COMPLETIONS)])
        return -kept.sum() / total, {"log_probs": kept}

    with stock():
        expected = measure(case.ready(case.fresh()), separately)
    model = case.fresh()
    model.set_attn_implementation(register_varlen_attention())
    check_shared_prefix(model)
    yield Pair(expected, case.ready(model), together)


# --- ChunkFlow ------------------------------------------------------------------------------------------------------


class _ChunkFlowTrainer(ChunkFlowMixin, Trainer):
    pass


@contextlib.contextmanager
def _chunk_flow(case: Case) -> Iterator[Pair]:
    model = case.fresh()
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=case.row.get("checkpointing") == "yes",
        )
        with stock():
            Trainer(model, args, train_dataset=rows)
        trainer = _ChunkFlowTrainer(model, args, train_dataset=rows, chunk_flow=ChunkFlow(chunk_size=6))
        trainer.current_gradient_accumulation_steps = 1
        batch = dict(case.batch.items())
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        count = (labels != -100).sum()

        def call(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
            return trainer.training_step(model, dict(batch), count), {}

        expected = {name: value for name, value in case.expected().items() if name != "logits"}
        yield Pair(expected, case.ready(model), call)


# --- memory -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _planner(case: Case) -> Iterator[Pair]:
    expected = {name: torch.tensor(float(value)) for name, value in held_bytes(case).items()}
    with stock():
        config = case.fresh().config

    def call(model: None) -> tuple[None, dict[str, Tensor]]:
        return None, {name: torch.tensor(float(value)) for name, value in planned_bytes(config, case).items()}

    yield Pair(expected, None, call, tolerance=WITHIN)


# --- the table ------------------------------------------------------------------------------------------------------

EVERY = ("causal", "seq2seq", "masked", "classifier")

FEATURES: tuple[Feature, ...] = (
    Feature("trim", lambda case: exact_saving(case, "trim"), without=("padding", "packing")),
    Feature("sort", lambda case: exact_saving(case, "sort"), without=("padding", "packing")),
    Feature("skip", lambda case: exact_saving(case, "skip"), without=("padding", "packing")),
    Feature("pack", lambda case: exact_saving(case, "pack"), without=("padding", "packing")),
    Feature("share", lambda case: exact_saving(case, "share"), without=("padding", "packing")),
    Feature("varlen", _varlen),
    Feature("shared prefix", _shared_prefix, without=("padding", "packing")),
    Feature("tiled MLP", _patched(lambda model: tile_mlp(model, num_shards=3)), EVERY),
    Feature("tiled loss", _loss_in_tiles, EVERY),
    Feature("streamed layers", _patched(lambda model: stream_layers(model, num_chunks=3)), EVERY),
    Feature("ChunkFlow", _chunk_flow),
    Feature("offload", lambda case: _modes(case, ("offload",)), EVERY),
    Feature("layer modes", lambda case: _modes(case, ("selective", "keep", "checkpoint", "offload")), EVERY),
    Feature(
        "random-LTD off", _patched(lambda model: drop_layer_tokens(model, TokenDropping(seed=0))), EVERY, layers=3
    ),
    Feature("fused LoRA", _fused_lora, EVERY),
    Feature("LM head", _head, dtype=torch.float32),
    Feature("kernel patch", _patched(lambda model: patch(model, {_gated_mlp_key(model): "hf_effi"})), EVERY),
    Feature(
        "memory planner", _planner, without=("padding", "packing", "softcap", "rope", "router"), dtype=torch.float32
    ),
)
