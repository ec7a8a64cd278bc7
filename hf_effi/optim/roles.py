"""What each parameter of a model is to an optimizer: a hidden matrix, an embedding, a norm, a router, and so on."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

#: role -> what it means, in the words of the report
ROLES = {
    "hidden": "a matrix inside the layers",
    "experts": "the matrices of several experts in one tensor",
    "embedding": "an embedding",
    "head": "the output layer",
    "router": "the router of a mixture of experts",
    "adapter": "a factor of a LoRA adapter",
    "norm": "the gain of a normalisation",
    "bias": "a bias",
    "small": "a matrix with a side shorter than 8",
    "other": "neither a matrix nor one of the kinds above",
}
#: The shortest side of a matrix for which a rule of matrices is worth anything.
SMALLEST_SIDE = 8
#: What `Trainer.get_decay_parameter_names` leaves out of weight decay, beside the modules of `nn.LayerNorm`.
_TRAINER_NO_DECAY = tuple(
    re.compile(p) for p in (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
)
_HEADS = ("lm_head", "score", "classifier", "qa_outputs", "embed_out")
_ROUTER_NAMES = ("gate", "router", "wg")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclasses.dataclass(frozen=True)
class ParameterRole:
    """
    One trainable parameter and what it is.

    Args:
        name (`str`): Its first name in `named_parameters()`.
        parameter (`nn.Parameter`): Itself.
        role (`str`): One of [`ROLES`].
        reason (`str`): Why, in a few words, for the report.
        decays (`bool`): Whether weight decay applies to it; as in the Trainer, less `no_decay` of the rules.
        lr_factor (`float`): Its LR as a multiple of the optimizer's.
        module (`nn.Module`): The module that holds it.
    """

    name: str
    parameter: nn.Parameter
    role: str
    reason: str
    decays: bool
    lr_factor: float
    module: nn.Module


@dataclasses.dataclass(frozen=True)
class GroupRules:
    """
    Learning rates and weight decay by parameter, for every optimizer.

    The LR of a parameter is the optimizer's times `layer_decay^(L - l)` for layer l of L (the embeddings one power
    more than layer 0, the head and what lies above the layers none) times `backbone_factor` for all but the head, or
    `head_factor` for the head, times `lora_plus_ratio` for the `B` factors of LoRA, times the factors of all patterns
    in `lr_factors` that are found in its name. A tied weight counts as the embedding.

    Papers: layer decay: Howard and Ruder, ULMFiT (1801.06146); `backbone_factor`: SLCA (2303.05118), 0.01;
    `lora_plus_ratio`: LoRA+ (2402.12354), 16.

    Args:
        layer_decay (`float`, *optional*, defaults to 1.0): In (0, 1].
        backbone_factor, head_factor, lora_plus_ratio (`float`, *optional*, default to 1.0): Above 0.
        lr_factors (`Mapping[str, float]`, *optional*): Regular expression -> factor of at least 0.
        no_decay (`Sequence[str]`, *optional*): Regular expressions; what they are found in does not decay, beside
            what the Trainer leaves out (biases and norms).

    Raises:
        ValueError: a value out of range, a pattern that does not compile.

    Example:
    ```python
    >>> rules = GroupRules(lr_factors={r"\\.q_proj\\.": 0.5})
    >>> rules.lr_factors[r"\\.q_proj\\."]
    0.5

    ```
    """

    layer_decay: float = 1.0
    backbone_factor: float = 1.0
    head_factor: float = 1.0
    lora_plus_ratio: float = 1.0
    lr_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    no_decay: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("layer_decay", "backbone_factor", "head_factor", "lora_plus_ratio"):
            _check_factor(name, getattr(self, name), above=0.0)
        if self.layer_decay > 1:
            raise ValueError(f"layer_decay={self.layer_decay} must be in (0, 1]. 1 gives every layer the same LR.")
        if not isinstance(self.lr_factors, Mapping):
            raise ValueError(
                f"lr_factors={self.lr_factors!r} must map a pattern to a factor, e.g. {{'lm_head': 0.1}}."
            )
        if isinstance(self.no_decay, str) or not isinstance(self.no_decay, Sequence):
            raise ValueError(f"no_decay={self.no_decay!r} must be a list of patterns, e.g. ['embed'].")
        for pattern, factor in self.lr_factors.items():
            _compiled("lr_factors", pattern)
            _check_factor(f"lr_factors[{pattern!r}]", factor)
        for pattern in self.no_decay:
            _compiled("no_decay", pattern)


def _check_factor(name: str, value: Any, above: float | None = None) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (above is not None and value <= above):
        raise ValueError(f"{name}={value!r} must be a number {'above' if above is not None else 'of at least'} 0.")


def _compiled(name: str, pattern: Any) -> re.Pattern:
    if not isinstance(pattern, str):
        raise ValueError(
            f"{name} has {pattern!r}, which is no regular expression. Write e.g. 'embed' or '\\.q_proj\\.'."
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} has the pattern {pattern!r}, which does not compile: {error}.") from error


def parameter_roles(model: nn.Module, rules: GroupRules | None = None) -> list[ParameterRole]:
    """
    Return one [`ParameterRole`] for every trainable parameter, each once, in the order of `named_parameters()`.

    Args:
        model (`nn.Module`): Any model; of a transformers model the embeddings, the head and the number of experts are
            asked, of others the types and names of the modules decide.
        rules (`GroupRules`, *optional*): Learning rates and weight decay by parameter.

    Raises:
        ValueError: nothing is trainable, or a rule that meets no parameter.

    Example:
    ```python
    >>> model = nn.ModuleDict({"embed": nn.Embedding(32, 16), "mlp": nn.Linear(16, 16), "norm": nn.LayerNorm(16)})
    >>> [(role.name, role.role, role.decays) for role in parameter_roles(model)][:3]
    [('embed.weight', 'embedding', True), ('mlp.weight', 'hidden', True), ('mlp.bias', 'bias', False)]

    ```
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={type(model).__name__} is not a torch.nn.Module. Pass the model whose weights train.")
    rules = rules or GroupRules()
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    if not names:
        raise ValueError("The model has no trainable parameter. Unfreeze some before the optimizer is made.")
    facts = _ModelFacts(model)
    found = []
    for parameter, known in names.items():
        kinds = {name: facts.role(name, parameter) for name in known}
        # A tied weight is what is most particular about it: an embedding that is the head too is an embedding.
        name = next((n for n in known if kinds[n][0] == "embedding"), known[0])
        role, reason = kinds[name]
        if len(known) > 1:
            reason += ", tied to " + ", ".join(n for n in known if n != name)
        found.append(
            ParameterRole(
                known[0],
                parameter,
                role,
                reason,
                _decays(known, facts, rules),
                facts.factor(name, role, rules),
                facts.modules[name.rpartition(".")[0]],
            )
        )
    _check_met(found, names, rules)
    return found


def _decays(names: Sequence[str], facts: _ModelFacts, rules: GroupRules) -> bool:
    # As `get_parameter_names` of transformers reads them: the first name, without case.
    plain = names[0].lower()
    module = facts.modules[names[0].rpartition(".")[0]]
    if isinstance(module, nn.LayerNorm) or any(p.search(plain) for p in _TRAINER_NO_DECAY):
        return False
    return not any(re.search(pattern, name) for pattern in rules.no_decay for name in names)


def _check_met(found: Sequence[ParameterRole], names: Mapping[nn.Parameter, list[str]], rules: GroupRules) -> None:
    every = [name for known in names.values() for name in known]
    for option, patterns in (("lr_factors", rules.lr_factors), ("no_decay", rules.no_decay)):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in every):
                raise ValueError(
                    f"{option}: no trainable parameter has {pattern!r} in its name, e.g. {every[0]!r} is one. "
                    "Remove the pattern or mend it."
                )
    if rules.lora_plus_ratio != 1 and not any(_is_lora_b(role.name) for role in found):
        raise ValueError(
            f"lora_plus_ratio={rules.lora_plus_ratio} acts on the B factors of LoRA, and the model has none that "
            "train. Wrap it with peft.get_peft_model first, or leave the ratio out."
        )
    if rules.head_factor != 1 and not any(role.role == "head" for role in found):
        raise ValueError(f"head_factor={rules.head_factor} acts on a head, and no trainable parameter is one.")
    if rules.layer_decay != 1 and not any(_LAYER.search(role.name) for role in found):
        raise ValueError(
            f"layer_decay={rules.layer_decay} needs numbered layers (`layers.3.`), and no trainable parameter has one."
        )


def _is_lora_b(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


class _ModelFacts:
    """What is asked of a model once: its modules by name, its embeddings and head, its experts, its layers."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.embeddings = set(_weights(model, "get_input_embeddings"))
        self.heads = set(_weights(model, "get_output_embeddings"))
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        counts = (getattr(config, count, None) for count in _EXPERT_COUNTS)
        self.experts = {count for count in counts if isinstance(count, int) and count > 1}
        layers = [int(m.group(1)) for name, _ in model.named_parameters() if (m := _LAYER.search(name))]
        self.top = max(layers, default=0)

    def role(self, name: str, parameter: nn.Parameter) -> tuple[str, str]:
        """Return the role of a parameter under one of its names, and why."""
        path, _, leaf = name.rpartition(".")
        module = self.modules[path]
        kind = type(module).__name__
        last = path.rpartition(".")[2]
        if "lora_" in name:
            return "adapter", f"{leaf} of {last}, by its name"
        if parameter in self.embeddings or isinstance(module, nn.Embedding):
            return "embedding", f"weight of {kind}"
        if parameter in self.heads or any(part in _HEADS for part in path.split(".")):
            return ("bias", f"bias of {last}") if leaf == "bias" else ("head", f"weight of {last}")
        if leaf.endswith("bias"):
            return "bias", f"bias of {last}"
        if parameter.ndim <= 1 and "norm" in f"{kind}.{last}.{leaf}".lower():
            return "norm", f"gain of {kind}"
        if parameter.ndim == 2 and self._routes(module, kind, last, parameter):
            return "router", f"{last}, one row for each expert"
        if parameter.ndim == 3 and "expert" in f"{kind}.{path}".lower():
            return "experts", f"{parameter.shape[0]} matrices of {kind}"
        if parameter.ndim == 2 and min(parameter.shape) < SMALLEST_SIDE:
            return "small", f"its shorter side is {min(parameter.shape)}"
        if parameter.ndim == 2:
            return "hidden", f"matrix of {kind}"
        return "other", f"{parameter.ndim} dimensions in {kind}"

    def _routes(self, module: nn.Module, kind: str, last: str, parameter: nn.Parameter) -> bool:
        if "router" in kind.lower():
            return True
        return last in _ROUTER_NAMES and parameter.shape[0] in self.experts

    def factor(self, name: str, role: str, rules: GroupRules) -> float:
        """Return the LR of a parameter as a multiple of the optimizer's."""
        factor = rules.head_factor if role == "head" else rules.backbone_factor
        if match := _LAYER.search(name):
            factor *= rules.layer_decay ** (self.top - int(match.group(1)))
        elif role == "embedding":
            factor *= rules.layer_decay ** (self.top + 1)
        if _is_lora_b(name):
            factor *= rules.lora_plus_ratio
        for pattern, value in rules.lr_factors.items():
            if re.search(pattern, name):
                factor *= value
        return factor


def _weights(model: nn.Module, method: str) -> Iterator[nn.Parameter]:
    """Yield the weights of what `get_input_embeddings` or `get_output_embeddings` returns, where there is one."""
    ask = getattr(model, method, None)
    if ask is None:
        return
    try:
        module = ask()
    except (NotImplementedError, AttributeError):  # a model without such a module says so by either
        return
    if isinstance(module, nn.Module):
        yield from (p for name, p in module.named_parameters() if not name.endswith("bias"))


def is_matrix(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is one matrix or several of one shape in a tensor of three dimensions."""
    return parameter.ndim in (2, 3) and min(parameter.shape[-2:]) >= SMALLEST_SIDE
