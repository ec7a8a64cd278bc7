"""What predicts the success rate of a prompt: a head on the policy's own states, or a small language model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import MismatchError

if TYPE_CHECKING:
    from ..protocols import SelectionContext

#: tokens of a forward of the value model, with padding
_TOKENS_PER_FORWARD = 8192


class Value(Protocol):
    """A prediction of the success rate, and what it learns from."""

    def predict(self, rows: Sequence[int]) -> Tensor:
        """Return the predicted rates, float32, shape `(rows,)`, equal on every rank."""
        ...

    def fit(self, rows: Sequence[int], rates: Tensor) -> None:
        """Take gradient steps on the squared error of these rows, which were predicted before."""
        ...

    def forget(self) -> None:
        """Drop what was kept of predicted rows for `fit`."""
        ...

    def reread(self) -> None:
        """Take it that rows are other prompts from now on."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class HeadValue:
    """
    `V(x) = sigmoid(w . h(x) + b)`, `h` the policy's detached last hidden state at the last prompt token.

    `w` and `b` begin at 0, so that all rates are 0.5. They live on the CPU in float32, alike on every rank, since the
    states are gathered.
    """

    def __init__(self, context: SelectionContext, learning_rate: float, steps: int) -> None:
        self._context, self._learning_rate, self._steps = context, learning_rate, steps
        self._states: dict[int, Tensor] = {}
        self.weights: nn.Parameter | None = None

    def _prepare(self, width: int) -> nn.Parameter:
        if self.weights is None:
            self.weights = nn.Parameter(torch.zeros(width + 1))
            self._optimizer = torch.optim.AdamW([self.weights], lr=self._learning_rate, foreach=False)
        if len(self.weights) != width + 1:
            raise MismatchError(
                f"the stored value head reads {len(self.weights) - 1} numbers of a prompt, this model has {width}. "
                "Resume with the model of the run that wrote it."
            )
        return self.weights

    def _rates(self, states: Tensor) -> Tensor:
        weights = self._prepare(states.size(1))
        return torch.sigmoid(states @ weights[:-1] + weights[-1])

    def predict(self, rows: Sequence[int]) -> Tensor:
        states = self._context.read_prompts(rows, lambda states, ids: states[-1])
        self._states |= dict(zip(rows, states, strict=True))
        with torch.no_grad():
            return self._rates(states)

    def fit(self, rows: Sequence[int], rates: Tensor) -> None:
        states = torch.stack([self._states[row] for row in rows])
        with torch.enable_grad():
            for _ in range(self._steps):
                loss = (self._rates(states) - rates.float()).pow(2).mean()
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()

    def forget(self) -> None:
        self._states.clear()

    def reread(self) -> None:
        self.forget()

    def state_dict(self) -> dict[str, Any]:
        if self.weights is None:
            return {"weights": None}
        return {"weights": self.weights.detach().clone(), "optimizer": optimizer_state(self._optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = None
        self.forget()
        if state["weights"] is None:
            return
        weights = self._prepare(len(state["weights"]) - 1)
        with torch.no_grad():
            weights.copy_(state["weights"])
        load_optimizer_state(self._optimizer, state["optimizer"])


class ModelValue:
    """
    `V(x) = sigmoid(w . h(x) + b)`, `h` the last hidden state of a model of its own, which is trained with `w` and `b`.

    The model stays in eval mode, without dropout. Each rank has a copy of it and trains it on all selected prompts;
    the predictions are computed once, dealt over the ranks, and gathered, so that all ranks choose alike.

    Args:
        model (`nn.Module`): A language model of transformers, with or without its LM head, where it shall work.
        tokenizer (*optional*): Its tokenizer. Without one it reads the policy's tokens.
    """

    def __init__(
        self, context: SelectionContext, model: nn.Module, tokenizer: Any, learning_rate: float, steps: int
    ) -> None:
        self._context, self._model, self._tokenizer, self._steps = context, model, tokenizer, steps
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._model.eval()
        config: Any = model.config
        width = int(config.get_text_config().hidden_size)
        self.weights = nn.Parameter(torch.zeros(width + 1, device=self._device))
        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW([*self._trained, self.weights], lr=learning_rate, foreach=False)
        self._ids: dict[int, list[int]] = {}
        self._prompts: list[Any] | None = None

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _tokens(self, rows: Sequence[int]) -> list[list[int]]:
        if self._tokenizer is None:
            ids = self._context.prompt_ids(rows)
            embedding: Any = self._model.get_input_embeddings()  # type: ignore[operator]
            if (largest := max(max(row) for row in ids)) >= embedding.weight.shape[0]:
                raise ValueError(
                    f"a prompt has the token {largest}, and the value model knows {embedding.weight.shape[0]} tokens. "
                    "Pass its own tokenizer as value_tokenizer=."
                )
            return ids
        if self._prompts is None:
            self._prompts = self._context.column("prompt")
        return [_ids_of(self._prompts[row], self._tokenizer) for row in rows]

    def _rates(self, ids: list[list[int]]) -> Tensor:
        width = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=self._device)
        extra: dict[str, Any] = {"logits_to_keep": 1} if self._last_only else {}
        output = self._model(
            input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False, **extra
        )
        states = getattr(output, "last_hidden_state", None)
        states = output.hidden_states[-1] if states is None else states
        last = states[torch.arange(len(ids), device=self._device), mask.sum(1) - 1].float()
        return torch.sigmoid(last @ self.weights[:-1] + self.weights[-1])

    def predict(self, rows: Sequence[int]) -> Tensor:
        ids = dict(zip(rows, self._tokens(rows), strict=True))
        self._ids |= ids

        def compute(mine: list[int]) -> Tensor:
            found = torch.empty(len(mine))
            with torch.no_grad():
                for places in _batches([len(ids[row]) for row in mine]):
                    found[places] = self._rates([ids[mine[place]] for place in places]).cpu()
            return found.unsqueeze(1)

        return self._context.spread(rows, compute).squeeze(1)

    def fit(self, rows: Sequence[int], rates: Tensor) -> None:
        ids, rates = [self._ids[row] for row in rows], rates.float().to(self._device)
        with torch.enable_grad():
            for _ in range(self._steps):
                self._optimizer.zero_grad()
                for places in _batches([len(row) for row in ids]):
                    error = self._rates([ids[place] for place in places]) - rates[places]
                    (error.pow(2).sum() / len(ids)).backward()
                self._optimizer.step()
        self._optimizer.zero_grad()

    def forget(self) -> None:
        self._ids.clear()

    def reread(self) -> None:
        self.forget()
        self._prompts = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights.detach().cpu().clone(),
            "model": [weight.detach().cpu().clone() for weight in self._trained],
            "optimizer": optimizer_state(self._optimizer),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        stored = [*state.get("model", []), state["weights"]]
        mine = [*self._trained, self.weights]
        if [tuple(weight.shape) for weight in stored] != [tuple(weight.shape) for weight in mine]:
            raise MismatchError(
                "the checkpoint's value model has other weights than the one that was passed. Resume with the value "
                "model of the run that wrote it."
            )
        self.forget()
        with torch.no_grad():
            for weight, value in zip(mine, stored, strict=True):
                weight.copy_(value)
        load_optimizer_state(self._optimizer, state["optimizer"])


def _ids_of(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(rendered["input_ids"])


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Yield places, longest rows first, whose padded tokens fit a forward."""
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    while order:
        size = max(1, _TOKENS_PER_FORWARD // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def optimizer_state(optimizer: torch.optim.AdamW) -> list[dict[str, Any]]:
    """Return the moments of each weight, on the CPU; none of one that has had no gradient."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [
        {name: value.detach().cpu().clone() for name, value in optimizer.state.get(weight, {}).items()}
        for weight in weights
    ]


def load_optimizer_state(optimizer: torch.optim.AdamW, state: list[dict[str, Any]]) -> None:
    """Take back what [`optimizer_state`] returned."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    optimizer.state.clear()
    for weight, moments in zip(weights, state, strict=True):
        if moments:
            optimizer.state[weight] = {
                # The count of steps stays on the CPU, as torch keeps it.
                name: value.clone() if value.ndim == 0 else value.clone().to(weight.device)
                for name, value in moments.items()
            }
