"""
What a card may name: an allow-list by class, by argument and by kind of value.

A card comes from the Internet. What is made from it are numbers, words and objects that compute with them; nothing
that is listed here loads a model, imports a module by a name that it is given, opens a file or a connection, or starts
a process. Everything else is named in `Recipe.missing` and left to the reader.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from ..errors import RecipeError
from ..functional.kept_arguments import MOST_VALUES
from .admitted_rewards import BUDGETS, REWARDS
from .admitted_selection import SELECTION, SELECTORS
from .admitted_values import KINDS

#: deepest nesting of one object
DEEPEST = 16


class _NotAdmittedError(RecipeError):
    """A card names something that it may not name, or that this version does not have."""


def _arguments(**kinds: str) -> dict[str, str]:
    """`number="a b"` -> `{"a": "number", "b": "number"}`."""
    return {name: kind for kind, names in kinds.items() for name in names.split()}


_WARM = _arguments(number="total_steps warmup_steps warmup_fraction warmup_start warmup_offset floor")
_SCHEDULES: dict[str, dict[str, str]] = {
    "constant": _WARM,
    "cosine": _WARM,
    "linear": _WARM,
    "cosine_power": {**_WARM, **_arguments(number="base", flag="spread")},
    "damped_cosine": {**_WARM, **_arguments(number="cycles gamma")},
    "inverse_sqrt": {**_WARM, **_arguments(number="timescale_steps")},
    "rex": {**_WARM, **_arguments(number="kappa")},
    "uba": {**_WARM, **_arguments(number="phi")},
    "infinite": {
        **_WARM,
        **_arguments(
            number="cooldown_steps cooldown_fraction anneal_steps anneal_fraction constant_ratio alpha anneal_start",
            word="cooldown",
            flag="first_task open_ended",
        ),
    },
    "power": {
        **_WARM,
        **_arguments(
            number="tokens_per_step max_lr a b sequence_length reference_lr decay_steps decay_fraction decay_offset",
            word="shape",
            plain="batch_changes",
        ),
    },
    "rewarm_redecay": {**_WARM, **_arguments(numbers="data_fractions data_steps peaks")},
    "one_cycle": _arguments(number="total_steps up_fraction down_fraction div final_div momentum_low momentum_high"),
    "slow_start_fast_decay": _arguments(number="total_steps rise_fraction start floor"),
    "table": _arguments(number="total_steps end", numbers="values"),
    "triangular": _arguments(number="total_steps half_cycle_steps low"),
    "wsd": {
        **_WARM,
        **_arguments(
            number="decay_steps decay_fraction power half_life_steps decay_offset decay_start",
            word="shape",
            flag="open_ended",
        ),
    },
    "wsd_s": {
        **_WARM,
        **_arguments(numbers="budgets", number="decay_fraction power decay_offset rewarm_steps", word="shape"),
    },
    "wsdc": {
        **_WARM,
        **_arguments(
            number="decay_steps decay_fraction power half_life_steps decay_offset decay_start constant_steps "
            "constant_fraction",
            word="shape",
            flag="open_ended",
        ),
    },
    "join": _arguments(number="total_steps", schedules="schedules", numbers="boundaries"),
    "scale": _arguments(number="total_steps factor", schedule="schedule"),
    "token_indexed": _arguments(number="total_steps", schedule="schedule"),
}
_LIMITS = (
    "lr_zero_logs scheduler_updates scheduler_low scheduler_high lr_frozen_logs plan_end clip_logs resume_fraction "
    "padding padding_logs leak passes passes_decay cause_probes layer_gradient dead_layer last_layer kurtosis "
    "massive_tokens effective_lr straggler straggler_share straggler_logs sharpness sharpness_probes"
)
_CALLBACKS: dict[str, dict[str, str]] = {
    "AccuracyGradientCallback": _arguments(
        key="metric", number="min_lr factor window quiet threshold", flag="greater_is_better"
    ),
    "ActivationOffloadCallback": _arguments(number="keep_last"),
    "AdaLoRACallback": _arguments(flag="set_total_step"),
    "AutoLRSCallback": _arguments(number="low high stage_steps probes max_stage_steps kappa seed", flag="validation"),
    "EMACallback": _arguments(
        number="decay half_life_steps every_steps start_step",
        word="correction device evaluate_on folder",
        flag="swap_in save_with_checkpoints",
    ),
    "FastForwardCallback": _arguments(number="every_steps rows longest limit patience"),
    "ForecastCallback": _arguments(key="metric", number="skip_fraction tolerance stop", flag="greater_is_better"),
    "GRPODoctor": _arguments(limits="limits"),
    "GradientSNRCallback": _arguments(number="memory lowest"),
    "BudgetPromptCallback": _arguments(budget="budget", key="placeholder"),
    "GRPOScheduleCallback": _arguments(schedule="temperature beta"),
    "GenerationCapCallback": _arguments(budget="budget", number="ratio"),
    "HypergradientCallback": _arguments(number="kappa limit step_limit"),
    "KernelPatchCallback": _arguments(kernels="layers"),
    "LRScheduleCallback": _arguments(schedule="schedule", word="on_mismatch", flag="allow_lr_jump stop_when_decayed"),
    "MIGUCallback": _arguments(
        number="threshold seed start_update", word="mode choice", modules="modules", plain="parts"
    ),
    "MemoryBudgetCallback": _arguments(number="budget_gib max_tokens", flag="offload"),
    "MultigridLRCallback": _arguments(shapes="shapes", number="exponent"),
    "QKClipCallback": _arguments(number="threshold alpha every_steps", word="gqa mode"),
    "OSFProjectionCallback": {},
    "RandomLTDCallback": _arguments(number="min_tokens max_tokens ramp_fraction multiple"),
    "SamplerCallback": _arguments(sampler="sampler"),
    "SelectiveCheckpointCallback": {},
    "ReptileCallback": _arguments(number="every_steps beta", flag="last_partial"),
    "RewindCallback": _arguments(
        number="every_steps skip_batches max_rewinds window threshold least", word="rewind_on"
    ),
    "TrainDoctor": _arguments(limits="limits"),
    "WeightAveragingCallback": _arguments(
        number="last every_steps alpha start_step",
        word="kind folder evaluate_on store",
        flag="swap_in save_with_checkpoints",
    ),
}
_DOCTORS: dict[str, dict[str, str]] = {
    "GRPOLimits": _arguments(
        number=f"{_LIMITS} truncated zero_std group_logs constant_logs entropy_ratio entropy_logs trend_logs "
        "length_growth reward_fall zero_loss zero_loss_logs contamination_auc "
        "contamination_prompts"
    ),
    "TrainLimits": _arguments(number=_LIMITS),
}
_DATA: dict[str, dict[str, str]] = {
    "Denoiser": _arguments(word="mode", number="density mean_span weight"),
    "MaskingRatioCurriculum": _arguments(
        number="mask_token_id vocab_size start end warmup_fraction warmup_from random_share keep_share eval_ratio",
        numbers="special_ids",
    ),
    "MetadataCollator": _arguments(number="pad_token_id bos_token_id eos_token_id max_length"),
    "MetadataConditioning": _arguments(collator="collator", word="where", number="cooldown_fraction dropout"),
    "Multigrid": _arguments(number="max_length short_steps final_share", numbers="long_cycle short_cycle"),
    "UL2Denoising": _arguments(
        numbers="sentinel_ids",
        number="pad_token_id max_length max_target_length separator_id eos_token_id",
        denoisers="denoisers",
        ranks="mode_ids",
    ),
}
_SAMPLERS: dict[str, dict[str, str]] = {
    "CompetenceSampler": _arguments(numbers="scores", number="num_samples start root full_at seed", word="nan"),
    "CyclicalSampler": _arguments(
        numbers="losses", number="total_epochs start end alpha full_epochs seed", word="nan"
    ),
    "InterleavedSampler": _arguments(plain="levels subjects", number="seed"),
    "MixtureSampler": _arguments(plain="domains waypoints", number="block num_samples seed", flag="smooth in_order"),
    "QualityAscendingSampler": _arguments(
        numbers="scores", number="buckets folds seed", flag="descending", plain="sources", word="nan"
    ),
    "ReplaySampler": _arguments(plain="is_old", number="rate block num_samples seed", flag="in_order"),
    "ShuffledSampler": _arguments(number="num_rows seed"),
    "TokenBudgetBatchSampler": _arguments(
        numbers="lengths cost", number="max_tokens length_multiple seed", flag="padding_free"
    ),
}
_ROLLOUTS: dict[str, dict[str, str]] = {
    "AdaptiveNoise": _arguments(
        number="sigma_start sigma_end num_stages seed", word="schedule", flag="head_norms correction"
    ),
    "AdvantagePruner": _arguments(number="prune_rate seed", word="metric scope", flag="balance_signs"),
    "PassRateBand": _arguments(number="low high", key="reward"),
    "ShuffledPrompts": _arguments(number="size seed"),
    "SpeculativeReuse": _arguments(number="lenience stored_tokens max_bytes"),
}
_BUDGETS: dict[str, dict[str, str]] = {name: _arguments(**kinds) for name, kinds in BUDGETS.items()}
_SELECTION: dict[str, dict[str, str]] = {name: _arguments(**kinds) for name, kinds in SELECTION.items()}
_TARGETS = _arguments(word="task_type", modules="target_modules exclude_modules modules_to_save")
_PATTERNS = _arguments(modules="layers_pattern", ranks="rank_pattern alpha_pattern", plain="layers_to_transform")
_LORA = {
    **_TARGETS,
    **_PATTERNS,
    **_arguments(
        number="r lora_alpha lora_dropout",
        flag="fan_in_fan_out use_rslora use_dora lora_bias ensure_weight_tying",
        word="init_lora_weights bias",
        modules="target_parameters",
        plain="trainable_token_indices layer_replication",
    ),
}
_ADAPTERS: dict[str, dict[str, str]] = {
    "LoraConfig": _LORA,
    "AdaLoraConfig": {
        **_LORA,
        **_arguments(number="target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step"),
    },
    "IA3Config": {**_TARGETS, **_arguments(modules="feedforward_modules", flag="fan_in_fan_out init_ia3_weights")},
    "LoHaConfig": {
        **_TARGETS,
        **_PATTERNS,
        **_arguments(number="r alpha rank_dropout module_dropout", flag="use_effective_conv2d init_weights"),
    },
    "LNTuningConfig": _TARGETS,
}

#: public module -> class -> argument -> kind
CLASSES: dict[str, dict[str, dict[str, str]]] = {
    "hf_effi.callbacks": {**_CALLBACKS, **_DOCTORS},
    "hf_effi.data": _DATA,
    "hf_effi.functional.rewards": _BUDGETS,
    "hf_effi.functional.rollouts": _ROLLOUTS,
    "hf_effi.rewards": {name: _arguments(**kinds) for name, kinds in REWARDS.items()},
    "hf_effi.samplers": _SAMPLERS,
    "hf_effi.schedules": _SCHEDULES,
    "hf_effi.selection": _SELECTION,
    "hf_effi.trainers.mixins": {"LocalUpdates": _arguments(number="every outer_lr outer_momentum")},
    "peft": _ADAPTERS,
}
#: functions, by public module
FUNCTIONS: dict[str, frozenset[str]] = {
    "trl.rewards": frozenset({"accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"}),
}
#: trainers and their arguments, which stand at the top of a recipe and nowhere else in it
TRAINERS: dict[str, frozenset[str]] = {
    "hf_effi": frozenset({"EffiTrainer", "EffiSFTTrainer", "EffiGRPOTrainer"}),
    "transformers": frozenset({"Trainer", "Seq2SeqTrainer"}),
    "trl": frozenset("SFTTrainer GRPOTrainer DPOTrainer KTOTrainer RewardTrainer RLOOTrainer".split()),
}
CONFIGS: dict[str, frozenset[str]] = {
    "hf_effi": frozenset({"EffiTrainingArguments", "EffiSFTConfig", "EffiGRPOConfig"}),
    "transformers": frozenset({"TrainingArguments", "Seq2SeqTrainingArguments"}),
    "trl": frozenset("SFTConfig GRPOConfig DPOConfig KTOConfig RewardConfig RLOOConfig".split()),
}
#: kind of object -> the classes that it may be
_GROUPS: dict[str, tuple[str, frozenset[str]]] = {
    "schedule": ("hf_effi.schedules", frozenset(_SCHEDULES)),
    "schedules": ("hf_effi.schedules", frozenset(_SCHEDULES)),
    "sampler": ("hf_effi.samplers", frozenset(_SAMPLERS)),
    "limits": ("hf_effi.callbacks", frozenset(_DOCTORS)),
    "shapes": ("hf_effi.data", frozenset({"Multigrid"})),
    "denoisers": ("hf_effi.data", frozenset({"Denoiser"})),
    "collator": ("hf_effi.data", frozenset({"MetadataCollator"})),
    "filters": ("hf_effi.selection", frozenset({"LengthBand", "PassRateBand", "SourceBands", "ZeroVariance"})),
    "rates": ("hf_effi.selection", frozenset({"BetaRates", "EmbeddingRates"})),
    "selector": ("hf_effi.selection", SELECTORS),
    "budget": ("hf_effi.functional.rewards", frozenset(_BUDGETS)),
}

#: arguments of a trainer's config
ARGUMENTS: dict[str, str] = _arguments(
    number="per_device_train_batch_size num_train_epochs max_steps learning_rate warmup_steps weight_decay adam_beta1 "
    "adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm label_smoothing_factor neftune_noise_alpha "
    "torch_empty_cache_steps logging_steps eval_steps eval_delay per_device_eval_batch_size eval_accumulation_steps "
    "save_steps save_total_limit seed data_seed dataloader_prefetch_factor dataloader_num_workers ddp_bucket_cap_mb "
    "router_aux_loss_coef max_length pad_to_multiple_of num_generations num_generations_eval max_completion_length "
    "generation_batch_size steps_per_generation temperature top_p top_k min_p repetition_penalty beta num_iterations "
    "epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg "
    "vespo_lambda_neg ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile entropy_coef entropy_coef_min "
    "entropy_coef_max entropy_coef_delta entropy_target max_tool_calling_iterations vllm_importance_sampling_clip_max "
    "vllm_importance_sampling_clip_min vllm_importance_sampling_cap off_policy_mask_threshold "
    "num_completions_to_print "
    "precompute_ref_batch_size ld_alpha f_alpha_divergence_coef label_smoothing discopop_tau desirable_weight "
    "undesirable_weight center_rewards_coefficient sequence_parallel_size forward_buckets loss_token_budget "
    "score_token_budget ntp_coef difficulty_max_rounds "
    "prune_rate generation_max_length generation_num_beams dataset_num_proc ddp_timeout",
    flag="average_tokens_across_devices bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing "
    "gradient_checkpointing use_liger_kernel use_cache auto_find_batch_size logging_first_step log_on_each_node "
    "logging_nan_inf_filter disable_tqdm prediction_loss_only eval_on_start eval_do_concat_batches "
    "eval_use_gather_object "
    "batch_eval_metrics save_only_model save_on_each_node load_best_model_at_end greater_is_better ignore_data_skip "
    "full_determinism use_cpu dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_in_order "
    "remove_unused_columns ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph skip_memory_metrics "
    "do_train "
    "do_eval do_predict shuffle_dataset packing padding_free eval_packing completion_only_loss assistant_only_loss "
    "activation_offloading disable_dropout cast_lm_head_to_fp32 ds3_gather_for_generation mask_truncated_completions "
    "sync_ref_model use_adaptive_entropy vllm_importance_sampling_correction use_bias_correction_kl log_completions "
    "log_multimodal log_unique_prompts precompute_ref_log_probs use_weighting normalize_advantages run_record "
    "prune_allocation prune_balance_signs predict_with_generate sortish_sampler",
    word="lr_scheduler_type logging_strategy log_level log_level_replica eval_strategy save_strategy "
    "train_sampling_strategy truncation_mode packing_strategy cache_implementation importance_sampling_level "
    "multi_objective_aggregation scale_rewards vllm_importance_sampling_mode f_divergence_type lr_schedule "
    "lr_schedule_on_mismatch difficulty_underfill prune_metric prune_scope prune_normalizer dataset_text_field",
    optimizer="optim",
    key="metric_for_best_model length_column_name difficulty_reward include_num_input_tokens_seen",
    plain="loss_type loss_weights lr_scheduler_kwargs lr_schedule_kwargs label_names include_for_metrics "
    "reward_weights "
    "difficulty_range reward_clip_range exact_savings rollout_savings optim_args chat_template_kwargs "
    "liger_kernel_config "
    "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
    groups="optim_groups",
    modules="optim_target_modules",
    kernels="kernel_patch",
    loader="accelerator_config",
)


# --- asking the list -------------------------------------------------------------------------------------------------


def find(path: Any, table: Mapping[str, Any]) -> Any:
    """
    Return the class or function that a path `module:name` stands for, from its public module.

    Cards of earlier versions name the module in which a class of ours was defined; only the name counts in them.

    Raises:
        _NotAdmittedError: it is not in the table, or the installed version does not have it.
    """
    if not isinstance(path, str) or not re.fullmatch(r"[A-Za-z0-9_.]{1,200}:[A-Za-z0-9_]{1,100}", path):
        raise _NotAdmittedError(
            f"{_shown(path)} is no path of a class. It has the form 'hf_effi.samplers:ShuffledSampler'"
        )
    module, _, name = path.partition(":")
    package = module.partition(".")[0]
    for public, names in table.items():
        if name in names and public.partition(".")[0] == package:
            found = getattr(importlib.import_module(public), name, None)
            if found is None:
                raise _NotAdmittedError(f"{path!r} is not in the installed version")
            return found
    raise _NotAdmittedError(f"{path!r} is nothing that a card may name")


def public_path(thing: Any, table: Mapping[str, Any]) -> str | None:
    """Return the path under which a card may name a class or function, or `None`."""
    name = getattr(thing, "__name__", "")
    package = (getattr(thing, "__module__", None) or "").partition(".")[0]
    for public, names in table.items():
        if name in names and public.partition(".")[0] == package:
            # By its name alone a class of the user's own could pass for one of these.
            return f"{public}:{name}" if getattr(importlib.import_module(public), name, None) is thing else None
    return None


def kinds_of(path: str) -> dict[str, str]:
    """Return `{argument: kind}` of an admitted class."""
    name = path.partition(":")[2]
    package = path.partition(".")[0].partition(":")[0]
    return next(names[name] for public, names in CLASSES.items() if name in names and public.startswith(package))


def check_value(name: str, value: Any, kind: str) -> None:
    """
    Check a plain value against the kind of its argument.

    Raises:
        _NotAdmittedError: with the name, the value and what is allowed.
    """
    test, words = KINDS[kind]
    # Not set, or off, is no more than what a default says.
    if value is None or (isinstance(value, bool) and kind in ("word", "key", "modules")):
        return
    if not test(value):
        raise _NotAdmittedError(f"{name}={_shown(value)} is not {words}, and a card may hold nothing else there")


def check_object(name: str, path: Any, kind: str) -> None:
    """
    Check that an object in an argument is of the classes that its kind allows.

    Raises:
        _NotAdmittedError: it is not.
    """
    if kind not in _GROUPS:
        raise _NotAdmittedError(f"{name} takes {KINDS[kind][1]}, and no object")
    module, names = _GROUPS[kind]
    found = str(path).partition(":")[2]
    if found not in names:
        raise _NotAdmittedError(f"{name} takes {KINDS[kind][1]}, not {_shown(path)}")


def check_size(value: Any, depth: int = 0, count: list[int] | None = None) -> None:
    """
    Refuse data that is nested too deeply or holds too many values, before anything walks it.

    Raises:
        _NotAdmittedError: with the limit.
    """
    count = [0] if count is None else count
    count[0] += 1
    if depth > DEEPEST or count[0] > MOST_VALUES:
        raise _NotAdmittedError(f"it is nested more than {DEEPEST} deep or holds more than {MOST_VALUES} values")
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        check_size(part, depth + 1, count)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def admitted() -> list[tuple[str, str]]:
    """Return every path that a card may name with its arguments, for the documentation and the test that reads it."""
    rows: list[tuple[str, str]] = []
    for module, classes in CLASSES.items():
        for name, arguments in classes.items():
            rows.append((f"{module}:{name}", ", ".join(f"{a} ({k})" for a, k in arguments.items()) or "no arguments"))
    for table, what in ((FUNCTIONS, "a function"), (TRAINERS, "a trainer"), (CONFIGS, "its arguments")):
        rows += [(f"{module}:{name}", what) for module, names in table.items() for name in sorted(names)]
    return rows
