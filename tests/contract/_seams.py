"""The tables of what hf_effi leans on upstream: one line is one seam."""

from __future__ import annotations

import ast

import torch

from tests.contract._sources import python_files, shown
from tests.contract._sources import tree_of as source_tree

GRPO = "trl.trainer.grpo_trainer:GRPOTrainer"

UTILS = "trl.trainer.utils"

TRAINER = "transformers.trainer:Trainer"

EVENTS = "transformers.trainer_callback"

#: callable -> its parameter names in order; `*` and `**` mark the variadic ones. Where they differ between the
#: releases that setup.cfg allows: release -> names, from that one on.
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
    # What `SparseDecoding` stands around, in the model that generates.
    "transformers.generation.utils:GenerationMixin._get_stopping_criteria": "self generation_config stopping_criteria"
    " tokenizer",
    "transformers.generation.stopping_criteria:StoppingCriteriaList.__call__": "self input_ids scores **kwargs",
    "transformers.cache_utils:Cache.reorder_cache": "self beam_idx",
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
    # What stands in for the client of a vLLM server, and who calls it.
    "trl.generation.vllm_client:VLLMClient.generate": "self prompts features n repetition_penalty temperature top_p "
    "top_k"
    " min_p max_tokens logprobs structured_outputs_regex generation_kwargs",
    "trl.generation.vllm_client:VLLMClient.update_named_params": "self metadata named_params",
    "trl.generation.vllm_client:VLLMClient.image_features": "self images max_concurrent_requests",
    "trl.generation.vllm_client:VLLMClient.reset_prefix_cache": "self",
    "trl.generation.vllm_generation:VLLMGeneration.generate": "self prompts images num_generations profiler",
    "trl.generation.vllm_generation:VLLMGeneration.sync_weights": "self",
    # TRL's helpers.
    f"{UTILS}:RepeatSampler.__init__": "self data_source mini_repeat_count batch_size repeat_count shuffle seed",
    f"{UTILS}:split_tensor_dict": "tensor_dict num_chunks",
    f"{UTILS}:shuffle_sequence_dict": "seq_dict",
    f"{UTILS}:split_pixel_values_by_grid": "batch",
    f"{UTILS}:unsplit_pixel_values_by_grid": "batch",
    f"{UTILS}:use_adapter": "model adapter_name",
    f"{UTILS}:nanstd": "tensor dim keepdim",
    f"{UTILS}:pad": "tensors padding_value padding_side pad_to_multiple_of",
    f"{UTILS}:is_async_callable": "func",
    f"{UTILS}:repeat_iterable_dataset": "dataset mini_repeat_count batch_size repeat_count",
    # What `FusedLMHead` stands in for.
    "trl.kernels.chunked_logprob:ChunkedLogProbFunction.forward": "ctx hidden weight bias targets temperature "
    "chunk_size"
    " final_logit_softcapping logit_scale outputs",
    f"{UTILS}:_use_triton": "device",
    f"{UTILS}:add_fused_lm_head": "model temperature cast_lm_head_to_fp32 outputs",
    "trl.models.utils:disable_gradient_checkpointing": "model gradient_checkpointing_kwargs",
    "trl.models.utils:add_hooks": "model",
    # What `pdr_rollout_func` generates in.
    "trl.models.utils:unwrap_model_for_generation": "model accelerator gather_deepspeed3_params generation_kwargs"
    " gradient_checkpointing_kwargs",
    "trl.models.utils:remove_hooks": "model",
    # Made again in the trainer's process from what the upload's process tells.
    "huggingface_hub:CommitInfo.__init__": "self commit_url commit_message commit_description oid _endpoint pr_url",
    "trl.scripts.grpo:main": "script_args training_args model_args dataset_args",
    "trl.scripts.grpo:make_parser": "subparsers prog",
    "trl.scripts.sft:main": "script_args training_args model_args dataset_args",
    "trl.scripts.sft:make_parser": "subparsers prog",
    # transformers.
    f"{TRAINER}.create_scheduler": "self num_training_steps optimizer",
    f"{TRAINER}.create_optimizer": "self model",
    f"{TRAINER}._remove_unused_columns": "self dataset description",
    f"{TRAINER}._get_dataloader": "self dataset description batch_size sampler_fn is_training dataloader_key",
    f"{TRAINER}._get_train_sampler": "self train_dataset",
    f"{TRAINER}._run_epoch": "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial"
    " ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    f"{TRAINER}._prepare_for_training": "self max_steps train_dataloader resume_from_checkpoint",
    f"{TRAINER}._init_training_state": "self max_steps num_update_steps_per_epoch num_train_epochs "
    "resume_from_checkpoint"
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
    f"{TRAINER}._finalize_training": "self trial num_train_samples start_time",
    f"{TRAINER}._get_output_dir": "self trial",
    f"{TRAINER}._get_grad_norm": "self model grad_norm",
    "transformers.trainer_utils:get_last_checkpoint": "folder",
    f"{TRAINER}._load_optimizer_and_scheduler": "self checkpoint",
    f"{TRAINER}._save_optimizer_and_scheduler": "self output_dir",
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
    "transformers.trainer_pt_utils:BatchRebalanceSampler.__init__": "self lengths effective_batch_size dp_size "
    "grad_accum"
    " shuffle seed rank drop_last",
    f"{TRAINER}.train": "self resume_from_checkpoint trial ignore_keys_for_eval",
    "transformers.modeling_utils:PreTrainedModel.set_attn_implementation": "self attn_implementation "
    "allow_all_kernels",
    f"{TRAINER}.add_callback": "self callback",
    # PEFT.
    "peft.tuners.adalora:AdaLoraModel.update_and_allocate": "self global_step",
    "peft.tuners.adalora.layer:RankAllocator.budget_schedule": "self step",
    "peft.tuners.adalora.layer:RankAllocator.reset_ipt": "self",
    "peft.tuners.osf:OSFLayer.merge": "self safe_merge adapter_names",
    "peft.tuners.osf:OSFLayer.update_layer": "self adapter_name effective_rank config **kwargs",
    f"{EVENTS}:CallbackHandler.call_event": "self event args state control **kwargs",
    f"{EVENTS}:CallbackHandler.on_evaluate": "self args state control metrics **kwargs",
    f"{EVENTS}:CallbackHandler.on_predict": "self args state control metrics **kwargs",
    f"{TRAINER}.predict": "self test_dataset ignore_keys metric_key_prefix",
    f"{TRAINER}.evaluate": "self eval_dataset ignore_keys metric_key_prefix",
    f"{TRAINER}.get_eval_dataloader": "self eval_dataset",
    f"{EVENTS}:TrainerState.load_from_json": "json_path",
    f"{EVENTS}:TrainerState.save_to_json": "self json_path",
    "transformers.modeling_layers:GradientCheckpointingLayer.__init_subclass__": "**kwargs",
    # What sequence parallelism stands in for: the table of attention backends.
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface": "attn_implementation default",
    # Layers, attention and masks.
    "transformers.modeling_utils:AttentionInterface.register": "key value",
    # What Muon and QK-Clip call, and what a class asks for its attention function while it is watched.
    "transformers.modeling_utils:AttentionInterface.get_interface": "self attn_implementation default",
    "torch.optim:Muon": "params lr weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn",
    "transformers.masking_utils:AttentionMaskInterface.register": "key value",
    "transformers.masking_utils:causal_mask_function": "batch_idx head_idx q_idx kv_idx",
    "transformers.masking_utils:sdpa_mask": "batch_size q_length kv_length q_offset kv_offset mask_function "
    "attention_mask"
    " local_size allow_is_causal_skip allow_is_bidirectional_skip use_vmap device **kwargs",
    "transformers.masking_utils:flash_attention_mask": "batch_size q_length kv_length q_offset kv_offset mask_function"
    " attention_mask **kwargs",
    "transformers.integrations:is_deepspeed_zero3_enabled": "",
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
    "accelerate.state:is_initialized": "",
    "accelerate.state:AcceleratorState._reset_state": "reset_partial_state",
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
    # What `lazy=True` waits at, and the folders of FSDP2.
    "transformers.trainer_callback:CallbackHandler.call_event": "self event args state control **kwargs",
    "torch.distributed.checkpoint:save": "state_dict checkpoint_id storage_writer planner process_group no_dist"
    " use_collectives",
    "torch.distributed.checkpoint:SavePlanner.set_up_planner": "self state_dict storage_meta is_coordinator",
    "torch.distributed.checkpoint:SavePlanner.create_global_plan": "self all_plans",
    "torch.distributed.checkpoint:SavePlanner.finish_plan": "self new_plan",
    "torch.distributed.checkpoint:SavePlanner.resolve_data": "self write_item",
    "torch.distributed.checkpoint:FileSystemWriter.write_data": "self plan planner",
    "torch.distributed.checkpoint:FileSystemWriter.finish": "self metadata results",
    "torch.distributed.checkpoint:FileSystemWriter.prepare_local_plan": "self plan",
    "torch.distributed.checkpoint:FileSystemWriter.prepare_global_plan": "self plans",
    "accelerate.utils:reduce": "tensor reduction scale",
    "accelerate.utils:recursively_apply": "func data *args test_type error_on_other_type **kwargs",
    "accelerate.utils:DistributedDataParallelKwargs.register_comm_hook": "self model",
    "accelerate:Accelerator.gather_for_metrics": "self input_data use_gather_object",
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
    "generation_kwargs": dict,
    "_is_vlm": bool,
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
    "temperature": float,
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
    "optimizer_cls_and_kwargs": type(None),
    "state": None,
    "train_dataset": None,
    "hub_model_id": type(None),
    "is_world_process_zero": None,
}

#: attributes that exist once a run has begun
RUN_ATTRIBUTES = {"_trial", "current_gradient_accumulation_steps", "data_collator"}

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
    "generation_kwargs": None,
    "use_vllm": False,
    "use_transformers_continuous_batching": False,
    "vllm_mode": "colocate",
    "vllm_importance_sampling_correction": True,
    "epsilon": 0.2,
    "delta": None,
    "off_policy_mask_threshold": None,
    "max_completion_length": 512,
    "temperature": 1.0,
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
    "transformers.generation.utils:GenerationMixin.generate": "_get_stopping_criteria",
    f"{GRPO}.compute_loss": "_compute_loss",
    f"{GRPO}._compute_loss": "_get_per_token_logps_and_entropies get_high_entropy_mask get_off_policy_mask",
    f"{GRPO}.prediction_step": "_prepare_inputs compute_loss",
    f"{GRPO}.training_step": "training_step",
    f"{GRPO}._save_checkpoint": "create_model_card _save_checkpoint",
    f"{GRPO}._load_optimizer_and_scheduler": "_load_optimizer_and_scheduler",
    f"{GRPO}.get_train_dataloader": "_get_dataloader",
    f"{TRAINER}.training_step": "_prepare_inputs compute_loss",
    f"{TRAINER}._prepare_for_training": "create_optimizer create_scheduler _load_optimizer_and_scheduler",
    f"{TRAINER}._run_epoch": "get_batch_samples training_step _maybe_log_save_evaluate _load_rng_state _get_grad_norm",
    f"{TRAINER}._maybe_log_save_evaluate": "log _save_checkpoint",
    f"{TRAINER}._save_checkpoint": "_get_output_dir save_model _save_optimizer_and_scheduler _save_rng_state"
    " _push_from_checkpoint",
    f"{TRAINER}._evaluate": "evaluate",
    f"{TRAINER}._inner_training_loop": "get_train_dataloader _init_training_state _prepare_for_training _run_epoch"
    " _finalize_training",
    f"{TRAINER}._finalize_training": "_load_best_model",
    f"{TRAINER}.prediction_step": "compute_loss",
    f"{TRAINER}._get_num_items_in_batch": "get_cp_size",
    f"{TRAINER}.get_total_train_batch_size": "get_cp_size",
    "accelerate:Accelerator.prepare_data_loader": "_prepare_device_mesh",
}

#: module-level helpers that a method must go through
HELPERS_CALLED = {
    f"{GRPO}._prepare_inputs": "shuffle_sequence_dict split_tensor_dict",
    f"{GRPO}._get_train_sampler": "RepeatSampler",
    # What a crash-safe checkpoint copies, to write it later.
    "transformers.modeling_utils:PreTrainedModel.save_pretrained": "safe_save_file",
    "peft.peft_model:PeftModel.save_pretrained": "safe_save_file",
    "accelerate.utils:save_fsdp_model": "DefaultSavePlanner",
    "accelerate.utils:save_fsdp_optimizer": "DefaultSavePlanner",
    f"{GRPO}.get_train_dataloader": "repeat_iterable_dataset",
    f"{GRPO}._generate_and_score_completions": "use_adapter disable_gradient_checkpointing gather_object",
}

#: method -> attributes of `self` (dotted) that its result depends on, and that we change or rely on
READS = {
    "accelerate:Accelerator.prepare_model": "ddp_handler",
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
    f"{GRPO}._calculate_rewards": "reward_funcs reward_processing_classes reward_func_names",
    f"{GRPO}._tokenize_prompts": "chat_template chat_template_kwargs",
    f"{GRPO}.training_step": "_step current_gradient_accumulation_steps",
    f"{GRPO}._generate_single_turn": "use_vllm state.global_step _last_loaded_step generation_config generation_kwargs"
    " use_transformers_continuous_batching",
    "trl.generation.vllm_generation:VLLMGeneration.sync_weights": "vllm_client.update_named_params"
    " vllm_client.reset_prefix_cache",
    "trl.generation.vllm_generation:VLLMGeneration.generate": "vllm_client.generate vllm_client.image_features"
    " temperature max_completion_length",
    "trl.generation.vllm_client:VLLMClient.generate": "base_url",
    "trl.generation.vllm_client:VLLMClient._post": "session.post",
}


def listed(owner: str = "") -> set[str]:
    """Return the last names of the paths in the tables above."""
    paths = [path for path in (*SIGNATURES, *CONSTANTS) if path.startswith(owner)]
    return {path.replace(":", ".").rsplit(".", 1)[-1] for path in paths}


def own_classes() -> list[tuple[str, ast.ClassDef]]:
    """Return (file, class) of everything that sits on an upstream trainer or callback."""
    files = python_files("hf_effi/trainers", "hf_effi/callbacks")
    return [(shown(f), n) for f in files for n in ast.walk(source_tree(f)) if isinstance(n, ast.ClassDef)]
