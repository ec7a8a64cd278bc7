"""The table of `test_keyword_table.py`: what our calls give to upstream code, and what shows that it is used."""

from __future__ import annotations

_KEYWORDS = "tests/contract/test_upstream_keywords.py::"
_HERE = "tests/contract/test_keyword_table.py::"

#: what is called -> its keywords, and the test that shows that each is used, or after "why:" the reason for none
CALLS: dict[str, tuple[str, str]] = {
    # models, layers, attention
    "model": (
        "input_ids attention_mask labels num_items_in_batch use_cache fused_lm_head",
        f"{_HERE}test_the_forward_of_a_probe_uses",
    ),
    "transformers.masking_utils:sdpa_mask": (
        "batch_size q_length kv_length q_offset kv_offset mask_function allow_is_causal_skip use_vmap device",
        f"{_HERE}test_a_row_of_a_mask_is_made_as_it_is_asked_for",
    ),
    "transformers.masking_utils:flash_attention_mask": (
        "batch_size q_length kv_length q_offset kv_offset mask_function attention_mask",
        f"{_HERE}test_the_padding_mask_comes_through",
    ),
    "self._model": (
        "input_ids attention_mask output_hidden_states use_cache",
        f"{_KEYWORDS}test_a_value_model_gives_its_hidden_states",
    ),
    "tokenizer.apply_chat_template": (
        "add_generation_prompt tokenize return_dict",
        f"{_KEYWORDS}test_a_chat_template_is_rendered_as_it_is_asked_for",
    ),
    "self.model": ("input_ids attention_mask logits_to_keep", f"{_KEYWORDS}test_a_model_uses"),
    "type(self.layer).forward": (
        "attention_mask",
        f"{_KEYWORDS}test_a_layer_uses_its_mask_and_its_position_embeddings",
    ),
    "self.model.generate": (
        "input_ids attention_mask do_sample max_new_tokens pad_token_id eos_token_id num_beams repetition_penalty"
        " logits_processor",
        f"{_HERE}test_generate_uses",
    ),
    "model.generate": (
        "input_ids attention_mask generation_config logits_processor",
        f"{_HERE}test_a_generation_is_as_it_is_asked_for",
    ),
    "transformers:GenerationConfig": (
        "pad_token_id eos_token_id do_sample max_new_tokens use_cache disable_compile",
        f"{_HERE}test_a_generation_is_as_it_is_asked_for",
    ),
    "transformers:Qwen3ForCausalLM.from_pretrained": ("dtype", f"{_HERE}test_models_are_made_as_they_are_asked_for"),
    "transformers:Qwen3Config": (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"
        " max_position_embeddings tie_word_embeddings pad_token_id eos_token_id bos_token_id",
        f"{_HERE}test_the_demos_config_has_these_fields",
    ),
    "peft:LoraConfig": ("r target_modules task_type", f"{_HERE}test_lora_is_made_as_it_is_asked_for"),
    # trainers
    "super().compute_loss": ("num_items_in_batch", f"{_HERE}test_trainers_divide_by_the_number_of_items"),
    # TRL's forward for log-probs, which objects of the GRPO room are handed, and the trainer's, which goes around it.
    "asked.stock": ("compute_entropy", f"{_HERE}test_grpo_computes_entropies_where_it_is_asked_to"),
    "self._host._get_per_token_logps_and_entropies": (
        "batch_size",
        f"{_HERE}test_grpo_computes_entropies_where_it_is_asked_to",
    ),
    "trainer.prediction_step": ("prediction_loss_only", f"{_HERE}test_a_prediction_can_be_the_loss_alone"),
    "self.trainer.create_model_card": ("model_name", f"{_HERE}test_the_model_card_has_the_name"),
    "accelerator.pad_across_processes": (
        "dim pad_index",
        "tests/distributed/test_selection_groups_ranks.py::test_two_ranks_do_what_one_does",
    ),
    "trl.trainer.utils:add_fused_lm_head": (
        "temperature cast_lm_head_to_fp32 outputs",
        "tests/training/test_selection_token_stats.py::test_equals_full_logits_and_the_trainers_own_log_probs",
    ),
    "host._tokenizer": (
        "text add_special_tokens",
        "tests/training/test_selection_hybrid.py::test_with_all_groups_gated_the_gradient_is_that_of_sft",
    ),
    "host._tokenizer.apply_chat_template": (
        "return_dict",
        "tests/training/test_selection_hybrid.py::test_conversations",
    ),
    "datasets:Dataset.from_list": (
        "features",
        "tests/unit/test_injection.py::test_as_a_dataset_it_has_the_same_rows_and_features",
    ),
    "transformers:Trainer": ("data_collator train_dataset", "why: no run without them"),
    "transformers:TrainingArguments": (
        "output_dir max_steps per_device_train_batch_size train_sampling_strategy learning_rate warmup_steps"
        " lr_scheduler_type lr_scheduler_kwargs adam_beta2 max_grad_norm seed use_cpu bf16 logging_strategy "
        "save_strategy"
        " report_to remove_unused_columns disable_tqdm",
        "why: a dataclass, which raises for a field that it does not have",
    ),
    "trl.trainer.utils:use_adapter": (
        "adapter_name",
        "tests/contract/test_upstream_helpers.py::test_use_adapter_sets_and_restores",
    ),
    "trl.models.utils:unwrap_model_for_generation": (
        "generation_kwargs gradient_checkpointing_kwargs",
        "tests/training/test_refine.py::test_all_plain_is_the_trainer_without_it_to_the_bit",
    ),
    # tokenizers and texts
    "self.tokenizer": (
        "add_special_tokens verbose",
        "tests/unit/test_token_files.py::test_a_tokenizer_does_what_the_writer_asks_it_to",
    ),
    "datasets:load_dataset": (
        "data_files split streaming",
        "tests/unit/test_token_files.py::test_a_file_of_rows_is_read_as_a_stream",
    ),
    "self.tokenizer.apply_chat_template": (
        "add_generation_prompt tokenize return_dict",
        f"{_KEYWORDS}test_a_chat_template_is_rendered_as_it_is_asked_for",
    ),
    "trainer._tokenizer": (
        "add_special_tokens",
        f"{_KEYWORDS}test_a_tokenizer_adds_special_tokens_where_it_is_asked_to",
    ),
    "trainer._tokenizer.batch_decode": (
        "skip_special_tokens",
        f"{_HERE}test_tokenizers_pad_and_decode_as_they_are_asked_to",
    ),
    "trainer._tokenizer.pad": (
        "padding_side return_tensors",
        f"{_HERE}test_tokenizers_pad_and_decode_as_they_are_asked_to",
    ),
    "self.tokenizer.pad": (
        "padding_side return_tensors",
        f"{_HERE}test_tokenizers_pad_and_decode_as_they_are_asked_to",
    ),
    "self.tokenizer.decode": ("skip_special_tokens", f"{_HERE}test_tokenizers_pad_and_decode_as_they_are_asked_to"),
    "transformers:AutoConfig.from_pretrained": (
        "local_files_only",
        f"{_KEYWORDS}test_local_files_are_all_that_is_read",
    ),
    "transformers:AutoTokenizer.from_pretrained": (
        "local_files_only",
        f"{_KEYWORDS}test_local_files_are_all_that_is_read",
    ),
    "transformers:AutoModelForCausalLM.from_pretrained": (
        "dtype local_files_only",
        f"{_KEYWORDS}test_local_files_are_all_that_is_read",
    ),
    "tokenizer": (
        "padding return_tensors add_special_tokens",
        f"{_KEYWORDS}test_a_tokenizer_adds_special_tokens_where_it_is_asked_to",
    ),
    "tokenizer.batch_decode": (
        "skip_special_tokens",
        f"{_HERE}test_tokenizers_pad_and_decode_as_they_are_asked_to",
    ),
    "transformers:PreTrainedTokenizerFast": (
        "tokenizer_object pad_token eos_token unk_token padding_side",
        "tests/unit/test_demo_task.py::test_tokenizer_has_one_token_a_character_and_survives_a_round_trip",
    ),
    "transformers.utils:logging.tqdm": ("total desc unit disable", "why: a progress line"),
    "trl:TrlParser": ("prog usage description epilog formatter_class", "why: the text of --help"),
    # the Hub
    "huggingface_hub:HfApi": (
        "library_name token",
        "tests/training/test_hub_uploads.py::test_a_wrong_token_is_told_before_training",
    ),
    "huggingface_hub:try_to_load_from_cache": ("revision", f"{_HERE}test_the_cache_is_asked_for_the_revision"),
    "huggingface_hub:hf_hub_download": (
        "token revision",
        "tests/training/test_hub_recipe.py::test_what_keeps_a_card_away_is_told",
    ),
    "api.create_repo": ("private exist_ok", "tests/training/test_hub.py::test_full_circle_of_an_effi_trainer"),
    "api.upload_folder": (
        "repo_id folder_path commit_message revision ignore_patterns",
        "tests/training/test_hub_uploads.py::test_a_folder_arrives_whole_in_one_commit",
    ),
}
