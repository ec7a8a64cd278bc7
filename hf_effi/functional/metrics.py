"""The names of everything that hf_effi logs. Whoever logs a metric, and whoever reads one, takes its name from here.

All begin with `effi/`, so that they stand together in a tracker and never hide one of transformers' or TRL's.
"""

from __future__ import annotations

PREFIX = "effi/"

# --- an update of GRPO: once each, sums over the ranks ---------------------------------------------------------------

#: + one of `PHASES`: seconds of the main process in a phase; a phase inside another is not counted twice
TIME = "effi/time_"
#: generation, rewards, log-probs without a gradient, and the rest of the training steps
PHASES = ("gen", "reward", "logp", "train")
#: tokens of log-prob forwards with their padding, those that were no padding, and those that stock would have added
TOKENS_FORWARD = "effi/tokens_forward"
TOKENS_REAL = "effi/tokens_real"
TOKENS_SAVED = "effi/tokens_saved"
#: `1 - tokens_real / tokens_forward`
PAD_RATIO = "effi/pad_ratio"
#: completions that were generated, those with a gradient, and their ratio; only of updates that generate
ROWS_GENERATED = "effi/rows_generated"
ROWS_TRAINED = "effi/rows_trained"
EFFECTIVE_RATIO = "effi/effective_ratio"
#: completions that were sent to another rank
ROWS_MOVED = "effi/rows_moved"
#: with several ranks: tokens that the slowest rank forwards with a gradient over the mean of them, at least 1; where
#: ranks wait for each other at the end of the update, and where they do in each of its micro-steps
RANK_COST_SLOWEST_OVER_MEAN = "effi/rank_cost_slowest_over_mean"
MICRO_STEP_COST_SLOWEST_OVER_MEAN = "effi/micro_step_cost_slowest_over_mean"
#: of `generate`, with `rollout_savings` on: prompt tokens, with padding, that stock would have forwarded as well; rows
#: that were forwarded for a token, and those that stock would have forwarded as well
PREFILL_TOKENS_SAVED = "effi/prefill_tokens_saved"
DECODE_ROWS = "effi/decode_rows"
DECODE_ROWS_SAVED = "effi/decode_rows_saved"

# --- a generation of GRPO --------------------------------------------------------------------------------------------

#: rounds of a generation, the first included
GEN_ROUNDS = "effi/gen_rounds"
#: share of groups without a gradient
FRAC_ZERO_VAR_GROUPS = "effi/frac_zero_var_groups"
#: prompts that leave the completion no room within the positions of the model
ROWS_OVER_MAX_POSITIONS = "effi/rows_over_max_positions"
#: + a reason: completions that are not trained on
DROPPED = "effi/dropped/"
#: rejected groups that were taken all the same, and whether the batch was not filled by accepted ones
GROUPS_FILLED = "effi/groups_filled"
UNDERFILLED = "effi/underfilled"
#: share of the screened prompts that qualify
SCREENED_QUALIFIED = "effi/screened_qualified"
#: noise on the weights that generate: its standard deviation, and the root mean square of what their dtype left of it
AQN_SIGMA = "effi/aqn_sigma"
AQN_APPLIED = "effi/aqn_applied"
#: means over all completions and over those that are trained on: of the weighted reward, and of the one that decides
REWARD_GENERATED = "effi/reward_generated"
REWARD_KEPT = "effi/reward_kept"
FILTER_REWARD_GENERATED = "effi/filter_reward_generated"
FILTER_REWARD_KEPT = "effi/filter_reward_kept"
#: of the completions that pruning keeps: mean |advantage|, share of positive ones, share of groups with one sign left
PRUNE_ABS_ADVANTAGE_KEPT = "effi/prune/abs_advantage_kept"
PRUNE_POSITIVE_FRACTION = "effi/prune/positive_fraction"
PRUNE_GROUPS_WITH_ONE_SIGN = "effi/prune/groups_with_one_sign"
#: tokens that have a loss, as a share of those of the micro-batch on all ranks; only where tokens are chosen
TOKEN_SHARE = "effi/prune/token_share"
#: + a name of a prompt selector's or allocator's own: what its `metrics()` says after each generation
SELECT = "effi/select/"
#: + what a vote in the place of a label was like: `majority_ratio`, `abstained`, `distinct_answers`, `accuracy`
LABEL = "effi/label/"
#: of rollouts that are reused: share of all completion tokens that came from drafts, of completions that are a whole
#: draft, and of completions that had one; accepted tokens of a draft, in the mean, and as a share of its tokens
REUSED_TOKENS = "effi/reuse/tokens"
REUSED_WHOLE = "effi/reuse/whole_completions"
REUSE_DRAFTED = "effi/reuse/drafted"
REUSE_ACCEPTED_LENGTH = "effi/reuse/accepted_length"
REUSE_ACCEPTED_SHARE = "effi/reuse/accepted_share"
#: different completions of their prompts, as a share of all completions of a generation
UNIQUE_COMPLETIONS = "effi/reuse/unique_completions"

#: of a gate between completions and demonstrations: share of the groups of a generation that learn from a
#: demonstration, and of those that learn from nothing; of an update, tokens of demonstrations and their mean -log pi
HYBRID_SFT_FRACTION = "effi/hybrid/sft_fraction"
HYBRID_DROPPED_FRACTION = "effi/hybrid/dropped_fraction"
HYBRID_SFT_TOKENS = "effi/hybrid/sft_tokens"
HYBRID_SFT_LOSS = "effi/hybrid/sft_loss"

#: of a reward for programs: + what came of them: their share among the completions of a generation
CODE_SHARE = "effi/code/"
#: of a length budget: the budget in tokens, the mean tokens of a completion, the share of them over twice the budget,
#: and the most tokens that are generated where that follows the budget
LENGTH_BUDGET = "effi/length/budget"
LENGTH_MEAN = "effi/length/mean"
LENGTH_OVER_TWICE = "effi/length/over_twice"
GENERATION_CAP = "effi/length/generation_cap"
#: of values that move during a run: those of the generation in hand
TEMPERATURE = "effi/temperature"
BETA = "effi/beta"
#: mean -log pi of the tokens of prompts, where they are learned beside the completions
PROMPT_TOKEN_LOSS = "effi/prompt_token_loss"

# --- any trainer -----------------------------------------------------------------------------------------------------

#: marks the log entries of probes, so that curves and trackers can leave them out
PROBE = "effi/probe"
#: in the log entry of an evaluation on averaged weights: how many snapshots the average is of
AVERAGE_SNAPSHOTS = "effi/average_snapshots"
#: L1 and L2 norm of the gradient before clipping, means over the updates since the last entry
GRADIENT_L1 = "effi/gradient_l1"
GRADIENT_L2 = "effi/gradient_l2"
#: of the last walk along the displacement of an update: how many times it was repeated until the loss rose
FAST_FORWARD_STEPS = "effi/fast_forward_steps"
#: + a callback: what it multiplies the learning rate by
LR_FACTOR = "effi/lr_factor/"
#: rank of all adapters together
ADALORA_RANK = "effi/adalora_rank"
#: tokens that a dropping layer sees, and tokens times layers so far, also as a fraction of those without dropping
LTD_KEPT_TOKENS = "effi/ltd_kept_tokens"
LTD_LAYER_TOKENS = "effi/ltd_layer_tokens"
LTD_LAYER_TOKEN_FRACTION = "effi/ltd_layer_token_fraction"
#: tokens of a row
SEQUENCE_LENGTH = "effi/sequence_length"
#: of the updates since the last log entry: share of the time in which they waited for their batches, and seconds for
#: each of them
DATA_WAIT_FRACTION = "effi/data_wait/fraction"
DATA_WAIT_SECONDS = "effi/data_wait/seconds"
#: share of tokens that are masked
MASKING_RATIO = "effi/masking_ratio"
#: 1 where rows are preceded by their metadata, else 0
METADATA = "effi/metadata"
#: rewinds of the run so far, and updates whose data was passed over for them
REWINDS = "effi/rewinds"
REWIND_SKIPPED = "effi/rewind_skipped_updates"
#: of local updates so far: synchronisations, and what their all-reduce was given by the first process, in bytes; and
#: the norm of the last outer gradient, `anchor - mean`
LOCAL_SYNCHRONISATIONS = "effi/local_updates/synchronisations"
LOCAL_SENT_BYTES = "effi/local_updates/sent_bytes"
LOCAL_DELTA_NORM = "effi/local_updates/delta_norm"
#: of the updates since the last report: time of the slowest process over the mean, which it was, in which share of the
#: updates it was the slowest one, and the share of all processes' time that is spent waiting for it
STRAGGLER_RATIO = "effi/straggler/ratio"
STRAGGLER_RANK = "effi/straggler/rank"
STRAGGLER_PERSISTENCE = "effi/straggler/persistence"
STRAGGLER_WAITING = "effi/straggler/waiting_fraction"
#: of the last probe of sharpness: largest eigenvalue of the Hessian; of the Hessian as the optimizer preconditions it;
#: that as a share of what the LR of the next update stands; `|H v - value v| / |value|`, how far the search got
SHARPNESS_HESSIAN = "effi/sharpness/lambda1"
SHARPNESS_PRECONDITIONED = "effi/sharpness/preconditioned_lambda1"
SHARPNESS_RHO = "effi/sharpness/rho"
SHARPNESS_RESIDUAL = "effi/sharpness/residual"
#: of the last update that was probed for causes: its number; + a layer, an outer part (`embedding`, `head`, `rest`) or
#: a module inside of the layers: norm of the gradient before clipping, of a part as the root mean square over the
#: layers; + a layer: the largest singular value of its gradients; how uneven the norms are from layer to layer, over
#: their mean
CAUSE_UPDATE = "effi/causes/update"
CAUSE_LAYER_GRADIENT = "effi/causes/gradient/layer/"
CAUSE_OUTER_GRADIENT = "effi/causes/gradient/outer/"
CAUSE_PART_GRADIENT = "effi/causes/gradient/part/"
CAUSE_LAYER_SPECTRAL = "effi/causes/gradient_spectral/layer/"
CAUSE_GRADIENT_UNEVENNESS = "effi/causes/gradient_unevenness"
#: + a layer, of the hidden states behind it: mean excess kurtosis of a token, the largest `max |x| / median |x|` of a
#: token, and the share of tokens with a massive activation
CAUSE_KURTOSIS = "effi/causes/kurtosis/layer/"
CAUSE_OUTLIER_RATIO = "effi/causes/outlier_ratio/layer/"
CAUSE_MASSIVE_TOKENS = "effi/causes/massive_tokens/layer/"
#: + a layer: norm of its matrices over the one at the start; and the median over the layers of what a gradient step is
#: worth now, `(|W_0| / |W|)^2`
CAUSE_WEIGHT_NORM = "effi/causes/weight_norm/layer/"
CAUSE_EFFECTIVE_LR = "effi/causes/effective_lr_factor"
#: of an update in which attention logits were measured: the largest one, and heads that were scaled down
QK_CLIP_MAX_LOGIT = "effi/qk_clip/max_logit"
QK_CLIP_HEADS = "effi/qk_clip/clipped_heads"
#: share of the rows of the masked layers that an update moves
MIGU_ROWS = "effi/migu/updated_rows"
#: + the name of an experiment + `/` + one of `INJECTION_VALUES`: injected rows that were trained on so far, on all
#: processes; at an evaluation the share of its rows that are continued exactly, and how much lower their loss is than
#: that of their twins; 1 from where it is no longer injected
INJECTION = "effi/injection/"
INJECTION_VALUES = ("seen", "memorised", "loss_gap", "learned")
#: + the name of a set + `/` + one of `DIP_VALUES`: how far its metric has fallen behind its start at worst, that worst
#: as it stands now, and the updates for which it has been behind
STABILITY_GAP = "effi/stability_gap/"
DIP_VALUES = ("depth", "behind", "duration_updates")
#: + one of `FORECAST_VALUES`: where a metric tends to, what is left until there and its range over the last five fits,
#: its value at the end of the run and that range, all in units of the metric; and 1 where the asymptote is steady
FORECAST = "effi/forecast/"
FORECAST_VALUES = (
    "asymptote",
    "remaining",
    "remaining_low",
    "remaining_high",
    "at_end",
    "at_end_low",
    "at_end_high",
    "is_steady",
)
