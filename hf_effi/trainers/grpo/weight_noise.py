"""The policy that generates has noise on the scales of its norms, and the one that is trained has none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from accelerate import DistributedType
from torch import Tensor

from ...errors import RefusedError
from ...functional import metrics
from ...functional.rollouts import AdaptiveNoise, draw_noise
from .correction import OLD
from .generation import Around, Turn
from .host import Host
from .norms import find_norms
from .rows import LOSS_SCALE, ROW_KEYS

#: what vLLM holds when a turn that was to send it weights has failed
_UNKNOWN = object()


class Rollouts(Protocol):
    """The part of the rollout pipeline that the noise knows of."""

    generations_done: int

    def log_probs_of(self, batch: dict[str, Any], reference: bool) -> Tensor:
        """Return the log-probs of the completions of a batch, `(rows, columns)`."""


def check_noise(noise: Any, args: Any, rollout_func: Any) -> None:
    """
    Say what the noise cannot do in this run, before a model is loaded.

    Raises:
        TypeError: it is no [`AdaptiveNoise`].
        RefusedError: a `rollout_func`, or a correction under vLLM.
    """
    if noise is None:
        return
    if not isinstance(noise, AdaptiveNoise):
        raise TypeError(
            f"rollout_noise must be an AdaptiveNoise of hf_effi.functional.rollouts, got {type(noise).__name__}."
        )
    if rollout_func is not None:
        raise RefusedError(
            "rollout_noise= acts around TRL's own generation, which `rollout_func` stands in for. Drop one of the two."
        )
    if noise.correction and args.use_vllm:
        raise RefusedError(
            "AdaptiveNoise(correction=True) is for completions from transformers. vLLM returns the log-probs of the "
            "noisy weights itself, and TRL corrects for them by vllm_importance_sampling_correction=True, its "
            "default. Drop correction=True."
        )


def add_noise(
    trainer: Any, noise: AdaptiveNoise | None, rollouts: Rollouts, around: list[Around]
) -> WeightNoise | None:
    """
    Let a trainer generate under noise where it was asked to.

    Args:
        trainer ([`EffiGRPOTrainer`]): Built. It gains `rollout_noise`.
        noise ([`AdaptiveNoise`], *optional*): The argument of the trainer.
        rollouts ([`Rollouts`]): Counts the generations.
        around (`list[Around]`): What stands around the generation of its turns; the noise is outermost.
    """
    trainer.rollout_noise = noise
    if noise is None:
        return None
    turn = WeightNoise(trainer, noise, rollouts)
    around.insert(0, turn)
    return turn


class WeightNoise:
    """
    Stands around each turn of a training generation: noise on, generate, weights as they were, to the bit.

    The draw is a function of the seed and of the number of the generation: the same on every process, for every round
    and turn of a generation, and after a resume.

    Args:
        host ([`Host`]): The trainer, with its model loaded.
        noise ([`AdaptiveNoise`]): How much, when, and on which norms.
        rollouts ([`Rollouts`]): Counts the generations.

    Raises:
        RefusedError: sharded weights, or a model without such norms.
    """

    changes_weights = True

    def __init__(self, host: Host, noise: AdaptiveNoise, rollouts: Rollouts) -> None:
        self._host, self._noise, self._rollouts = host, noise, rollouts
        _check_engine(host.accelerator)
        #: the scales by name
        self.norms = find_norms(host.accelerator.unwrap_model(host.model), noise.head_norms)
        #: the generation whose noise is in the weights that vLLM has, `None` for none
        self._sent: object = None
        self._logged = 0

    def __call__(self, turn: Turn, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        host, sigma = self._host, self._sigma()
        generation = self._rollouts.generations_done if sigma else None
        if host.use_vllm and generation != self._sent:
            # TRL sends the weights where this is not the number of the step. Another draw, and none after one, are
            # other weights at the same step.
            host._last_loaded_step = -1
            self._sent = _UNKNOWN
        with self._on(sigma) as applied:
            self._log(sigma, applied)
            result = turn(prompt_ids, *args, **kwargs)
        self._sent = generation
        return result

    def corrected(self, batch: dict[str, Any]) -> dict[str, Any]:
        """
        Let a batch have the log-probs of the noisy policy as the old ones, under `correction=True`.

        The ratio of the loss, `exp(log pi - log pi_old)`, then is the one to the policy that sampled. Costs one
        forward of the chosen rows, in place of the one that TRL makes where it needs old log-probs.

        Args:
            batch (`dict`): The rows to train on, with padded ids and masks.
        """
        sigma = self._sigma() if self._noise.correction else 0.0
        if not sigma:
            return batch
        if extra := sorted(set(batch) - ROW_KEYS - {LOSS_SCALE}):
            raise RefusedError(
                f"AdaptiveNoise(correction=True) cannot forward {', '.join(extra)} again (image and multimodal "
                "inputs). Drop correction=True."
            )
        with self._on(sigma):
            batch[OLD] = self._rollouts.log_probs_of(batch, reference=False)
        return batch

    def _sigma(self) -> float:
        """Return the standard deviation of the noise that the generation at hand has; none outside of training."""
        state = self._host.state
        return self._noise.sigma(state.global_step, state.max_steps) if self._host.model.training else 0.0

    @contextlib.contextmanager
    def _on(self, sigma: float) -> Iterator[float]:
        """Add the noise of this generation; yield the root of the mean square of what the dtype left of it."""
        if not sigma:
            yield 0.0
            return
        scales = list(self.norms.values())
        if sharded := [name for name, scale in self.norms.items() if hasattr(scale, "device_mesh")]:
            raise RefusedError(f"rollout_noise=: {sharded[0]} is sharded (tensor parallelism or FSDP2). Use DDP.")
        kept = [scale.detach().clone() for scale in scales]
        draws = draw_noise(
            [scale.numel() for scale in scales], sigma, self._noise.seed, self._rollouts.generations_done
        )
        try:
            with torch.no_grad():
                for scale, clean, draw in zip(scales, kept, draws, strict=True):
                    scale.copy_(clean.float() + draw.to(scale.device))
                added = [s.float() - clean.float() for s, clean in zip(scales, kept, strict=True)]
            yield float(torch.cat([part.cpu() for part in added]).square().mean().sqrt())
        finally:
            with torch.no_grad():
                for scale, clean in zip(scales, kept, strict=True):
                    scale.copy_(clean)

    def _log(self, sigma: float, applied: float) -> None:
        if not self._host.model.training or self._logged == self._rollouts.generations_done:
            return
        self._logged = self._rollouts.generations_done
        log = self._host._metrics["train"]
        log[metrics.AQN_SIGMA].append(sigma)
        log[metrics.AQN_APPLIED].append(applied)


def _check_engine(accelerator: Any) -> None:
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    zero3 = plugin is not None and plugin.zero_stage == 3
    if zero3 or accelerator.distributed_type is DistributedType.FSDP:
        raise RefusedError(
            f"rollout_noise= needs whole weights, and {'DeepSpeed ZeRO-3' if zero3 else 'FSDP'} shards them. Use DDP, "
            "or ZeRO-2."
        )
