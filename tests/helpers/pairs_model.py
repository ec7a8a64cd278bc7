"""A model of transformers with layers that can be checkpointed, patched, adapted and given fewer tokens."""

from __future__ import annotations

import torch
from peft import AdaLoraConfig, OSFConfig, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

STEPS, WIDTH, TOKENS = 30, 8, 16


class PairsConfig(PreTrainedConfig):
    model_type = "hf_effi_pairs"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mix(x))


class SameBlock(nn.Module):
    """A kernel that computes what `Block` does, to the bit."""

    has_backward = can_torch_compile = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x).tanh()


class PairsLayer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.block(hidden_states)


class PairsModel(PreTrainedModel):
    config_class = PairsConfig
    supports_gradient_checkpointing = _supports_sdpa = True

    def __init__(self, config: PairsConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([PairsLayer() for _ in range(3)])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return PairsModel(PairsConfig())


def adalora_model() -> nn.Module:
    model = plain_model()
    config = AdaLoraConfig(target_modules=["mix"], init_r=3, target_r=1, tinit=2, tfinal=4, deltaT=2, total_step=STEPS)
    return get_peft_model(model, config)


def osf_model() -> nn.Module:
    return get_peft_model(plain_model(), OSFConfig(target_modules=["mix"], effective_rank=3))
