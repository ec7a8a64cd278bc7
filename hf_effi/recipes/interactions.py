"""Do the experiments of one run influence each other? Short runs from one checkpoint, with and without each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..data.injected_dataset import InjectedDataset
from ..data.injection import InjectionPlan, InjectionResult
from ..errors import RefusedError
from ..functional.data import Interaction, measure_interactions


def loss_below_twins(result: InjectionResult) -> float:
    """
    Return how much lower the loss of the injected rows is than that of their twins, in nats per token.

    Raises:
        RefusedError: the experiment has no twins.
    """
    if result.loss_gap is None:
        raise RefusedError("an experiment has held_out=0, and so no twins. Hold rows out, or pass measure=.")
    return result.loss_gap


def interaction_test(
    make_trainer: Callable[[Any, int], Any],
    base: Any,
    plan: InjectionPlan,
    seeds: Sequence[int] = (0, 1, 2),
    measure: Callable[[InjectionResult], float] = loss_below_twins,
    base_tokens: int | None = None,
) -> dict[str, Interaction]:
    """
    Test by short runs from one checkpoint whether the experiments of a plan influence each other's result.

    For each seed it trains with all experiments, with none, with each alone and with all but each. The effect of an
    experiment alone is compared with its effect beside the others ([`measure_interactions`]). Each experiment keeps
    its places in all runs, and the other rows are the same, so that runs of one seed are paired. Paper: Train Once,
    Answer All ([2509.23383](https://huggingface.co/papers/2509.23383)), whose test continues intermediate checkpoints.

    Args:
        make_trainer (`Callable`): `(dataset, seed)` -> a Trainer that has not trained, with the weights of the
            checkpoint, the learning rate of that moment and `max_steps=k`. The seed is that of the data order.
        base (`datasets.Dataset` or `Sequence`): The rows to go on with; as of [`InjectedDataset`].
        plan ([`InjectionPlan`]): At least 2 experiments.
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2)`): At least 2, no two equal.
        measure (`Callable[[InjectionResult], float]`, *optional*): What is compared; the loss below that of the twins
            by default.
        base_tokens (`int`, *optional*): As of [`InjectedDataset`].

    Returns:
        `dict[str, Interaction]`: Experiment -> its effects, their difference and its 95 % interval.

    Raises:
        ValueError: one experiment, fewer than 2 seeds, or one seed twice.

    Example:
    ```python
    def continued(dataset, seed):
        model = AutoModelForCausalLM.from_pretrained("out/checkpoint-5000")
        args = TrainingArguments("out/test", max_steps=200, learning_rate=1e-4, seed=seed, save_strategy="no")
        return Trainer(model, args, train_dataset=dataset)


    for found in interaction_test(continued, rows, plan).values():
        print(found)
    ```
    """
    names = list(plan.active)
    if len(names) < 2:
        raise ValueError(f"the plan injects {len(names)} experiment. It takes 2 to interact.")
    if len(seeds) < 2 or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={list(seeds)!r} must be at least 2, no two equal: they tell the noise.")
    arms = {"all": names, "none": []}
    arms |= {f"only {name}": [name] for name in names}
    arms |= {f"without {name}": [other for other in names if other != name] for name in names}
    trained: dict[tuple[int, tuple[str, ...]], dict[str, float]] = {}
    for seed in seeds:
        for active in arms.values():
            key = (seed, tuple(active))  # of two experiments "only a" is "without b"
            if key not in trained:
                trainer = make_trainer(InjectedDataset(base, plan.only(active), base_tokens), seed)
                trainer.train()
                found = plan.evaluate(trainer.model)
                trained[key] = {name: measure(found[name]) for name in names}
    runs = {seed: {arm: trained[seed, tuple(active)] for arm, active in arms.items()} for seed in seeds}
    return measure_interactions(runs)
