#!/usr/bin/env bash
# Two roles: vLLM serves completions on GPUs of its own; `accelerate launch` trains on the others and sends vLLM the new
# weights before each generation.
#
#   MODEL=Qwen/Qwen3-0.6B bash examples/scale_out/launch.sh examples/scale_out/train.py \
#       --dataset trl-lib/DeepMath-103K --output_dir out --max_steps 100
#
# All that follows the script goes to it; --model and the address of the server are added. On two machines the same line
# runs on both, on the first with MACHINES=2 MAIN_IP=<its address>, on the second with MACHINE_RANK=1 too. Only the first
# one serves.
set -euo pipefail

MODEL=${MODEL:?name of a model of the Hub, or a folder that every machine has}
ENGINE=${ENGINE:-deepspeed} # ddp, fsdp2 or deepspeed: ZeRO-3, or ZeRO-2 by LAUNCH_OPTIONS="--zero_stage 2"
PROCESSES=${PROCESSES:-2}   # on each machine, one per GPU
SERVER_GPUS=${SERVER_GPUS:-0}
TRAINER_GPUS=${TRAINER_GPUS:-1,2}
MACHINES=${MACHINES:-1}
MACHINE_RANK=${MACHINE_RANK:-0}
MAIN_IP=${MAIN_IP:-127.0.0.1}
MAIN_PORT=${MAIN_PORT:-29500}     # where the trainer's processes meet
SERVER_PORT=${SERVER_PORT:-8000}  # of vLLM
GROUP_PORT=${GROUP_PORT:-51216}   # where weights pass from the trainer to vLLM
SERVER_LOG=${SERVER_LOG:-vllm.log}
read -ra server_options <<<"${SERVER_OPTIONS:-}" # such as "--tensor-parallel-size 2"
read -ra launch_options <<<"${LAUNCH_OPTIONS:-}" # of accelerate launch, such as "--mixed_precision no"

if [ "$MACHINE_RANK" = 0 ]; then
    CUDA_VISIBLE_DEVICES=$SERVER_GPUS VLLM_SERVER_DEV_MODE=1 vllm serve "$MODEL" --port "$SERVER_PORT" \
        --enable-scale-out --weight-transfer-config '{"backend": "nccl"}' \
        --logprobs-mode processed_logprobs --max-logprobs -1 "${server_options[@]}" >"$SERVER_LOG" 2>&1 &
    server=$!
    trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT
    until curl --silent --fail --output /dev/null "http://127.0.0.1:$SERVER_PORT/health"; do
        if ! kill -0 "$server" 2>/dev/null; then
            tail -n 40 "$SERVER_LOG" >&2
            echo "launch.sh: vllm serve ended before it was ready; the end of $SERVER_LOG is above." >&2
            exit 1
        fi
        sleep 1
    done
fi

CUDA_VISIBLE_DEVICES=$TRAINER_GPUS accelerate launch --config_file "$(hf-effi accelerate-config "$ENGINE" 2)" \
    --num_machines "$MACHINES" --machine_rank "$MACHINE_RANK" --num_processes "$((MACHINES * PROCESSES))" \
    --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" "${launch_options[@]}" \
    "$@" --model "$MODEL" --use_vllm true --vllm_mode server \
    --vllm_server_base_url "http://127.0.0.1:$SERVER_PORT" --vllm_group_port "$GROUP_PORT"
