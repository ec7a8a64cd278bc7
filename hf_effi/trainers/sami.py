"""`EffiSAMITrainer`: follow principles, without labels or preferences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..data.sami import PRINCIPLES, SAMICollator
from ..functional.mutual_information import REDUCTIONS, response_logps, sami_loss
from .trainer import EffiTrainer


class EffiSAMITrainer(EffiTrainer):
    """
    [`EffiTrainer`] with the loss of SAMI: each response shall be likelier under the principle that it was written
    under than under the others, and the other way round.

    Rows of the dataset have the columns `prompts` and `responses`, see [`~hf_effi.data.SAMICollator`], so that
    `remove_unused_columns=False` is needed. Batches count queries: one of `C` principles is `C * C` sequences. The
    loss is a mean over the queries of a micro-batch, and over micro-batches. Responses are made before, by the model
    of the last round; this trainer does one round.

    Args:
        args, kwargs: As for `Trainer`; `data_collator` is a [`~hf_effi.data.SAMICollator`].
        reduction (`str`, *optional*, defaults to `"mean"`): Log-prob of a response: the `"mean"` over its tokens, as
            the released code has it, or the `"sum"`, as the paper's bound does.

    Raises:
        ValueError: an unknown `reduction`, another collator, or `remove_unused_columns=True`.

    Example:
    ```python
    args = EffiTrainingArguments("out", remove_unused_columns=False, per_device_train_batch_size=1)
    EffiSAMITrainer(model, args, SAMICollator(tokenizer), train_dataset=rows).train()
    ```
    """

    def __init__(self, *args: Any, reduction: str = "mean", **kwargs: Any) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}.")
        super().__init__(*args, **kwargs)
        if not isinstance(self.data_collator, SAMICollator):
            raise ValueError(
                f"data_collator is {type(self.data_collator).__name__}, and the loss needs each response under each "
                "principle. Pass data_collator=hf_effi.data.SAMICollator(tokenizer)."
            )
        if self.args.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True drops the columns 'prompts' and 'responses' before they are collated. Set "
                "remove_unused_columns=False."
            )
        self.reduction = reduction
        # The loss is a mean over queries, which the Trainer then divides by the micro-batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the queries of a batch, with what the model returned where that is asked for."""
        inputs = dict(inputs)
        counts, labels = inputs.pop(PRINCIPLES), inputs.pop("labels")
        principles = int(counts[0])
        outputs = model(**inputs)
        logps = response_logps(outputs.logits, labels, self.reduction)
        table = logps.view(-1, principles, principles)
        loss = sami_loss(table)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss of an evaluation; logits of `C * C` sequences for each query are kept by nobody."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach().mean(), None, None
