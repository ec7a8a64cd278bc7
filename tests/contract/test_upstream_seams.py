"""
Every upstream name, signature, dict key and behaviour that hf_effi leans on. One line in a table is one seam.

The Effi trainers call `super()` and edit what it returns. Nothing upstream promises these private names, so that this
file has to fail first, by name, when one moves; then it is decided what to do, and the cap in setup.cfg is raised.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_effi._compat import CACHE_ARGUMENT, release_of
from tests.contract._sources import python_files, shown
from tests.contract._sources import tree_of as source_tree
from tests.helpers import (
    binary_hash_reward,
    grpo_args,
    lm_dataset,
    prompt_dataset,
    run_distributed,
    run_grpo,
    save_tiny,
    tiny_qwen3,
    tiny_tokenizer,
)

GRPO = "trl.trainer.grpo_trainer:GRPOTrainer"
UTILS = "trl.trainer.utils"
TRAINER = "transformers.trainer:Trainer"
EVENTS = "transformers.trainer_callback"

#: callable -> its parameter names in order; `*` and `**` mark the variadic ones. Where they differ between the releases
#: that setup.cfg allows: release -> names, from that one on.
SIGNATURES: dict[str, str | dict[tuple[int, int], str]] = {
    # What EffiGRPOTrainer overrides or calls.
    f"{GRPO}.__init__": "self model reward_funcs args train_dataset eval_dataset processing_class"
    " reward_processing_classes callbacks optimizers quantization_config peft_config tools rollout_func"
    " environment_factory",
    f"{GRPO}._prepare_inputs": "self generation_batch",
    f"{GRPO}._generate_and_score_completions": "self inputs",
    f"{GRPO}._generate": "self prompts",
    f"{GRPO}._generate_single_turn": "self prompt_ids images multimodal_fields num_generations has_tool_images",
    f"{GRPO}._tokenize_prompts": "self prompts",
    f"{GRPO}._calculate_rewards": "self inputs prompts completions completion_ids_list",
    f"{GRPO}._get_per_token_logps_and_entropies": "self model input_ids attention_mask logits_to_keep batch_size"
    " compute_entropy compute_aux_loss pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes"
    " num_tiles image_sizes token_type_ids mm_token_type_ids image_position_ids",
    f"{GRPO}.get_high_entropy_mask": "self entropies mask threshold",
    f"{GRPO}.get_off_policy_mask": "advantages per_token_logps sampling_per_token_logps mask off_policy_threshold",
    f"{GRPO}.compute_loss": "self model inputs return_outputs num_items_in_batch",
    f"{GRPO}._compute_loss": "self model inputs",
    f"{GRPO}.training_step": "self model inputs num_items_in_batch",
    f"{GRPO}.prediction_step": "self model inputs prediction_loss_only ignore_keys",
    f"{GRPO}.get_train_dataloader": "self",
    f"{GRPO}._get_train_sampler": "self dataset",
    f"{GRPO}._get_eval_sampler": "self eval_dataset",
    f"{GRPO}._save_checkpoint": "self model trial",
    f"{GRPO}._load_optimizer_and_scheduler": "self checkpoint",
    f"{GRPO}._set_signature_columns_if_needed": "self",
    f"{GRPO}._log_metric": "self name value",
    f"{GRPO}._log_completion_extra": "self column values",
    f"{GRPO}.log": "self logs start_time",
    f"{GRPO}.create_model_card": "self model_name dataset_name tags",
    # TRL's helpers.
    f"{UTILS}:RepeatSampler.__init__": "self data_source mini_repeat_count batch_size repeat_count shuffle seed",
    f"{UTILS}:split_tensor_dict": "tensor_dict num_chunks",
    f"{UTILS}:shuffle_sequence_dict": "seq_dict",
    f"{UTILS}:use_adapter": "model adapter_name",
    f"{UTILS}:nanstd": "tensor dim keepdim",
    f"{UTILS}:pad": "tensors padding_value padding_side pad_to_multiple_of",
    f"{UTILS}:is_async_callable": "func",
    f"{UTILS}:repeat_iterable_dataset": "dataset mini_repeat_count batch_size repeat_count",
    # What `FusedLMHead` stands in for.
    "trl.kernels.chunked_logprob:ChunkedLogProbFunction.forward": "ctx hidden weight bias targets temperature chunk_size"
    " final_logit_softcapping logit_scale outputs",
    f"{UTILS}:_use_triton": "device",
    f"{UTILS}:add_fused_lm_head": "model temperature cast_lm_head_to_fp32 outputs",
    "trl.models.utils:disable_gradient_checkpointing": "model gradient_checkpointing_kwargs",
    # Made again in the trainer's process from what the upload's process tells.
    "huggingface_hub:CommitInfo.__init__": "self commit_url commit_message commit_description oid _endpoint pr_url",
    "trl.scripts.grpo:main": "script_args training_args model_args dataset_args",
    "trl.scripts.grpo:make_parser": "subparsers prog",
    "trl.scripts.sft:main": "script_args training_args model_args dataset_args",
    "trl.scripts.sft:make_parser": "subparsers prog",
    # transformers.
    f"{TRAINER}.create_scheduler": "self num_training_steps optimizer",
    f"{TRAINER}.create_optimizer": "self model",
    f"{TRAINER}._get_dataloader": "self dataset description batch_size sampler_fn is_training dataloader_key",
    f"{TRAINER}._get_train_sampler": "self train_dataset",
    f"{TRAINER}._run_epoch": "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial"
    " ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    f"{TRAINER}._prepare_for_training": "self max_steps train_dataloader resume_from_checkpoint",
    f"{TRAINER}._init_training_state": "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint"
    " trial",
    f"{TRAINER}._maybe_log_save_evaluate": "self tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time"
    " learning_rate",
    f"{TRAINER}.get_batch_samples": "self epoch_iterator num_batches device",
    f"{TRAINER}.prediction_step": "self model inputs prediction_loss_only ignore_keys",
    f"{TRAINER}.training_step": "self model inputs num_items_in_batch",
    f"{TRAINER}.compute_loss": "self model inputs return_outputs num_items_in_batch",
    f"{TRAINER}.get_train_dataloader": "self",
    f"{TRAINER}.get_cp_size": "self",
    f"{TRAINER}.floating_point_ops": "self inputs",
    f"{TRAINER}._track_num_input_tokens": "self inputs",
    f"{TRAINER}.compute_loss_context_manager": "self",
    f"{TRAINER}._prepare_inputs": "self inputs",
    f"{TRAINER}._save_checkpoint": "self model trial",
    f"{TRAINER}._get_output_dir": "self trial",
    "transformers.trainer_utils:get_last_checkpoint": "folder",
    f"{TRAINER}._load_optimizer_and_scheduler": "self checkpoint",
    f"{TRAINER}._load_rng_state": "self checkpoint",
    f"{TRAINER}._save_rng_state": "self output_dir",
    f"{TRAINER}.save_model": "self output_dir _internal_call",
    f"{TRAINER}.init_hf_repo": "self token private",
    f"{TRAINER}.push_to_hub": "self commit_message blocking token revision private **kwargs",
    f"{TRAINER}._push_from_checkpoint": "self checkpoint_folder",
    f"{TRAINER}._finish_current_push": "self",
    f"{TRAINER}.create_model_card": "self language license tags model_name finetuned_from tasks dataset_tags dataset"
    " dataset_args",
    f"{TRAINER}.log": "self logs start_time",
    f"{TRAINER}.get_tp_size": "self",
    f"{TRAINER}.get_sp_size": "self",
    # The one class that `Trainer._get_dataloader` takes as a batch sampler.
    "transformers.trainer_pt_utils:BatchRebalanceSampler.__init__": "self lengths effective_batch_size dp_size grad_accum"
    " shuffle seed rank drop_last",
    f"{TRAINER}.train": "self resume_from_checkpoint trial ignore_keys_for_eval",
    "transformers.modeling_utils:PreTrainedModel.set_attn_implementation": "self attn_implementation allow_all_kernels",
    f"{TRAINER}.add_callback": "self callback",
    # PEFT.
    "peft.tuners.adalora:AdaLoraModel.update_and_allocate": "self global_step",
    "peft.tuners.adalora.layer:RankAllocator.budget_schedule": "self step",
    "peft.tuners.adalora.layer:RankAllocator.reset_ipt": "self",
    f"{EVENTS}:CallbackHandler.call_event": "self event args state control **kwargs",
    f"{EVENTS}:TrainerState.load_from_json": "json_path",
    f"{EVENTS}:TrainerState.save_to_json": "self json_path",
    "transformers.modeling_layers:GradientCheckpointingLayer.__init_subclass__": "**kwargs",
    # What sequence parallelism stands in for: the table of attention backends.
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface": "attn_implementation default",
    # Layers, attention and masks.
    "transformers.modeling_utils:AttentionInterface.register": "key value",
    "transformers.masking_utils:AttentionMaskInterface.register": "key value",
    "transformers.masking_utils:causal_mask_function": "batch_idx head_idx q_idx kv_idx",
    "transformers.masking_utils:sdpa_mask": "batch_size q_length kv_length q_offset kv_offset mask_function attention_mask"
    " local_size allow_is_causal_skip allow_is_bidirectional_skip use_vmap device **kwargs",
    "transformers.masking_utils:flash_attention_mask": "batch_size q_length kv_length q_offset kv_offset mask_function"
    " attention_mask **kwargs",
    "transformers.integrations.sdpa_attention:sdpa_attention_forward": {
        (5, 23): "module query key value attention_mask dropout scaling is_causal position_bias cache **kwargs",
        (5, 24): "module query key value attention_mask dropout scaling is_causal position_bias **kwargs",
    },
    # What the memory planner asks about a model that it builds without data.
    "transformers:PreTrainedModel._from_config": "config **kwargs",
    "transformers:PreTrainedModel._get_dtype_plan": "self dtype",
    "transformers.core_model_loading:build_glob_alternation": "globs",
    "transformers.quantizers.base:get_keys_to_not_convert": "model",
    "transformers.quantizers.quantizers_utils:should_convert_module": "full_name patterns",
    "transformers.pytorch_utils:Conv1D.__init__": "self nf nx",
    "transformers.loss.loss_utils:ForCausalLMLoss": "logits labels vocab_size num_items_in_batch ignore_index"
    " shift_labels **kwargs",
    "trl.trainer.sft_trainer:SFTTrainer.compute_loss": "self model inputs return_outputs num_items_in_batch",
    # accelerate.
    "accelerate.hooks:add_hook_to_module": "module hook append",
    "accelerate:Accelerator._prepare_device_mesh": "self",
    "accelerate:Accelerator.backward": "self loss **kwargs",
    "accelerate:Accelerator.gather": "self tensor",
    "accelerate:Accelerator.no_sync": "self model",
    "accelerate:Accelerator.reduce": "self tensor reduction scale",
    "accelerate:Accelerator.unwrap_model": "self model keep_fp32_wrapper keep_torch_compile",
    "accelerate.utils:gather": "tensor",
    "accelerate.utils:send_to_device": "tensor device non_blocking skip_keys",
    "accelerate.utils:gather_object": "object",
    "accelerate.utils:reduce": "tensor reduction scale",
    "accelerate.utils:broadcast_object_list": "object_list from_process",
    "accelerate.data_loader:skip_first_batches": "dataloader num_batches",
    "accelerate.data_loader:DataLoaderShard.set_sampler": "self sampler",
    "accelerate.data_loader:DataLoaderShard.set_epoch": "self epoch",
    "accelerate.data_loader:DataLoaderShard.get_sampler": "self",
    "accelerate.data_loader:DataLoaderDispatcher.get_sampler": "self",
    "accelerate.data_loader:DataLoaderDispatcher.set_sampler": "self sampler",
    "accelerate.data_loader:DataLoaderDispatcher.set_epoch": "self epoch",
}

#: operator of torch -> the names of its arguments: what shared prompts call with a log-sum-exp of their own
OPERATORS = {
    "torch_attn._varlen_attn": "query key value cu_seq_q cu_seq_k max_q max_k is_causal scale window_size enable_gqa"
    " seqused_k block_table num_splits",
    "torch_attn._varlen_attn_backward": "grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal"
    " rng_state scale window_size",
    "aten._scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal attn_mask scale",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": "grad_out query key value out logsumexp dropout_p"
    " is_causal attn_mask scale",
}

#: constant -> value
CONSTANTS = {
    "transformers.trainer_utils:PREFIX_CHECKPOINT_DIR": "checkpoint",
    "transformers.trainer:TRAINER_STATE_NAME": "trainer_state.json",
    "transformers.trainer:OPTIMIZER_NAME": "optimizer.pt",
    "transformers.trainer:SCHEDULER_NAME": "scheduler.pt",
    "transformers.trainer:SCALER_NAME": "scaler.pt",
    "transformers.training_args:OptimizerNames.ADAMW_8BIT": "adamw_8bit",
    f"{GRPO}.loss_is_scaled_for_ga": True,
}

#: the callback events, with those that carry the trainer's parts to every callback
CALLBACK_EVENTS = (
    "on_init_end on_train_begin on_train_end on_epoch_begin on_epoch_end on_step_begin on_pre_optimizer_step"
    " on_optimizer_step on_substep_end on_step_end on_evaluate on_predict on_save on_log on_prediction_step"
    " on_push_begin"
)
CALLBACK_PARTS = {"model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"}

#: attributes that `GRPOTrainer.__init__` leaves behind: name -> type, or None where it may be several
GRPO_ATTRIBUTES: dict[str, type | tuple[type, ...] | None] = {
    "_step": int,
    "_buffered_inputs": type(None),
    "_metrics": dict,
    "_logs": dict,
    "_pending_metrics": dict,
    "_pending_extra_logs": dict,
    "_tokenizer": None,
    "_train_batch_size": int,
    "_created_lr_scheduler": bool,
    "_signature_columns": None,
    "_tag_names": list,
    "_name": str,
    "_entropy_bonus_enabled": bool,
    "aux_loss_enabled": bool,
    "beta": float,
    "chat_template_kwargs": dict,
    "compute_loss_func": type(None),
    "environment_factories": type(None),
    "environments": type(None),
    "eos_token_ids": list,
    "epsilon_high": float,
    "epsilon_low": float,
    "generation_config": None,
    "importance_sampling_level": str,
    "is_deepspeed_enabled": bool,
    "is_fsdp_enabled": bool,
    "label_smoother": type(None),
    "loss_type": str,
    "mask_truncated_completions": bool,
    "model_init": type(None),
    "max_completion_length": int,
    "model_accepts_loss_kwargs": bool,
    "multi_objective_aggregation": str,
    "num_generations": int,
    "num_generations_eval": int,
    "num_iterations": int,
    "off_policy_mask_threshold": type(None),
    "pad_to_multiple_of": (int, type(None)),
    "ref_model": type(None),
    "reward_func_names": list,
    "reward_funcs": list,
    "reward_weights": torch.Tensor,
    "rollout_func": type(None),
    "scale_rewards": str,
    "shuffle_dataset": bool,
    "tools": list,
    "top_entropy_quantile": float,
    "use_transformers_continuous_batching": bool,
    "use_vllm": bool,
    "vllm_importance_sampling_correction": bool,
    "vllm_importance_sampling_mode": str,
    "vllm_importance_sampling_clip_min": type(None),
    "vllm_importance_sampling_clip_max": float,
    "accelerator": None,
    "args": None,
    "callback_handler": None,
    "control": None,
    "model": None,
    "optimizer": type(None),
    "lr_scheduler": type(None),
    "state": None,
    "train_dataset": None,
    "hub_model_id": type(None),
    "is_world_process_zero": None,
}

#: attributes that exist once a run has begun
RUN_ATTRIBUTES = {"_trial", "current_gradient_accumulation_steps"}

#: submodules whose names are documented upstream for users
PUBLIC_MODULES = {"transformers.utils", "transformers.trainer_callback", "accelerate.utils.dataclasses"}

#: fields of `GRPOConfig` that are read: name -> default
GRPO_CONFIG = {
    "loss_type": "dapo",
    "beta": 0.0,
    "num_generations": 8,
    "num_iterations": 1,
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "mask_truncated_completions": False,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "shuffle_dataset": True,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_importance_sampling_correction": True,
    "epsilon": 0.2,
    "delta": None,
    "off_policy_mask_threshold": None,
    "max_completion_length": 512,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "disable_dropout": False,
    "seed": 42,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": None,
}

#: caller -> names it must call on `self` (or `super()`), else an override of ours is never reached
CALLS = {
    f"{GRPO}._prepare_inputs": "_generate_and_score_completions",
    f"{GRPO}._generate_and_score_completions": "_generate _get_per_token_logps_and_entropies _calculate_rewards",
    f"{GRPO}._generate": "_tokenize_prompts _generate_single_turn",
    f"{GRPO}.compute_loss": "_compute_loss",
    f"{GRPO}._compute_loss": "_get_per_token_logps_and_entropies get_high_entropy_mask get_off_policy_mask",
    f"{GRPO}.prediction_step": "_prepare_inputs compute_loss",
    f"{GRPO}.training_step": "training_step",
    f"{GRPO}._save_checkpoint": "create_model_card _save_checkpoint",
    f"{GRPO}._load_optimizer_and_scheduler": "_load_optimizer_and_scheduler",
    f"{GRPO}.get_train_dataloader": "_get_dataloader",
    f"{TRAINER}.training_step": "_prepare_inputs compute_loss",
    f"{TRAINER}._prepare_for_training": "create_optimizer create_scheduler _load_optimizer_and_scheduler",
    f"{TRAINER}._run_epoch": "get_batch_samples training_step _maybe_log_save_evaluate _load_rng_state",
    f"{TRAINER}._maybe_log_save_evaluate": "log _save_checkpoint",
    f"{TRAINER}._save_checkpoint": "_get_output_dir save_model _save_rng_state _push_from_checkpoint",
    f"{TRAINER}._inner_training_loop": "get_train_dataloader _init_training_state _prepare_for_training _run_epoch",
    f"{TRAINER}.prediction_step": "compute_loss",
    f"{TRAINER}._get_num_items_in_batch": "get_cp_size",
    f"{TRAINER}.get_total_train_batch_size": "get_cp_size",
    "accelerate:Accelerator.prepare_data_loader": "_prepare_device_mesh",
}

#: module-level helpers that a method must go through
HELPERS_CALLED = {
    f"{GRPO}._prepare_inputs": "shuffle_sequence_dict split_tensor_dict",
    f"{GRPO}._get_train_sampler": "RepeatSampler",
    f"{GRPO}.get_train_dataloader": "repeat_iterable_dataset",
    f"{GRPO}._generate_and_score_completions": "use_adapter disable_gradient_checkpointing gather_object",
}

#: method -> attributes of `self` (dotted) that its result depends on, and that we change or rely on
READS = {
    f"{GRPO}._prepare_inputs": "_step _buffered_inputs num_iterations args.steps_per_generation model.training",
    f"{GRPO}.get_train_dataloader": "_train_batch_size args.steps_per_generation args.generation_batch_size"
    " num_generations num_iterations train_dataset",
    f"{GRPO}._get_train_sampler": "num_generations num_iterations args.generation_batch_size"
    " args.steps_per_generation shuffle_dataset args.seed",
    f"{GRPO}._compute_loss": "current_gradient_accumulation_steps args.steps_per_generation accelerator.num_processes"
    " max_completion_length loss_type beta top_entropy_quantile off_policy_mask_threshold _entropy_bonus_enabled"
    " aux_loss_enabled importance_sampling_level",
    f"{GRPO}._generate_and_score_completions": "num_generations num_generations_eval reward_weights scale_rewards"
    " multi_objective_aggregation reward_func_names beta ref_model use_vllm vllm_importance_sampling_correction"
    " vllm_importance_sampling_mode vllm_importance_sampling_clip_min vllm_importance_sampling_clip_max"
    " num_iterations args.steps_per_generation args.gradient_accumulation_steps accelerator.process_index"
    " mask_truncated_completions args.per_device_train_batch_size",
    f"{GRPO}.training_step": "_step current_gradient_accumulation_steps",
}

#: what `_compute_loss` reads from the batch. A new key here may need trimming, sorting and moving like the others.
LOSS_READS = {
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "num_items_in_batch",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "tool_mask",
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
}

LOSS_TYPES = {"grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"}
#: which loss types share a normaliser: what "rows with zero advantage may be skipped" is corrected for
NORMALISERS = [{"grpo", "sapo"}, {"bnpo"}, {"dr_grpo"}, {"cispo", "dapo", "vespo"}, {"luspo"}]
#: ... and what each divides by, as names that occur in its branch
NORMALISER_TERMS = {
    "grpo": {"mask.sum(-1)", "mean()", "self.current_gradient_accumulation_steps"},
    "bnpo": {"mask.sum()", "self.current_gradient_accumulation_steps"},
    "dr_grpo": {"per_token_loss.size(0)", "self.max_completion_length", "self.current_gradient_accumulation_steps"},
    "dapo": {
        "num_items_in_batch",
        "self.accelerator.num_processes",
        "self.current_gradient_accumulation_steps",
        "self.args.steps_per_generation",
    },
    "luspo": {"sum(-1).mean()", "self.current_gradient_accumulation_steps"},
}

BASE_KEYS = {
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "advantages",
    "num_items_in_batch",
}
#: setting -> (arguments, exact keys of the dict that `_generate_and_score_completions` returns)
OUTPUTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, BASE_KEYS),
    "beta": ({"beta": 0.1}, {*BASE_KEYS, "ref_per_token_logps"}),
    "misaligned": (
        {"steps_per_generation": 2, "gradient_accumulation_steps": 1},
        {*BASE_KEYS, "old_per_token_logps"},
    ),
    "two passes": ({"num_iterations": 2}, {*BASE_KEYS, "old_per_token_logps"}),
    "accumulation": ({"gradient_accumulation_steps": 2}, BASE_KEYS),
    "truncated masked": ({"mask_truncated_completions": True}, BASE_KEYS),
}
#: key -> (which axes: n rows, P prompt tokens, C completion tokens, dtype)
SHAPES = {
    "prompt_ids": ("nP", torch.int64),
    "prompt_mask": ("nP", torch.int64),
    "completion_ids": ("nC", torch.int64),
    "completion_mask": ("nC", torch.int64),
    "advantages": ("n", torch.float32),
    "num_items_in_batch": ("", torch.int64),
    "old_per_token_logps": ("nC", torch.float32),
    "ref_per_token_logps": ("nC", torch.float32),
}

#: metrics that TRL logs in a plain run; ours stand beside them and never rename one
METRICS = (
    "loss grad_norm learning_rate epoch step num_tokens step_time reward reward_std frac_reward_zero_std entropy"
    " completions/mean_length completions/min_length completions/max_length completions/clipped_ratio"
    " completions/mean_terminated_length completions/min_terminated_length completions/max_terminated_length"
    " clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean clip_ratio/low_min clip_ratio/high_max"
    " rewards/binary_hash_reward/mean rewards/binary_hash_reward/std"
)


# --- reading upstream ----------------------------------------------------------------------------------------------


def resolve(path: str) -> Any:
    """Return the object at `module:attribute.attribute`."""
    module, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            pytest.fail(f"{path} is gone: {attribute!r} not found in {found!r}")
        found = getattr(found, attribute)
    return found


def parameters_of(path: str) -> str:
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return " ".join(marks.get(p.kind, "") + p.name for p in inspect.signature(resolve(path)).parameters.values())


def tree_of(path: str) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(resolve(path)))))


def dotted(node: ast.AST) -> str | None:
    """Return `a.b` for an attribute chain on `self` or `super()`, without the head."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    on_self = isinstance(node, ast.Name) and node.id == "self"
    on_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return ".".join(reversed(names)) if names and (on_self or on_super) else None


def attributes_read(path: str) -> set[str]:
    chains = {chain for node in ast.walk(tree_of(path)) if (chain := dotted(node))}
    return {".".join(chain.split(".")[:depth]) for chain in chains for depth in range(1, chain.count(".") + 2)}


def calls_in_order(path: str) -> list[str]:
    """Return what is called on `self` or `super()`, in source order."""
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    calls.sort(key=lambda node: (node.lineno, node.col_offset))
    return [name for node in calls if (name := dotted(node.func))]


def compared_with(test: ast.AST, attribute: str) -> set[str]:
    """Return the strings that `self.<attribute>` is compared with in one `if`."""
    found: set[str] = set()
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and dotted(node.left) == attribute:
            found |= {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    return found


def branches(path: str, attribute: str) -> list[list[tuple[set[str], str]]]:
    """Return each `if/elif` chain on `self.<attribute>` as [(compared strings, source of the branch), ...]."""
    tree = tree_of(path)
    continued = {id(node.orelse[0]) for node in ast.walk(tree) if isinstance(node, ast.If) and len(node.orelse) == 1}
    chains = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.If) or id(node) in continued or not compared_with(node.test, attribute):
            continue
        chain, link = [], node
        while True:
            chain.append((compared_with(link.test, attribute), "\n".join(map(ast.unparse, link.body))))
            if len(link.orelse) != 1 or not isinstance(link.orelse[0], ast.If):
                break
            link = link.orelse[0]
        chains.append(chain)
    return chains


# --- the tables are complete ---------------------------------------------------------------------------------------


def own_classes() -> list[tuple[str, ast.ClassDef]]:
    """Return (file, class) of everything that sits on an upstream trainer or callback."""
    files = python_files("hf_effi/trainers", "hf_effi/callbacks")
    return [(shown(f), n) for f in files for n in ast.walk(source_tree(f)) if isinstance(n, ast.ClassDef)]


def listed(owner: str = "") -> set[str]:
    """Return the last names of the paths in the tables above."""
    paths = [path for path in (*SIGNATURES, *CONSTANTS) if path.startswith(owner)]
    return {path.replace(":", ".").rsplit(".", 1)[-1] for path in paths}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_of_torch(operator):
    importlib.import_module("torch.nn.attention.varlen")
    namespace, _, name = operator.partition(".")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    assert " ".join(argument.name for argument in schema.arguments) == OPERATORS[operator]


def test_models_say_whether_they_hand_arguments_to_their_attention():
    assert resolve("transformers:PreTrainedModel")._supports_attention_backend is False
    assert tiny_qwen3()._supports_attention_backend is True
    assert tiny_qwen3(attn_implementation="eager").config._attn_implementation == "eager"


def test_every_override_is_listed():
    upstream = resolve(GRPO)
    wrong = [
        f"{file}:{method.lineno}: {owner.name}.{method.name}"
        for file, owner in own_classes()
        if file.startswith("hf_effi/trainers") and owner.name.endswith(("Mixin", "Trainer"))
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and hasattr(upstream, method.name)
        if method.name not in {"__init__", *listed(GRPO), *listed(TRAINER)}
    ]
    assert not wrong, "overrides of an upstream method that SIGNATURES does not list:\n" + "\n".join(wrong)


def test_every_private_import_is_listed():
    """Names of `trl`, `transformers` and `accelerate` below their top level: no upstream promise covers them."""
    paths = {*SIGNATURES, *CONSTANTS}
    known = paths | {path.rpartition(".")[0] for path in paths}  # a class is listed through its methods
    wrong = []
    for path in python_files("hf_effi"):
        for node in ast.walk(source_tree(path)):
            if not isinstance(node, ast.ImportFrom) or not node.module or node.level:
                continue
            package, _, rest = node.module.partition(".")
            if package not in {"trl", "transformers", "accelerate"} or not rest or node.module in PUBLIC_MODULES:
                continue
            for alias in node.names:
                if f"{node.module}:{alias.name}" not in known:
                    wrong.append(f"{shown(path)}:{node.lineno}: {node.module}:{alias.name}")
    assert not wrong, "private upstream names that no table lists:\n" + "\n".join(wrong)


def test_every_upstream_attribute_we_touch_is_listed(runs):
    """`self.<name>` in our mixins, where the stock trainer has that name."""
    stock = runs("default")
    own = {node.name for _, owner in own_classes() for node in ast.walk(owner) if isinstance(node, ast.FunctionDef)}
    known = {*GRPO_ATTRIBUTES, *listed(GRPO), *listed(TRAINER), *RUN_ATTRIBUTES}
    wrong = set()
    for file, owner in own_classes():
        if not file.startswith("hf_effi/trainers") or not owner.name.endswith(("Mixin", "Trainer")):
            continue
        for node in ast.walk(owner):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name) or node.value.id != "self":
                continue
            if node.attr not in known and node.attr not in own and hasattr(stock, node.attr):
                wrong.add(f"{file}:{node.lineno}: self.{node.attr}")
    assert not wrong, "upstream attributes that no table lists:\n" + "\n".join(sorted(wrong))


def test_every_config_field_we_read_is_listed():
    from transformers import TrainingArguments
    from trl import GRPOConfig

    fields = set(GRPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    wrong = set()
    for path in python_files("hf_effi/trainers"):
        for node in ast.walk(source_tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Attribute, ast.Name)):
                head = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                if head == "args" and node.attr in fields and node.attr not in GRPO_CONFIG:
                    wrong.add(f"{shown(path)}:{node.lineno}: args.{node.attr}")
    assert not wrong, "fields of GRPOConfig that GRPO_CONFIG does not list:\n" + "\n".join(sorted(wrong))


# --- names and signatures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    expected = SIGNATURES[path]
    if isinstance(expected, dict):
        installed = release_of(path.split(".")[0])
        expected = expected[max(release for release in expected if release <= installed)]
    assert parameters_of(path) == expected, f"{path}: the parameters moved"


def test_fused_head_calls_these_globals():
    """`FusedLMHead` gives the forward that TRL adds other values for them."""
    code = resolve(f"{UTILS}:add_fused_lm_head").__code__
    (forward,) = [part for part in code.co_consts if getattr(part, "co_name", "") == "_fused_forward"]
    assert {"_ChunkedLogProbFunction", "_use_triton"} <= set(forward.co_names)


@pytest.mark.parametrize("path", CONSTANTS)
def test_constant(path):
    assert resolve(path) == CONSTANTS[path], f"{path} changed"


@pytest.mark.parametrize("path", CALLS)
def test_our_override_is_still_called(path):
    missing = [name for name in CALLS[path].split() if name not in calls_in_order(path)]
    assert not missing, f"{path} no longer calls self.{missing}: an override of it would never run"


@pytest.mark.parametrize("path", HELPERS_CALLED)
def test_helper_is_still_used(path):
    called = {n.func.id for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    missing = set(HELPERS_CALLED[path].split()) - called
    assert not missing, f"{path} no longer calls {sorted(missing)}"


@pytest.mark.parametrize("path", READS)
def test_attributes_are_still_read(path):
    missing = set(READS[path].split()) - attributes_read(path)
    assert not missing, f"{path} no longer reads self.{sorted(missing)}: setting it has no effect there"


def test_trainer_takes_this_class_as_a_batch_sampler_that_knows_its_rank():
    source = inspect.getsource(resolve(f"{TRAINER}._get_dataloader"))
    assert source.count("isinstance(sampler, BatchRebalanceSampler)") == 2, (
        "see hf_effi/trainers/mixins/token_budget.py"
    )
    assert 'dataloader_params["batch_sampler"] = sampler' in source and "prepared_bs.num_processes = 1" in source


def test_log_probs_come_before_rewards_in_stock():
    """Why rows are chosen after `super()` and their old log-probs are deferred."""
    calls = calls_in_order(f"{GRPO}._generate_and_score_completions")
    order = [calls.index(n) for n in ("_generate", "_get_per_token_logps_and_entropies", "_calculate_rewards")]
    assert order == sorted(order), f"the order of {GRPO}._generate_and_score_completions changed: {order}"


def test_scheduler_is_made_before_the_checkpoint_is_loaded():
    calls = calls_in_order(f"{TRAINER}._prepare_for_training")
    assert calls.index("create_scheduler") < calls.index("_load_optimizer_and_scheduler")


def test_a_checkpoint_is_pushed_after_the_random_states_and_before_on_save():
    """Why resume files are written with the random states, and those of callbacks when a push begins."""
    saved = calls_in_order(f"{TRAINER}._save_checkpoint")
    order = [saved.index(name) for name in ("save_model", "_save_rng_state", "_push_from_checkpoint")]
    assert order == sorted(order)
    calls = calls_in_order(f"{TRAINER}._maybe_log_save_evaluate")
    assert calls.index("_save_checkpoint") < calls.index("callback_handler.on_save")
    source = inspect.getsource(resolve(f"{TRAINER}._save_checkpoint"))
    assert source.index("save_to_json") < source.index("_push_from_checkpoint")
    source = inspect.getsource(resolve(f"{TRAINER}._push_from_checkpoint"))
    assert source.index("callback_handler.on_push_begin") < source.index("upload_folder")
    source = inspect.getsource(resolve(f"{EVENTS}:CallbackHandler.on_save"))
    assert "control.should_save = False" in source, (
        "`should_save` tells a push inside a save from one of a finished model"
    )


def test_one_state_is_shared_by_the_callbacks_of_a_run_and_each_training_has_a_new_one(tmp_path):
    """Claims of one owner lie on the state; what is no field of it goes into no file."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Notes(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_init_end(self, args, state, control, **kwargs):
            self.seen.append(state)

        def on_train_begin(self, args, state, control, **kwargs):
            self.seen.append(state)

    one, two = Notes(), Notes()
    args = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(tiny_qwen3(num_hidden_layers=1), args, train_dataset=lm_dataset(8), callbacks=[one, two])
    trainer.train()
    trainer.train()
    assert [id(state) for state in one.seen] == [id(state) for state in two.seen]
    assert len({id(state) for state in one.seen}) == 3, "when it is built, and for each training"
    trainer.state.is_no_field = object()
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert "is_no_field" not in (tmp_path / "state.json").read_text()


def test_a_lambda_scheduler_restores_these_and_keeps_slots_and_functions_out_of_its_state():
    from hf_effi.trainers.mixins.schedule import FollowedLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = FollowedLR(optimizer)
    assert set(scheduler.state_dict()) >= {"base_lrs", "last_epoch", "_step_count", "_last_lr", "lr_lambdas"}
    assert scheduler.state_dict()["lr_lambdas"] == [None] and "earlier" not in scheduler.state_dict()
    assert optimizer.param_groups[0]["initial_lr"] == 1.0, "from which the next scheduler takes its base LR"


def test_deepspeed_wraps_a_scheduler_as_this_attribute():
    from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    inner = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    wrapper = DeepSpeedSchedulerWrapper(inner, optimizer)
    wrapper.step()
    assert wrapper.scheduler is inner and inner.last_epoch == 0 and wrapper.get_last_lr() == [1.0]


def test_callback_events():
    found = {name for name in dir(resolve(f"{EVENTS}:TrainerCallback")) if name.startswith("on_")}
    missing, new = set(CALLBACK_EVENTS.split()) - found, found - set(CALLBACK_EVENTS.split())
    assert not missing and not new, f"TrainerCallback events gone: {sorted(missing)}; new: {sorted(new)}"
    call = next(
        node
        for node in ast.walk(tree_of(f"{EVENTS}:CallbackHandler.call_event"))
        if isinstance(node, ast.Call) and any(keyword.arg == "model" for keyword in node.keywords)
    )
    passed = {keyword.arg for keyword in call.keywords if keyword.arg}
    assert passed == CALLBACK_PARTS, f"CallbackHandler.call_event passes {sorted(passed)}"


def test_config_fields():
    from trl import GRPOConfig

    wrong = []
    for name, default in GRPO_CONFIG.items():
        field = GRPOConfig.__dataclass_fields__.get(name)
        if field is None:
            wrong.append(f"GRPOConfig.{name} is gone")
        elif field.default != default:
            wrong.append(f"GRPOConfig.{name} defaults to {field.default!r}, was {default!r}")
    assert not wrong, "; ".join(wrong)
    assert "lr_scheduler_kwargs" in GRPOConfig._VALID_DICT_FIELDS


def test_trainer_state_fields():
    fields = {field.name for field in dataclasses.fields(resolve(f"{EVENTS}:TrainerState"))}
    needed = {"stateful_callbacks", "log_history", "global_step", "epoch", "max_steps", "is_world_process_zero"}
    assert needed <= fields, f"TrainerState lost {sorted(needed - fields)}"


# --- the loss ------------------------------------------------------------------------------------------------------


def test_loss_reads_these_keys_of_the_batch():
    found = set()
    for node in ast.walk(tree_of(f"{GRPO}._compute_loss")):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "inputs":
            found.add(node.slice.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "inputs":
                found.add(node.args[0].value)
        elif isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Name):
            if node.comparators[0].id == "inputs":
                found.add(node.left.value)
    assert found == LOSS_READS, f"new: {sorted(found - LOSS_READS)}; no longer read: {sorted(LOSS_READS - found)}"


def test_loss_types_are_these_eight():
    import trl

    named = set()
    for chain in branches(f"{GRPO}._compute_loss", "loss_type"):
        named |= set().union(*(strings for strings, _ in chain))
    assert named == LOSS_TYPES, f"_compute_loss knows {sorted(named)}"
    help_text = trl.GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    values = help_text.partition("Supported values are ")[2].partition(".")[0]
    assert {part.strip(" '") for part in values.replace("and", "").split(",")} == LOSS_TYPES, values
    missing = [name for name in LOSS_TYPES if f'- `"{name}"`' not in trl.GRPOConfig.__doc__]
    assert not missing, f"the docstring of GRPOConfig no longer lists {missing}"


def normaliser_chain() -> list[tuple[set[str], str]]:
    chains = [c for c in branches(f"{GRPO}._compute_loss", "loss_type") if "normalizer" in c[0][1]]
    assert len(chains) == 1, "cannot find the if/elif chain of normalisers in _compute_loss"
    return chains[0]


def test_loss_types_share_these_normalisers():
    assert [types for types, _ in normaliser_chain()] == NORMALISERS


@pytest.mark.parametrize("loss_type", NORMALISER_TERMS)
def test_normaliser_divides_by(loss_type):
    (source,) = [source for types, source in normaliser_chain() if loss_type in types]
    missing = {term for term in NORMALISER_TERMS[loss_type] if term not in source.replace('"', "'")}
    assert not missing, f"loss_type={loss_type!r} no longer divides by {sorted(missing)}:\n{source}"


def test_losses_that_divide_by_tokens_are_those_that_we_count_tokens_for():
    from hf_effi.trainers.grpo.pipeline import TOKEN_LOSSES

    assert set(TOKEN_LOSSES) == {"bnpo"} | NORMALISERS[3]


def test_the_ratio_has_these_modes_and_multiplies_every_loss_but_one():
    source = textwrap.dedent(inspect.getsource(resolve(f"{GRPO}._generate_and_score_completions")))
    modes = {
        text for text in re.findall(r'"(\w+_(?:mask|truncate))"', source) if text.startswith(("token", "sequence"))
    }
    assert modes == {"token_mask", "token_truncate", "sequence_mask", "sequence_truncate"}
    # A difference of 0, on padding, is a ratio of 1 before it is clipped.
    assert "(old_per_token_logps - sampling_per_token_logps) * mask" in source and "torch.exp(logps_diff)" in source
    loss = textwrap.dedent(inspect.getsource(resolve(f"{GRPO}._compute_loss")))
    assert (
        'and self.loss_type != "vespo":\n        per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]'
        in (loss)
    )


def test_generation_returns_completions_second():
    returned = [node.value for node in ast.walk(tree_of(f"{GRPO}._generate")) if isinstance(node, ast.Return)][-1]
    assert [element.id for element in returned.elts[:3]] == ["prompt_ids", "completion_ids", "tool_mask"]


# --- a real run ----------------------------------------------------------------------------------------------------


def recording_trainer() -> type:
    from trl import GRPOTrainer

    class Recording(GRPOTrainer):
        """Stock, but it keeps what goes through the seams."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.outputs: list[dict[str, Any]] = []
            self.rows: list[list[dict[str, Any]]] = []
            self.batches: list[dict[str, Any]] = []
            self.rewards: list[torch.Tensor] = []
            self.logps: list[tuple[Any, ...]] = []
            super().__init__(*args, **kwargs)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            self.rows.append(inputs)
            self.outputs.append(super()._generate_and_score_completions(inputs))
            return self.outputs[-1]

        def _calculate_rewards(self, *args: Any) -> Any:
            self.rewards.append(super()._calculate_rewards(*args))
            return self.rewards[-1]

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            self.batches.append(inputs)
            return super()._compute_loss(model, inputs)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            self.logps.append(super()._get_per_token_logps_and_entropies(*args, **kwargs))
            return self.logps[-1]

    return Recording


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """`beta != 0` loads its reference from the path of the model."""
    return save_tiny(tiny_qwen3(end_tokens=10), tiny_tokenizer(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_path):
    made: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in made:
            model = model_path if name == "beta" else None
            over = {"max_steps": 2, "logging_steps": 1, **OUTPUTS[name][0]}
            args = grpo_args(tmp_path_factory.mktemp("run"), **over)
            made[name] = run_grpo(recording_trainer(), args, model=model)
        return made[name]

    return run


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_keys(runs, name):
    output, expected = runs(name).outputs[0], OUTPUTS[name][1]
    found = set(output)
    assert found == expected, f"{name}: new {sorted(found - expected)}; missing {sorted(expected - found)}"


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_shapes(runs, name):
    trainer = runs(name)
    output, args = trainer.outputs[0], trainer.args
    rows = args.per_device_train_batch_size * args.steps_per_generation
    sizes = {"n": rows, "P": output["prompt_ids"].size(1), "C": output["completion_ids"].size(1)}
    for key, value in output.items():
        axes, dtype = SHAPES[key]
        assert tuple(value.shape) == tuple(sizes[axis] for axis in axes), f"{name}: {key} is {tuple(value.shape)}"
        assert value.dtype == dtype, f"{name}: {key} is {value.dtype}"
    assert output["num_items_in_batch"] == output["completion_mask"].sum()
    assert len(trainer.rows[0]) == rows, "the trainer no longer gets one list of rows per generation"
    assert set(trainer.rows[0][0]) == {"prompt", "answer", "level"}, "dataset columns no longer reach the rollout"


def test_padding_sides(runs):
    output = runs("default").outputs[0]
    prompts, completions = output["prompt_mask"], output["completion_mask"]
    assert (prompts.sort(dim=1).values == prompts).all(), "prompts are no longer padded on the left"
    assert (completions.sort(dim=1, descending=True).values == completions).all(), "completions no longer on the right"
    assert completions.min() == 0, "this run should have ragged completions"


def test_generation_schedule(runs):
    """One generation every `steps_per_generation * num_iterations` micro-steps, each split into equal micro-batches."""
    for name, generations, micro_steps in (("default", 2, 2), ("misaligned", 1, 2), ("two passes", 1, 2)):
        trainer = runs(name)
        assert (len(trainer.outputs), len(trainer.batches)) == (generations, micro_steps), name
        assert trainer._step == micro_steps
        sizes = {batch["advantages"].size(0) for batch in trainer.batches}
        assert sizes == {trainer.args.per_device_train_batch_size}, name
    assert len(runs("accumulation").batches) == 4


def test_rewards_and_advantages(runs):
    """Rewards come back gathered, (rows, functions); advantages are `(r - mean) / (std + 1e-4)` in each group."""
    trainer = runs("default")
    for rewards, output in zip(trainer.rewards, trainer.outputs, strict=True):
        assert rewards.shape == (4, 1)
        groups = rewards[:, 0].view(-1, trainer.num_generations)
        expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        assert torch.allclose(output["advantages"], expected.view(-1), atol=1e-6)


def test_log_probs_come_back_as_three(runs):
    trainer = runs("default")
    logps, entropies, aux_loss = trainer.logps[0]
    assert logps.shape == entropies.shape == trainer.batches[0]["completion_ids"].shape
    assert aux_loss is None
    assert logps.requires_grad
    # Old log-probs of the misaligned run: computed without entropies.
    assert runs("misaligned").logps[0][1] is None


def test_log_probs_are_those_of_the_next_token(runs):
    """What our bucketed forward reproduces: temperature, shift, alignment with the completion."""
    trainer = runs("misaligned")
    output = trainer.outputs[0]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = tiny_qwen3(end_tokens=10)(input_ids=ids, attention_mask=mask).logits / trainer.temperature
    width = output["completion_ids"].size(1)
    expected = logits.log_softmax(-1)[:, -width - 1 : -1].gather(2, output["completion_ids"].unsqueeze(2)).squeeze(2)
    real = output["completion_mask"].bool()
    assert torch.allclose(output["old_per_token_logps"][real], expected[real], atol=1e-4)


def test_attributes(runs):
    from trl import GRPOTrainer

    args = grpo_args(runs("default").args.output_dir)
    trainer = run_grpo(GRPOTrainer, args, train=False)
    wrong = []
    for name, kind in GRPO_ATTRIBUTES.items():
        if not hasattr(trainer, name):
            wrong.append(f"GRPOTrainer.{name} is gone")
        elif kind is not None and not isinstance(getattr(trainer, name), kind):
            wrong.append(f"GRPOTrainer.{name} is {getattr(trainer, name)!r}, not {kind}")
    assert not wrong, "\n".join(wrong)
    assert set(trainer._metrics) == {"train", "eval"}
    assert {"prompt", "completion", "rewards", "advantages", "extra", "images"} <= set(trainer._logs)
    assert trainer._signature_columns is None or "prompt" in trainer._signature_columns
    assert runs("default").current_gradient_accumulation_steps == 1
    assert runs("accumulation").current_gradient_accumulation_steps == 2


def test_metric_names(runs):
    logged = set().union(*(entry for entry in runs("default").state.log_history))
    missing = set(METRICS.split()) - logged
    assert not missing, f"TRL no longer logs {sorted(missing)}"
    ours = [name for name in logged if name.startswith("effi/")]
    assert not ours, f"stock TRL took our prefix: {ours}"


def test_eval_goes_through_the_same_seam(tmp_path):
    args = grpo_args(tmp_path, max_steps=1, per_device_eval_batch_size=4)
    trainer = run_grpo(recording_trainer(), args, eval_dataset=prompt_dataset(2), train=False)
    metrics = trainer.evaluate()
    assert set(trainer.outputs[0]) == BASE_KEYS
    assert "eval_loss" in metrics and trainer._step == 0 and trainer._buffered_inputs is None


# --- behaviour of the helpers --------------------------------------------------------------------------------------


class TestRepeatSampler:
    def sampler(self, **over: Any) -> Any:
        settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "seed": 5, **over}
        return resolve(f"{UTILS}:RepeatSampler")(list(range(7)), **settings)

    def test_order_and_dropped_tail(self):
        sampler = self.sampler(shuffle=False)
        block, other = [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]
        assert list(sampler) == block + block + other + other
        assert len(sampler) == 24

    def test_attributes_that_our_sampler_copies(self):
        names = "data_source mini_repeat_count batch_size repeat_count num_samples shuffle seed generator"
        missing = [name for name in names.split() if not hasattr(self.sampler(), name)]
        assert not missing, f"RepeatSampler lost {missing}"

    def test_each_pass_draws_one_permutation_from_a_running_generator(self):
        """Why a stock resume in epoch 1 replays epoch 0: a new sampler starts the generator again."""
        sampler, generator = self.sampler(), torch.Generator().manual_seed(5)
        first, second = list(sampler), list(sampler)
        for drawn in (first, second):
            assert drawn[:6:2] == torch.randperm(7, generator=generator).tolist()[:3]
        assert first != second
        assert list(self.sampler()) == first
        assert not hasattr(sampler, "set_epoch")


def test_split_tensor_dict_floors_and_keeps_scalars():
    split = resolve(f"{UTILS}:split_tensor_dict")
    parts = split({"x": torch.arange(5), "s": torch.tensor(7), "l": list("abcde"), "none": None}, 2)
    assert [part["x"].tolist() for part in parts] == [[0, 1], [2, 3]]  # row 4 is lost, silently
    assert [part["l"] for part in parts] == [["a", "b"], ["c", "d"]]
    assert [part["s"].item() for part in parts] == [7, 7]
    assert [part["none"] for part in parts] == [None, None]


def test_shuffle_sequence_dict_permutes_in_unison_with_the_global_generator():
    shuffle = resolve(f"{UTILS}:shuffle_sequence_dict")
    torch.manual_seed(3)
    out = shuffle({"x": torch.arange(6), "l": list(range(6)), "s": torch.tensor(7), "none": None})
    torch.manual_seed(3)
    assert out["x"].tolist() == torch.randperm(6).tolist() == out["l"]
    assert out["s"].item() == 7 and out["none"] is None


def test_use_adapter_sets_and_restores():
    from peft import LoraConfig, get_peft_model

    use_adapter = resolve(f"{UTILS}:use_adapter")
    model = get_peft_model(tiny_qwen3(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.arange(4, 12).unsqueeze(0)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    own = logits()
    with use_adapter(model, "ref"):
        assert model.active_adapter == "ref"
        assert not torch.equal(logits(), own)
    with use_adapter(model, None):
        with torch.no_grad():
            assert torch.equal(logits(), tiny_qwen3()(input_ids=ids).logits)
    assert model.active_adapter == "default"
    assert torch.equal(logits(), own)
    with contextlib.suppress(KeyError), use_adapter(model, "ref"):
        raise KeyError
    assert model.active_adapter == "default"


# --- a stock Trainer with a callback -------------------------------------------------------------------------------


def test_callback_events_in_order_with_their_parts_and_state(tmp_path):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[str] = []
            self.rates: list[float] = []
            self.restored: Any = None

        def _note(self, name: str, state: Any, kwargs: Any) -> None:
            self.seen.append(name)
            assert set(kwargs) >= CALLBACK_PARTS, f"{name} lacks {CALLBACK_PARTS - set(kwargs)}"
            if name == "on_train_begin":
                self.restored = state.stateful_callbacks.get("hf_effi.test")
                scheduler = kwargs["lr_scheduler"]
                assert type(scheduler).__name__ == "LambdaLR", "the scheduler is wrapped now"
                for attribute in ("lr_lambdas", "base_lrs", "last_epoch", "_last_lr"):
                    assert hasattr(scheduler, attribute), f"LambdaLR.{attribute} is gone"
                scheduler.lr_lambdas = [lambda step: 1.0 / (1 + step)] * len(scheduler.lr_lambdas)
            if name == "on_pre_optimizer_step":
                self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])
            if name == "on_step_end":
                state.stateful_callbacks["hf_effi.test"] = {"seen_steps": state.global_step}

    for event in CALLBACK_EVENTS.split():
        if event != "on_init_end":

            def method(self: Any, args: Any, state: Any, control: Any, _event: str = event, **kwargs: Any) -> None:
                self._note(_event, state, kwargs)

            setattr(Recorder, event, method)

    def train(steps: int, resume: bool) -> Any:
        args = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            save_steps=2,
            max_steps=steps,
            learning_rate=0.5,
        )
        recorder = Recorder()
        trainer = Trainer(model=tiny_qwen3(), args=args, train_dataset=lm_dataset(32), callbacks=[recorder])
        trainer.train(resume_from_checkpoint=resume or None)
        return recorder, trainer

    recorder, trainer = train(2, False)
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    expected = ["on_train_begin", "on_epoch_begin", *step, *step, "on_save", "on_epoch_end", "on_log", "on_train_end"]
    assert recorder.seen == expected
    assert recorder.rates == [0.5, 0.25], "one scheduler step per optimizer step; the lambda can be replaced"
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == recorder.rates, "the logged learning rate is the one that was used"

    recorder, _ = train(4, True)
    assert recorder.restored == {"seen_steps": 2}, "state.stateful_callbacks no longer survives a resume"
    assert recorder.rates[0] == pytest.approx(0.5 / 3), "after a resume the scheduler goes on where it was"


def test_what_probes_and_factors_of_the_lr_lean_on(tmp_path):
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import Trainer, TrainingArguments

    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = LambdaLR(torch.optim.SGD([parameter], lr=0.5), lambda step: 1.0)
    mine = scheduler._last_lr = [0.25]
    assert scheduler.get_last_lr() == [0.25], "what the Trainer logs is what was put there"
    scheduler.optimizer.step()
    scheduler.step()
    assert scheduler._last_lr is not mine and scheduler._last_lr == [0.5], "a step puts a list of its own there"

    args = TrainingArguments(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = Trainer(tiny_qwen3(), args, train_dataset=lm_dataset(4))
    first = type(trainer.callback_handler.callbacks[0]).__name__
    assert first == "DefaultFlowCallback", "what falls due is decided before any callback of the user"
    trainer.state._hf_effi_test = object()
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert "_hf_effi_test" not in (tmp_path / "state.json").read_text(), "attributes that are no fields are not saved"


# --- layers and attention ------------------------------------------------------------------------------------------


def test_layers_checkpoint_through_a_function_of_their_own():
    """What LayerModes replaces: read at every forward, called with the forward and its positional inputs."""
    model = tiny_qwen3(use_cache=False).train()
    model.activation_checkpointing_enable()
    layers = model.model.layers
    found = layers[0]._gradient_checkpointing_func
    assert found.func is torch.utils.checkpoint.checkpoint and found.keywords == {"use_reentrant": False}
    calls = []

    def mine(function, *args):
        calls.append([tuple(arg.shape) for arg in args])
        return function(*args)

    layers[1]._gradient_checkpointing_func = mine
    ids = torch.arange(8)[None]
    model(input_ids=ids)
    model.activation_checkpointing_disable()
    assert layers[1]._gradient_checkpointing_func is not mine and not layers[1].gradient_checkpointing
    model(input_ids=ids)
    assert calls == [[(1, 8, 32)]]


def test_attention_that_is_in_no_mask_table_gets_no_mask():
    """Why the planner's trace has fused causal attention."""
    attention = resolve("transformers.modeling_utils:AttentionInterface")
    assert isinstance(attention._global_mapping, dict)
    masks = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        assert kwargs["position_ids"].shape == (1, 8), "position_ids reach the attention"
        return query.transpose(1, 2), None

    attention.register("hf_effi_spy", spy)
    try:
        model = tiny_qwen3()
        model.set_attn_implementation("hf_effi_spy")
        model(input_ids=torch.arange(8)[None], attention_mask=torch.tensor([[0] + [1] * 7]))
    finally:
        attention._global_mapping.pop("hf_effi_spy")
    assert masks == [None, None]


def test_models_say_whether_they_have_fused_attention():
    from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config

    mapping = AutoModelForCausalLM._model_mapping
    assert mapping[Qwen3Config]._supports_sdpa and not mapping[Gemma2Config]._supports_sdpa


# --- collectives ---------------------------------------------------------------------------------------------------


def _collectives() -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    rows = torch.tensor([[rank, 0], [rank, 1]])
    return {
        "gather": accelerator.gather(rows).tolist(),
        "gather_scalar": accelerator.gather(torch.tensor(rank)).tolist(),
        "gather_object": gather_object([f"{rank}a", f"{rank}b"]),
        "reduce": accelerator.reduce(torch.tensor([1.0, rank]), reduction="sum").tolist(),
        "world": (accelerator.num_processes, accelerator.is_main_process, accelerator.sync_gradients),
    }


def test_collectives_are_rank_major_and_flat():
    first, second = run_distributed(_collectives, 2)
    assert first.pop("world") == (2, True, True) and second.pop("world") == (2, False, True)
    assert (
        first
        == second
        == {
            "gather": [[0, 0], [0, 1], [1, 0], [1, 1]],
            "gather_scalar": [0, 1],
            "gather_object": ["0a", "0b", "1a", "1b"],
            "reduce": [2.0, 1.0],
        }
    )


def test_binary_reward_name_is_the_metric_name(runs):
    assert runs("default").reward_func_names == [binary_hash_reward.__name__]


# --- what tiled and chunked computation leans on -------------------------------------------------------------------


def test_the_loss_of_a_model_can_be_set_on_its_instance():
    model = tiny_qwen3()
    assert model.loss_function.__name__ == "ForCausalLMLoss" and "_loss_function" not in model.__dict__
    model.__dict__["_loss_function"] = marker = object()
    assert model.loss_function is marker


def test_a_decoder_layer_reads_its_own_checkpointing_flag():
    model = tiny_qwen3().train()
    model.activation_checkpointing_enable()
    layer = model.model.layers[0]
    assert layer.gradient_checkpointing is True
    layer._gradient_checkpointing_func = None
    with pytest.raises(TypeError):
        model(torch.ones(1, 2, dtype=torch.long))
    layer.__dict__["gradient_checkpointing"] = False
    model(torch.ones(1, 2, dtype=torch.long))


def test_attention_takes_its_keys_from_a_cache_of_any_class():
    calls = []

    class Cache:
        def update(self, keys, values, layer_idx, *args, **kwargs):
            calls.append((tuple(keys.shape), layer_idx))
            return keys, values

    layer = tiny_qwen3().model.layers[1]
    cos = torch.ones(1, 3, 8)
    layer(torch.zeros(1, 3, 32), position_embeddings=(cos, 0 * cos), **{CACHE_ARGUMENT: Cache()})
    assert calls == [((1, 2, 3, 8), 1)]


def test_a_dynamic_cache_keeps_the_graph_of_what_it_is_given():
    from transformers import DynamicCache

    cache, keys = DynamicCache(), torch.ones(1, 2, 3, 4, requires_grad=True)
    cache.update(keys, keys, 0)
    cache.update(2 * keys, keys, 0)
    assert cache.layers[0].keys.shape == (1, 2, 6, 4)
    cache.layers[0].keys[..., 3:, :].sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2.0))


def test_lora_layers_have_these_parts():
    from peft import LoraConfig, get_peft_model

    layer = (
        get_peft_model(tiny_qwen3(), LoraConfig(target_modules=["up_proj"]))
        .base_model.model.model.layers[0]
        .mlp.up_proj
    )
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "lora_variant", "active_adapters"):
        assert hasattr(layer, name), name
    assert (
        layer.merged is False and layer.disable_adapters is False and callable(layer.unmerge) and callable(layer.merge)
    )
    assert isinstance(layer.scaling["default"], (int, float)) and layer.active_adapters == ["default"]


def test_torch_multiplies_rows_of_eight_bits():
    names = [argument.name for argument in torch.ops.aten._scaled_mm.default._schema.arguments]
    assert names[:4] == ["self", "mat2", "scale_a", "scale_b"] and {"out_dtype", "use_fast_accum"} <= set(names)
    ones = torch.ones(8, 8, dtype=torch.int8)
    assert torch.equal(torch._int_mm(ones, ones.t()), torch.full((8, 8), 8, dtype=torch.int32))


def test_peft_keeps_adaloras_state_where_the_callback_finds_it():
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=2, target_r=1, total_step=3, target_modules=["q_proj"])
    adapter = get_peft_model(tiny_qwen3(num_hidden_layers=1), config).base_model
    assert adapter.trainable_adapter_name == "default" and adapter.peft_config["default"] is config
    allocator = adapter.rankallocator
    assert allocator.peft_config is config and allocator.adapter_name == "default"
    assert allocator.init_bgt == 2 and allocator.target_bgt == 1
    assert allocator.ipt == allocator.exp_avg_ipt == allocator.exp_avg_unc == {}
    assert config.rank_pattern is None


def test_no_stock_trainer_moves_adaloras_ranks():
    """When upstream begins to, `AdaLoRACallback` would do it twice and has to go."""
    import accelerate
    import transformers
    import trl

    callers = [
        path
        for package in (transformers, trl, accelerate)
        for path in Path(package.__file__).parent.rglob("*.py")
        if "update_and_allocate" in path.read_text(encoding="utf-8")
    ]
    assert callers == []
