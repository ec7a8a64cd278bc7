"""SLCA: a slow backbone, and a classifier that is aligned by Gaussians of all classes so far (2303.05118)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._files import save_bytes
from ..errors import BrokenFileError, MismatchError, RefusedError
from ..functional.class_gaussians import class_gaussian, normalized_logits, sample_gaussian
from ..functional.data import check_count
from ..functional.schedules import layerwise_param_groups
from ..functional.schedules._checks import check_number

_FORMAT = "hf_effi.class_gaussians.1"


class ClassGaussians:
    """
    Mean and covariance of the features of each class, kept over the tasks in place of their rows.

    A class takes `4 d (d + 1)` bytes on the disk: 2.4 MB at 768 features.

    Args:
        shrinkage (`float`, *optional*, defaults to 0.0): See [`~hf_effi.functional.class_gaussians.class_gaussian`].

    Attributes:
        gaussians (`dict[int, tuple]`): Label -> mean `(d,)`, covariance `(d, d)`, both fp32, and the number of rows.

    Example:
    ```python
    >>> store = ClassGaussians().add(torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0]]), torch.tensor([0, 0, 3]))
    >>> store.labels, store.gaussians[0][0].tolist(), store.gaussians[3][2]
    ([0, 3], [1.0, 1.0], 1)
    ```
    """

    def __init__(self, shrinkage: float = 0.0) -> None:
        check_number("shrinkage", shrinkage, 0.0, 1.0)
        self.shrinkage = float(shrinkage)
        self.gaussians: dict[int, tuple[Tensor, Tensor, int]] = {}

    @property
    def labels(self) -> list[int]:
        """The classes so far, in order."""
        return sorted(self.gaussians)

    def add(self, features: Tensor, labels: Tensor) -> ClassGaussians:
        """
        Add the classes of a task and return the store.

        Args:
            features (`torch.Tensor`): Shape `(rows, d)`.
            labels (`torch.Tensor`): Shape `(rows,)`, integers.

        Raises:
            ValueError: shapes that do not fit, or features that are not finite.
            MismatchError: a class that is in the store, whose features came from other weights; or another `d`.
        """
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and {labels.dtype}; one integer for each of the "
                f"{features.shape[0]} rows is needed."
            )
        width = next((mean.numel() for mean, _, _ in self.gaussians.values()), features.shape[-1])
        found = sorted(set(labels.tolist()))
        if width != features.shape[-1] or set(found) & set(self.gaussians):
            raise MismatchError(
                f"The store has classes {self.labels} of {width} features, and gets {found} of {features.shape[-1]}. "
                "Add each class once, after the task that has it."
            )
        for label in found:
            rows = features[labels == label]
            mean, covariance = class_gaussian(rows, self.shrinkage)
            self.gaussians[label] = mean.float().cpu(), covariance.float().cpu(), len(rows)
        return self

    def sample(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw so many features of each class, in the order of `labels`: `(classes * rows, d)`, and their labels."""
        drawn = [sample_gaussian(*self.gaussians[label][:2], rows, generator) for label in self.labels]
        return torch.cat(drawn).float(), torch.tensor(self.labels).repeat_interleave(rows)

    def save(self, file: str | Path) -> None:
        """Write the store as one safetensors file."""
        from safetensors.torch import save

        tensors = {"labels": torch.tensor(self.labels, dtype=torch.int64)}
        for label, (mean, covariance, count) in self.gaussians.items():
            tensors |= {f"{label}.mean": mean, f"{label}.covariance": covariance}
            tensors[f"{label}.count"] = torch.tensor(count)
        metadata = {"format": _FORMAT, "shrinkage": repr(self.shrinkage)}
        save_bytes(file, save(tensors, metadata))

    @classmethod
    def load(cls, file: str | Path) -> ClassGaussians:
        """
        Return the store that [`save`] wrote.

        Raises:
            BrokenFileError: there is none, it is damaged, or of something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise BrokenFileError(f"{file} holds no class Gaussians of hf_effi. Pass what save() wrote.")
                found = cls(float(metadata["shrinkage"]))
                for label in stored.get_tensor("labels").tolist():
                    mean, covariance = (stored.get_tensor(f"{label}.{name}") for name in ("mean", "covariance"))
                    if covariance.shape != (mean.numel(), mean.numel()):
                        raise BrokenFileError(f"{file}: class {label} has a covariance of another size than its mean.")
                    found.gaussians[label] = mean, covariance, int(stored.get_tensor(f"{label}.count"))
                return found
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BrokenFileError(f"{file} is missing or damaged ({error}). Make the Gaussians again.") from error


def class_features(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """
    Return what the last layer of a classifier is given for each row, and the labels.

    The last layer is found by what the model does: the last `nn.Linear` called whose output, at one position, is the
    logits. It runs in evaluation mode, without gradients; the mode is put back.

    Args:
        model (`torch.nn.Module`): An `AutoModelForSequenceClassification`, or what returns `logits` likewise.
        batches (`Iterable[Mapping[str, Tensor]]`): With `labels`, such as a `DataLoader`. They are moved to the model.

    Returns:
        `tuple`: Features `(rows, d)`, fp32, and labels `(rows,)`, both on the CPU.

    Raises:
        ValueError: no batch, or one without integer labels.
        RefusedError: no such layer, a sharded one, or a regression.
    """
    found = [(features, labels) for _, features, labels in _passes(model, batches)]
    if not found:
        raise ValueError("batches is empty: the features of a class need at least one row.")
    return torch.cat([one for one, _ in found]), torch.cat([one for _, one in found])


def align_classifier(
    model: nn.Module,
    gaussians: ClassGaussians,
    batch: Mapping[str, Tensor],
    *,
    samples_per_class: int = 256,
    epochs: int = 5,
    learning_rate: float = 0.01,
    batch_size: int = 256,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    temperature: float = 0.1,
    seed: int = 0,
) -> list[float]:
    """
    Train the last layer alone, on features drawn from the Gaussians of all classes so far.

    Formula: the cross-entropy of `l / (temperature |l|)` over the classes in the store, by SGD with a learning rate
    that falls as a cosine; each epoch draws `samples_per_class` features of each class anew. Nothing but the rows of
    these classes in that layer changes, and no global random number is drawn. Where the defaults come from is in the
    card; some are from memory.

    Args:
        model (`torch.nn.Module`): A classifier; see [`class_features`].
        gaussians ([`ClassGaussians`]): Of all classes that it shall tell apart.
        batch (`Mapping[str, Tensor]`): Any batch, with `labels`: it tells which layer is the last one.
        samples_per_class (`int`, *optional*, defaults to 256): Features of each class in an epoch.
        epochs (`int`, *optional*, defaults to 5): At least 1.
        learning_rate (`float`, *optional*, defaults to 0.01): Of the first step.
        batch_size (`int`, *optional*, defaults to 256): Features in a step.
        momentum (`float`, *optional*, defaults to 0.9): Of SGD.
        weight_decay (`float`, *optional*, defaults to 5e-4): Of SGD.
        temperature (`float`, *optional*, defaults to 0.1): Of the normalised logits.
        seed (`int`, *optional*, defaults to 0): Of the features and their order.

    Returns:
        `list[float]`: Mean loss of each epoch.

    Raises:
        ValueError: an argument out of range.
        MismatchError: the Gaussians have other features, or classes that the layer has not.
        RefusedError: no such layer, or a sharded one.

    Example:
    ```python
    store = ClassGaussians(shrinkage=0.1).add(*class_features(trainer.model, trainer.get_train_dataloader()))
    align_classifier(trainer.model, store, next(iter(trainer.get_train_dataloader())))
    ```
    """
    for name, count in (("samples_per_class", samples_per_class), ("epochs", epochs), ("batch_size", batch_size)):
        check_count(name, count)
    for name, value in (("learning_rate", learning_rate), ("temperature", temperature)):
        check_number(name, value, 0.0, float("inf"), low_open=True)
    check_number("momentum", momentum, 0.0, 1.0, high_open=True)
    check_number("weight_decay", weight_decay, 0.0, float("inf"))
    head = next(_passes(model, [batch]))[0]
    classes = gaussians.labels
    widths = {mean.numel() for mean, _, _ in gaussians.gaussians.values()}
    if widths != {head.in_features} or max(classes) >= head.out_features or min(classes) < 0:
        raise MismatchError(
            f"The Gaussians have {sorted(widths)} features of classes {classes}, and the last layer takes "
            f"{head.in_features} features to {head.out_features} classes. Pass those of this model."
        )
    generator = torch.Generator().manual_seed(seed)
    own = [parameter for parameter in (head.weight, head.bias) if parameter is not None]
    trained = [parameter.detach()[classes].float().requires_grad_() for parameter in own]
    optimizer = torch.optim.SGD(trained, learning_rate, momentum=momentum, weight_decay=weight_decay)
    steps = -(-samples_per_class * len(classes) // batch_size) * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(epochs):
        features, labels = gaussians.sample(samples_per_class, generator)
        places = torch.searchsorted(torch.tensor(classes), labels)
        total = 0.0
        for chosen in torch.randperm(len(labels), generator=generator).split(batch_size):
            loss = _align_step(trained, features[chosen], places[chosen], temperature, optimizer)
            schedule.step()
            total += loss * len(chosen)
        losses.append(total / len(labels))
    with torch.no_grad():
        for parameter, rows in zip(own, trained, strict=True):
            parameter[classes] = rows.to(parameter.dtype)
    return losses


def _align_step(
    trained: Sequence[Tensor], features: Tensor, places: Tensor, temperature: float, optimizer: torch.optim.Optimizer
) -> float:
    device = trained[0].device
    with torch.enable_grad():
        logits = nn.functional.linear(features.to(device), *trained)
        loss = nn.functional.cross_entropy(normalized_logits(logits, temperature), places.to(device))
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    return loss.item()


def slca(
    model: nn.Module,
    learning_rate: float,
    *,
    backbone_factor: float = 0.01,
    weight_decay: float = 0.0,
    head: Iterable[str] = ("classifier", "score"),
) -> dict[str, Any]:
    """
    Return the keyword arguments of a Trainer whose backbone learns slowly; [`align_classifier`] follows the training.

    The optimizer is `torch.optim.AdamW` over [`~hf_effi.schedules.layerwise_param_groups`] with one LR for all layers
    below the head. Paper: 2303.05118.

    Args:
        model (`torch.nn.Module`): A classifier.
        learning_rate (`float`): Of the head.
        backbone_factor (`float`, *optional*, defaults to 0.01): LR of all else over that of the head, as in the paper.
        weight_decay (`float`, *optional*, defaults to 0.0): For all but biases and norms.
        head (`Iterable[str]`, *optional*): Parts of the names of the head's parameters.

    Returns:
        `dict`: `{"optimizers": (optimizer, None)}`; the Trainer makes the schedule.

    Raises:
        ValueError: no trained parameter has a part of `head` in its name, or an argument out of range.

    Example:
    ```python
    Trainer(model, args, train_dataset=task, **slca(model, learning_rate=1e-3)).train()
    ```
    """
    head = tuple(head)
    groups = layerwise_param_groups(
        model, learning_rate, 1.0, backbone_factor=backbone_factor, weight_decay=weight_decay, head=head
    )
    if not any(group["name"].startswith("depth0") for group in groups):
        raise ValueError(f"head={head!r}: no trained parameter has one of these in its name. Name the classifier.")
    return {"optimizers": (torch.optim.AdamW(groups, learning_rate), None)}


@torch.no_grad()
def _passes(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[nn.Linear, Tensor, Tensor]]:
    """Yield the last layer, its features and the labels of each batch."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            labels = batch.get("labels")
            if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
                raise ValueError(
                    "A batch needs labels, one integer for each row: a classifier with one class for each row."
                )
            device = next(model.parameters()).device
            given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
            with _calls(model) as calls:
                logits = model(**given).logits
            head, features = _last_layer(calls, logits)
            yield head, features.float().cpu(), labels.cpu()
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _calls(model: nn.Module) -> Iterator[list[tuple[nn.Linear, Tensor, Tensor]]]:
    found: list[tuple[nn.Linear, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(
            lambda layer, args, output: found.append((layer, args[0], output)) if args else None
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _last_layer(calls: list[tuple[nn.Linear, Tensor, Tensor]], logits: Tensor) -> tuple[nn.Linear, Tensor]:
    """Return the layer that made the logits, and what it was given at the position that they were taken from."""
    if logits.dim() == 2 and logits.shape[1] > 1:
        for layer, features, output in reversed(calls):
            if isinstance(layer.weight, DTensor) or output.shape[-1] != logits.shape[1]:
                continue
            places = output.reshape(logits.shape[0], -1, logits.shape[1])
            apart = (places - logits.unsqueeze(1)).abs().amax(-1)
            place = apart.argmin(1)
            rows = torch.arange(logits.shape[0], device=logits.device)
            if places.shape[0] == logits.shape[0] and bool(apart[rows, place].eq(0).all()):
                return layer, features.reshape(*places.shape[:2], -1)[rows, place]
    raise RefusedError(
        f"No whole nn.Linear of this model returns its logits of shape {tuple(logits.shape)}: it is a regression, has "
        "a head of another form or an adapter on it, or an engine shards it. Align a plain classifier on one device."
    )
