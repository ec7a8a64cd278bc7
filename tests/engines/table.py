"""
Which engine runs which method: the one table, from which `docs/engines.md` is made and which the tests of this folder
prove.

A cell is `"runs"`: the weights after some updates are those of DDP within 1e-6; or `"refused"`: the run stops by name
before its first update. There is nothing in between. To add an engine, add a column to `ENGINES` and its outcome to
each row; to add a method, a row here and a case of the same key in `runs.py`; to add a setting of the stack, a
`Setting` with the test that shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ENGINES = {"ddp": "DDP", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3", "fsdp2": "FSDP2"}
RUNS, REFUSED = "runs", "refused"


@dataclass(frozen=True)
class Row:
    """
    A trainer or a method under each engine.

    Args:
        key (`str`): Its case in `runs.py`.
        title (`str`): What people call it; may hold Markdown.
        refused (`dict`): Engine -> words of the error by which it is refused; it runs under the others.
        card (`str`): Key of its method, whose card the page links to; `""` for none.
        why (`str`): One sentence where something is refused: the reason, and what to do.
    """

    key: str
    title: str
    refused: dict[str, str] = field(default_factory=dict)
    card: str = ""
    why: str = ""

    def outcome(self, engine: str) -> str:
        return REFUSED if engine in self.refused else RUNS


@dataclass(frozen=True)
class Setting:
    """
    A setting of the stack (rollouts, compilation, parallelism) with our trainers.

    Args:
        title (`str`): As people set it.
        outcome (`str`): `"runs"` or `"refused"`.
        note (`str`): What was shown, or why it is refused and what to do.
        proof (`str`): `"file::function"` of the test, from the repository's root.
    """

    title: str
    outcome: str
    note: str
    proof: str


def sharded(words: str) -> dict[str, str]:
    """Refused wherever an engine steps the optimizer or shards the weights."""
    return dict.fromkeys(("zero2", "zero3", "fsdp2"), words)


#: saved in the middle and resumed as well: the same weights to the bit
TRAINERS = (
    Row("Trainer", "`Trainer` with `LRScheduleCallback`, `SamplerCallback`, `RunRecordCallback`, `TrainDoctor`"),
    Row("EffiTrainer", "`EffiTrainer` with `lr_schedule` and `train_sampler`"),
    Row("EffiSFTTrainer", "`EffiSFTTrainer` with `lr_schedule` and `train_sampler`"),
    Row(
        "EffiGRPOTrainer",
        "`EffiGRPOTrainer` with `lr_schedule`, `train_sampler`, `difficulty_range`, `prune_rate`, `GRPODoctor`; "
        "resumed inside of a generation block",
    ),
)

_SHARDS = "It reads or writes whole weights or gradients between updates. Train with DDP."
_ZERO3 = "It reads weights beside the modules that own them, where ZeRO-3 has shards. Use ZeRO-2, FSDP2 or DDP."

METHODS = (
    Row("optim_groups", "`optim_groups=`", card="optimizer_groups"),
    Row("nadamw", '`optim="nadamw"`', card="nadamw"),
    Row(
        "soap",
        '`optim="soap"`, `"lars"`, `"lamb"`, `"prodigy"`, `"pytorch_optimizer:NAME"`',
        sharded("needs whole matrices"),
        "optimizer_adapters",
        "They need whole matrices, or norms of them; engines give an optimizer pieces. Train with DDP.",
    ),
    Row(
        "apollo",
        '`optim="apollo"`, `"apollo_mini"`',
        dict.fromkeys(("zero2", "zero3"), "needs whole matrices"),
        "apollo",
        "It needs matrices, and ZeRO gives an optimizer flat pieces. Use FSDP2 or DDP.",
    ),
    Row(
        "frugal",
        '`optim="frugal"`',
        sharded("needs whole matrices"),
        "frugal",
        "Only some tensors have a state, which the shards of a checkpoint do not tell. Train with DDP.",
    ),
    Row("stock_grpo", "TRL's own `GRPOTrainer`, for comparison"),
    Row("exact_savings", "Exact savings of GRPO, with TRL's own `GRPOTrainer` as reference", card="exact_savings"),
    Row(
        "grpo_token_budget",
        "`loss_token_budget` and `score_token_budget`, with TRL's own `GRPOTrainer` as reference",
        {"zero3": "loss_token_budget=24 forwards rows apart"},
        "grpo_token_budget",
        "A model of ZeRO-3 cannot be asked whether its rows are apart. Use ZeRO-2, FSDP2 or DDP.",
    ),
    Row("rollout_savings", "Cheaper rollouts, with TRL's own `GRPOTrainer` as reference", card="rollout_savings"),
    Row("pcl", "`EffiGRPOTrainer` with `prompt_selector=PCL()`, which reads the policy's states", card="pcl"),
    Row("hive", "`EffiGRPOTrainer` with `prompt_selector=HIVE(...)`, which reads logits of prompts", card="hive"),
    Row("gain_rl", "`EffiGRPOTrainer` with `prompt_selector=GainRL()`, which reads the last MLP's", card="gain_rl"),
    Row("named_grpo", "`EffiGRPOTrainer` with the name of a model, which ZeRO-3 shards as it loads"),
    Row(
        "rollout_noise",
        "`EffiGRPOTrainer` with `rollout_noise=AdaptiveNoise(...)`",
        {"zero3": "needs whole weights, and DeepSpeed ZeRO-3", "fsdp2": "needs whole weights, and FSDP"},
        "qerl",
        "It writes the scales of the norms, which these shard. Use DDP or ZeRO-2.",
    ),
    Row(
        "weight_averaging",
        "`WeightAveragingCallback`, `EMACallback`",
        {"zero2": "reads whole weights", "zero3": "reads whole weights"},
        "weight_averaging",
        "DeepSpeed has master weights of its own, and shards. Train with DDP or FSDP2.",
    ),
    Row("reptile", "`ReptileCallback`", sharded("master weights of their own"), "reptile", _SHARDS),
    Row(
        "local_updates",
        "`LocalUpdatesMixin` with `local_updates=`",
        sharded("no process has the whole model to train alone"),
        "local_updates",
        "A process needs the whole model and its optimizer to train alone. Train with DDP.",
    ),
    Row(
        "adalora", "`AdaLoRACallback`", sharded("AdaLoRACallback reads gradients after the update"), "adalora", _SHARDS
    ),
    Row("auto_lrs", "`AutoLRSCallback`", sharded("AutoLRSCallback needs whole parameters"), "auto_lrs", _SHARDS),
    Row(
        "gradient_snr",
        "`GradientSNRCallback`",
        sharded("GradientSNRCallback needs whole parameters"),
        "adaptive_lr",
        _SHARDS,
    ),
    Row(
        "hypergradient",
        "`HypergradientCallback`",
        sharded("HypergradientCallback needs whole parameters"),
        "adaptive_lr",
        _SHARDS,
    ),
    Row("accuracy_gradient", "`AccuracyGradientCallback`", card="adaptive_lr"),
    Row(
        "lr_range_test",
        "`lr_range_test` in a run",
        sharded("lr_range_test steps the optimizer itself"),
        "auto_lrs",
        "It steps the optimizer itself. Run it on the plain model, before the engine has it.",
    ),
    Row(
        "lr_range_test_trainer",
        "`lr_range_test(trainer)` before `train()`",
        sharded("lr_range_test puts whole weights back"),
        "auto_lrs",
        "It puts whole weights back after the updates that it tries. Test the rate with DDP, at the same batch size.",
    ),
    Row(
        "gradient_norms",
        "`GradientNormsCallback`",
        dict.fromkeys(("zero2", "zero3"), "GradientNormsCallback adds up the gradients"),
        "refined_schedule",
        "DeepSpeed keeps gradients in partitions of its own. Use FSDP2 or DDP.",
    ),
    Row(
        "self_paced",
        "Samplers that measure the model while it trains (self-paced, PUDF, multistage)",
        sharded("forwards the model outside of its wrapper"),
        "self_paced",
        "They forward rows on one rank alone. Measure before training, and order by the scores.",
    ),
    Row("replay_stream", "`ReplayStream`, old rows among those of a stream", card="replay"),
    Row(
        "migu",
        "`MIGUCallback`",
        dict.fromkeys(("zero2", "zero3"), "DeepSpeed has updated already"),
        "migu",
        "DeepSpeed updates inside of the backward, before a callback sees the gradients. Use DDP or FSDP2.",
    ),
    Row("osf_projection", "`OSFProjectionCallback`", sharded("writes whole weights"), "osf", _SHARDS),
    Row("token_budget", "`TokenBudgetBatchSampler`", card="token_budget"),
    Row("sequence_length_growth", "Growing sequence length", card="sequence_length_growth"),
    Row("ul2_denoising", "UL2 denoising (any batch transform)", card="ul2_denoising"),
    Row("random_ltd", "`RandomLTDCallback`", card="random_ltd"),
    Row("kernel_patch", "`patch` with a layer that replaces a module", card="kernel_patch"),
    Row("lm_head", "`FusedLMHead`", {"zero3": "FusedLMHead reads the head"}, "lm_head", _ZERO3),
    Row("fused_lora", "`FusedLoRALinear`", {"zero3": "ZeRO-3 has shards of its weights"}, "fused_lora", _ZERO3),
    Row(
        "low_bit_lora",
        "`LowBitLoRALinear`",
        {"zero3": "ZeRO-3 has shards of its weights", "fsdp2": "the wide weight could not come back"},
        "low_bit_lora",
        "While patched the base weights are empty, and an engine would shard nothing. Use DDP or ZeRO-2.",
    ),
    Row("tiled_mlp", "`tile_mlp`", {"zero3": "has hooks of its own"}, "tiled_mlp", _ZERO3),
    Row("tiled_loss", "`tile_loss`", {"zero3": "sharded outside of its forward"}, "tiled_loss", _ZERO3),
    Row("stream_layer", "`stream_layers`", {"zero3": "StreamLayer: the gradients"}, "stream_layer", _ZERO3),
    Row(
        "chunk_flow",
        "`ChunkFlow`",
        sharded("same number of calls on every rank"),
        "chunk_flow",
        "Ranks cut their rows into different numbers of chunks, and each call gathers shards. Train with DDP.",
    ),
    Row("activation_offload", "`ActivationOffloadCallback`", card="activation_offload"),
    Row("selective_checkpointing", "`SelectiveCheckpointCallback`", card="selective_checkpointing"),
    Row(
        "memory_budget",
        "`MemoryBudgetCallback`",
        dict.fromkeys(("zero3", "fsdp2"), "runs single layers to measure them"),
        "memory_planner",
        "It runs single layers to measure them. Choose the layers yourself: offload or selective checkpointing.",
    ),
    Row("varlen_attention", "`hf_effi_varlen` attention, packed", card="varlen_attention"),
    Row("shared_prefix", "`SharedPrefixCollator`", card="shared_prefix"),
    Row(
        "sequence_parallel",
        "`sequence_parallel_size=2`",
        dict.fromkeys(("zero2", "zero3"), "does not work with DeepSpeed"),
        "sequence_parallel",
        "DeepSpeed scales the gradients of ranks that share a sequence. Use DDP or FSDP2, or DeepSpeed's own "
        "`sp_size`.",
    ),
)

ROWS = (*TRAINERS, *METHODS)

#: methods that are refused although the training arguments say nothing of the engine: a launch file chose it
LAUNCHED = (
    "weight_averaging",
    "reptile",
    "osf_projection",
    "local_updates",
    "adalora",
    "auto_lrs",
    "gradient_snr",
    "hypergradient",
    "chunk_flow",
    "self_paced",
)

SETTINGS = (
    Setting(
        '`optim="muon"`, `optim="mars_m"` and `QKClipCallback` on 2 processes and under FSDP2',
        RUNS,
        "Two processes have the weights of one with the joint batch, FSDP2 those of DDP, within the rounding of bf16 "
        "in Newton-Schulz; shards are resumed to the bit. Refused by name: DeepSpeed ZeRO.",
        "tests/engines/test_muon_fsdp2.py::test_fsdp2_has_the_weights_of_ddp",
    ),
    Setting(
        "`accelerate launch` with `accelerate_config('deepspeed', 2)` or `accelerate_config('fsdp2', 2)`",
        RUNS,
        "The weights of DDP, resumed to the bit; what an engine cannot do is refused here as well.",
        "tests/engines/test_engines.py::test_the_launch_files_train_as_ddp",
    ),
    Setting(
        "A vLLM server beside `accelerate launch`, and two machines: `examples/scale_out`",
        RUNS,
        "With ZeRO-3, ZeRO-2 and FSDP2 the weights of DDP; two machines of one process have those of one with two, to "
        "the bit. The server is our own, both machines are this one: [scale out](scale_out.md).",
        "tests/engines/test_scale_out.py::test_two_machines_train_as_two_processes_of_one",
    ),
    Setting(
        "4 processes; `sequence_parallel_size=2` on 4 processes",
        RUNS,
        "The weights of 2 processes and of 1 with the same global batch; a checkpoint of 4 resumes on 2 and on 1 "
        "where the global batch stays the same.",
        "tests/engines/test_four_ranks.py::test_four_ranks_train_as_one",
    ),
    Setting(
        '`SafeCheckpointer` with `"thread"`, `"process"` and `lazy=True` under FSDP2',
        RUNS,
        "Shards of stock to the byte, written by each process in the background; stock resumes from them to the bit, "
        '1 process within 1e-9; what a killed process leaves is the checkpoint before. DeepSpeed: `"sync"`.',
        "tests/distributed/test_fsdp_checkpoints.py::test_shards_are_those_of_stock_to_the_byte",
    ),
    Setting(
        "`hf-effi checkpoint convert`: 1 process, then 2 of FSDP2, then 1",
        RUNS,
        "The weights of one process that was never interrupted, within 1e-9 in fp64.",
        "tests/distributed/test_fsdp_checkpoints.py::test_one_process_to_two_of_fsdp2_and_back",
    ),
    Setting(
        "`use_transformers_continuous_batching=True` (GRPO)",
        RUNS,
        "Off is stock to the bit, exact savings have its weights, filter and pruning refill. On a CPU set "
        "`num_blocks`: transformers otherwise sizes its cache by the memory of a GPU.",
        "tests/engines/test_settings.py::test_continuous_batching",
    ),
    Setting(
        "`use_liger_kernel=True` (GRPO)",
        RUNS,
        "TRL 1.16 has no loss of Liger's any more. With the flag, off is stock to the bit and exact savings have its "
        "weights; Liger's own layers need a GPU and are not in this test.",
        "tests/engines/test_settings.py::test_liger_layers_under_grpo",
    ),
    Setting(
        'A model with `tp_plan="auto"` (tensor parallelism)',
        RUNS,
        "On 2 processes the weights of one, for `EffiTrainer`, `stream_layers` and `RandomLTDCallback`. Refused: what "
        "reads whole weights or gradients, samplers that measure, `tile_mlp`, `sequence_parallel_size`.",
        "tests/engines/test_tensor_parallel.py::test_tensor_parallel_runs_are_those_of_one_process",
    ),
    Setting(
        "`torch_compile=True`",
        RUNS,
        "With patches the run of the uncompiled model; random-LTD and `sequence_parallel_size` refuse it by name.",
        "tests/training/test_torch_compile.py::test_a_compiled_model_trains_as_the_other",
    ),
)
