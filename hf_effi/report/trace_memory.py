"""Read the memory of a training step off a model's own code: one forward pass on tensors that have no data."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from ..functional.memory import ForwardTrace, Parameter, StepFlops
from ..functional.saved_bytes import SavedBytes
from ..parallel.layer_modes import decoder_layers
from ..parallel.layer_profile import LayerProbe

#: how the MLP of a decoder layer is called in transformers
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
#: Not in the table of masks, so that transformers builds none and the attention is the fused causal one.
_ATTENTION = "hf_effi_maskless_sdpa"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(source: str) -> PreTrainedConfig:
    """
    Return a model config from a `config.json`, a folder that has one, or the name of a model on the Hub.

    Raises:
        ValueError: there is none, or it is no config of a causal language model.
    """
    path = Path(source)
    if path.name.endswith(".json") and (path.name != "config.json" or not path.exists()):
        raise ValueError(f"{source!r} is no model config: give a config.json that exists, its folder, or a Hub name.")
    try:
        config = AutoConfig.from_pretrained(str(path.parent if path.name.endswith(".json") else source))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source!r} is no model config: {str(error).splitlines()[0]}") from error
    return config.get_text_config()


@contextlib.contextmanager
def _attention_for(config: PreTrainedConfig) -> Iterator[str]:
    """Yield the attention to trace with: fused and without a mask, or eager where the model has no other."""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{type(config).__name__} is no config of a causal language model.")
    if not AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa:
        yield "eager"
        return
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    try:
        yield _ATTENTION
    finally:
        AttentionInterface._global_mapping.pop(_ATTENTION)


class TracedModel:
    """
    A model without data: its parameters, and what a forward pass of it saves.

    Args:
        config (`PreTrainedConfig`): The model.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype of the weights.
        autocast (`bool`, *optional*, defaults to `False`): Whether the forward pass runs under bf16 autocast, as with
            `bf16=True` in the training arguments.
        lora_rank (`int`, *optional*): Train LoRA matrices of this rank only.
        lora_targets (`list[str]` or `str`, *optional*, defaults to `"all-linear"`): As in PEFT.
        four_bit (`bool`, *optional*, defaults to `False`): Keep the linear weights of the decoder in 4 bits.

    Raises:
        ValueError: an unknown dtype; 4-bit weights without LoRA.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        dtype: str = "float32",
        autocast: bool = False,
        lora_rank: int | None = None,
        lora_targets: list[str] | str = "all-linear",
        four_bit: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known. Known: {', '.join(DTYPES)}.")
        if four_bit and lora_rank is None:
            raise ValueError("4-bit weights cannot be trained: give a LoRA rank as well.")
        config = copy.deepcopy(config)  # building a model writes into it
        self.config, self.autocast, self._four_bit = config, autocast, four_bit
        with torch.device("meta"), _attention_for(config) as attention:
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation=attention)
            model.config.use_cache = False
            model.activation_checkpointing_enable()
            self.layers = decoder_layers(model)
            linears = [m for layer in self.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
            if lora_rank is not None:
                model = _with_lora(model, lora_rank, lora_targets)
        # Fake tensors instead of meta ones: they dispatch like those of a CPU, to fused attention and to autocast.
        self._mode = FakeTensorMode()
        with self._mode:
            _replace_tensors(model)
        self.model = model.train()
        four_bit_weights = {id(linear.weight) for linear in linears} if four_bit else set()
        self.parameters = [
            Parameter(tuple(p.shape), p.element_size(), p.requires_grad, id(p) in four_bit_weights)
            for p in model.parameters()
        ]

    def trace(self, batch: int, seq_len: int) -> ForwardTrace:
        """
        Return what a forward pass of `batch` rows of `seq_len` tokens saves.

        Args:
            batch (`int`): Rows of the micro-batch.
            seq_len (`int`): Tokens of a row on one rank.
        """
        try:
            return self._trace(batch, seq_len)
        except RuntimeError as error:  # what fake tensors raise where an operator needs the data
            raise ValueError(
                f"{type(self.model).__name__} cannot be traced without data: {str(error).splitlines()[0]} Mixture-of-experts "
                "models need dtype='bfloat16'."
            ) from error

    def _trace(self, batch: int, seq_len: int) -> ForwardTrace:
        with self._mode, _attention_for(self.config), self._precision():
            ids = torch.zeros(batch, seq_len, dtype=torch.long)
            with LayerProbe(self.model) as probe:
                whole = self._saved(lambda: self.model(input_ids=ids, labels=ids))
            backbone = self._saved(lambda: _base_model(self.model)(input_ids=ids))
            mlps = tuple(self._mlp_bytes(layer, batch, seq_len) for layer in self.layers)
        layers = [probe.measured[index] for index in range(len(self.layers))]
        inputs = tuple(layer["input_bytes"] for layer in layers)
        copies = [self._weight_copies(layer) for layer in self.layers]
        return ForwardTrace(
            tokens=batch * seq_len,
            layer_inputs=inputs,
            layer_kept=tuple(layer["kept_bytes"] - copied for layer, copied in zip(layers, copies, strict=True)),
            layer_attention=tuple(layer["attention_bytes"] for layer in layers),
            layer_mlp=mlps,
            outside=backbone - sum(inputs),
            logits=whole - backbone,
            logits_width=self.config.vocab_size,
            hidden_size=self.config.hidden_size,
            weight_copies=0 if self._four_bit else sum(copies),  # 4-bit weights are unpacked anew at each use
            attention_width=self._attention_width(),
            itemsize=2 if self.autocast else self.parameters[0].itemsize,
        )

    def flops(self, batch: int, seq_len: int) -> StepFlops:
        """Return the forward FLOPs of a micro-batch: 2 per weight and token, and causal attention."""
        tokens = batch * seq_len
        linear = sum(p.numel() for layer in self.layers for p in layer.parameters() if p.dim() > 1)
        heads, head_dim = self.config.num_attention_heads, self._head_dim()
        attention = 2 * batch * seq_len**2 * heads * head_dim * len(self.layers)
        return StepFlops(2.0 * tokens * linear, float(attention), 2.0 * tokens * self._head_size())

    def kv_shape(self) -> dict[str, int]:
        """Return `layers`, `kv_heads` and `head_dim`."""
        kv_heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        return {"layers": len(self.layers), "kv_heads": kv_heads, "head_dim": self._head_dim()}

    def _head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    def _attention_width(self) -> int:
        shape = self.kv_shape()
        return (self.config.num_attention_heads + 2 * shape["kv_heads"]) * shape["head_dim"]

    def _head_size(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    def _precision(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext()

    def _saved(self, run: Any) -> int:
        with SavedBytes(exclude=self.model.parameters()) as saved:
            run()
        return saved.total

    def _mlp_bytes(self, layer: Any, batch: int, seq_len: int) -> int:
        mlp = next((getattr(layer, name) for name in _MLP_NAMES if hasattr(layer, name)), None)
        if mlp is None:
            return 0
        hidden = torch.zeros(batch, seq_len, self.config.hidden_size, dtype=next(mlp.parameters()).dtype)
        return self._saved(lambda: mlp(hidden.requires_grad_())) - self._weight_copies(mlp)

    def _weight_copies(self, module: Any) -> int:
        """Bytes of the copies that autocast makes of fp32 weights; autograd saves them beside the activations."""
        if not self.autocast:
            return 0
        linears = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
        return sum(2 * m.weight.numel() for m in linears if m.weight.dtype == torch.float32)


def _replace_tensors(model: torch.nn.Module) -> None:
    """Put an empty tensor of the current mode in place of each parameter and buffer; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = made.get(id(old))
                if new is None:
                    new = torch.nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
                module._parameters[name] = made.setdefault(id(old), new)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype)


def _with_lora(model: Any, rank: int, targets: list[str] | str) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))


def _base_model(model: Any) -> Any:
    """Return the model without its LM head, also below PEFT's wrapper."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model.base_model
