#!/usr/bin/env bash
# Run everything that needs a CUDA card, in one command on a fresh machine:
#
#     pip install -r requirements-dev.txt
#     study/gpu.sh                                  # Qwen/Qwen3-VL-2B-Instruct from the hub
#     MODEL=/data/Qwen3-VL-4B study/gpu.sh          # the default run of a different checkpoint
#     PARTS="tests kill" study/gpu.sh               # only some parts
#     study/gpu.sh --small                          # a one-minute check of this script on a CPU
#
# $OUTPUT/NAME.log has the output of each part, $OUTPUT/parts.txt their exit codes and seconds
# ($OUTPUT is runs/gpu by default). A part that fails does not stop the others.
set -u
cd "$(dirname "$0")/.."
output=${OUTPUT:-runs/gpu} model=${MODEL:-Qwen/Qwen3-VL-2B-Instruct} failed=""
parts=${PARTS:-tests fit memory step graph kill train}
mkdir -p "$output"
(date -u; git rev-parse HEAD; nvidia-smi; python --version; pip list) > "$output/machine.txt" 2>&1

part() { # name, command
  local name=$1 start=$SECONDS code
  shift
  [[ " $parts " == *" $name "* ]] || return 0
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" 2>&1 | tee "$output/$name.log"
  code=${PIPESTATUS[0]}
  echo "$name: exit code $code, $((SECONDS - start)) s: $*" | tee -a "$output/parts.txt"
  [[ $code == 0 ]] || failed+=" $name"
}

if [[ ${1:-} == --small ]]; then
  part tests env TEST_DEVICE=cpu python -m pytest -q tests/test_cuda.py
  part step python study/step.py --device cpu --points 60,4,2 --arms ours --rounds 1 \
    --results "$output/step.json"
  part kill python study/kill.py --writes 1 --random 1 --results "$output/kill.json"
  part train python sayo_mini.py --device cpu --max_steps 1 --eval_examples 4 \
    --output_dir "$output/run"
else
  part tests python -m pytest -q -m cuda tests
  part fit python sayo_mini.py fit --model_name_or_path "$model"
  part memory python study/memory.py --results "$output/memory.json"
  part step python study/step.py --shape 2b --results "$output/step.json"
  part graph python study/step.py --shape 2b --cuda_graph --arms ours trl \
    --points 512,64,8 128,110,4 --results "$output/step_graph.json"
  part kill python study/kill.py --device cuda --results "$output/kill.json"
  part train python sayo_mini.py --model_name_or_path "$model" --output_dir "$output/run"
fi
[[ -z $failed ]] || { echo "failed:$failed; see $output" && exit 1; }
echo "all parts done; see $output"
