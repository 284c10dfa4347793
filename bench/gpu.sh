#!/usr/bin/env bash
# Run everything that needs a CUDA card, in one command on a fresh machine:
#
#     pip install -r requirements-dev.txt
#     bench/gpu.sh                                  # Qwen/Qwen3-VL-2B-Instruct from the hub
#     MODEL=/data/Qwen3-VL-4B bench/gpu.sh          # the default run of a different checkpoint
#     PARTS="tests kill" bench/gpu.sh               # only some parts
#     bench/gpu.sh --small                          # a two-minute check on a CPU
#
# Every part writes its output to $OUTPUT/NAME.log, and its command, exit code, duration, machine
# and versions to $OUTPUT/NAME.json ($OUTPUT is runs/gpu by default). Benchmarks write their results
# to $OUTPUT/results. A part that fails does not stop the others.
#
#   tests    the tests marked cuda
#   fit      the prediction of `python sayo_mini.py fit` for the checkpoint (with --small: the
#            predicted and the measured memory of a small shape)
#   memory   peak memory of the shapes of 2B, 4B and 8B, also with capped memory (not with --small)
#   step     one optimizer step of this program and of TRL
#   graph    two points of the same, decoded with a CUDA graph (not with --small)
#   kill     twenty kills: a resumed run must equal an uninterrupted one
#   train    the default run of the checkpoint
set -u
cd "$(dirname "$0")/.."
output=${OUTPUT:-runs/gpu} model=${MODEL:-Qwen/Qwen3-VL-2B-Instruct} failed=""
parts=${PARTS:-tests fit memory step graph kill train}

part() { # name, command
  [[ " $parts " == *" $1 "* ]] || return 0
  printf '\n== %s\n' "$*"
  python bench/record.py "$output" "$@" || failed+=" $1"
}

if [[ ${1:-} == --small ]]; then
  output=${OUTPUT:-runs/gpu-small}
  part tests env TEST_DEVICE=cpu python -m pytest -q tests/test_cuda.py
  part fit python bench/fit.py --points 1 --results "$output/results"
  step="from bench import step; step.GRID = []; step.main()" # without the memory of the capture
  part step python -c "$step" --device cpu --points 60,4,2 --arms ours --rounds 1 \
    --results "$output/results/step.json"
  part kill python bench/kill.py --kills 1 --results "$output/results"
  part train python sayo_mini.py --device cpu --max_steps 1 --eval_examples 4 \
    --output_dir "$output/run"
else
  part tests python -m pytest -q -m cuda tests
  part fit python sayo_mini.py fit --model_name_or_path "$model"
  part memory python bench/memory.py --results "$output/results"
  part step python bench/step.py --shape 2b --results "$output/results/step.json"
  part graph python bench/step.py --shape 2b --cuda_graph --arms ours trl --points 512,64,8 \
    128,110,4 --results "$output/results/step_cuda_graph.json"
  part kill python bench/kill.py --kills 20 --device cuda --results "$output/results"
  part train python sayo_mini.py --model_name_or_path "$model" --output_dir "$output/run"
fi
[[ -z $failed ]] || { echo "failed:$failed; see $output" && exit 1; }
echo "all parts done; see $output"
