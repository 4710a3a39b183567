#!/usr/bin/env bash
# The runs behind reports/measurements/h200x4, most important first: h200x4.sh OUT [first|rest|more|micro [TABLES]]
# Every run appends its JSON line to OUT as soon as it has one, and no run can stop the next.
set -u
out=$1; part=${2:-first}; cd "$(dirname "$0")"
export NCCL_NVLS_ENABLE=0 PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
run() {  # run SECONDS GPUS ARGUMENTS...
  local limit=$1 gpus=$2; shift 2
  echo "== $(date +%T) $*"
  timeout -k 5 "$limit" torchrun --standalone --nproc-per-node "$gpus" fsdp2_pytorch.py --out "$out" "$@" 2>&1 |
    grep -vE '^W1|OMP_NUM|\*\*\*\*|^ *$' | tail -n "${LINES_SHOWN:-12}" | cut -c1-1400
  return "${PIPESTATUS[0]}"
}
case $part in
first)
  run 90 4 --model tiny --context 256 --steps 4 --drop 2 --profile --label smoke || { echo SMOKE FAILED; exit 1; }
  run 120 4 --model olmoe-1b-7b --profile
  run 150 4 --model qwen3-30b-a3b --profile
  run 230 4 --model qwen3-30b-a3b --sequences 8 --compile inner --steps 7 --drop 3 --profile
  run 230 4 --model gpt-oss-20b --block plain --offload --steps 6 --drop 2 --profile
  run 70 4 --model olmoe-1b-7b --sequences 8 --steps 7 --drop 2
  run 70 4 --model olmoe-1b-7b --context 16384 --steps 7 --drop 2
  run 80 4 --model gpt-oss-20b --block plain --sequences 4 --steps 7 --drop 2
  ;;
rest)
  run 100 4 --model qwen3-30b-a3b --sequences 4 --steps 7 --drop 2
  run 70 4 --model olmoe-1b-7b --sequences 4 --no-checkpoint --steps 7 --drop 2
  run 120 4 --model olmoe-1b-7b --offload --steps 6 --drop 2
  run 100 4 --model qwen3-30b-a3b --layers 24 --context 32768 --steps 6 --drop 2
  run 70 2 --model olmoe-1b-7b --steps 8 --drop 3
  ;;
more)   # launch cost alone (no work on the GPU), the compiled peer, and profiles
  for m in tiny tiny-olmoe tiny-oss; do run 60 4 --model $m --block plain --layers 24 --context 256 --steps 16 --drop 6 --profile --label launch-cost; done
  run 90 4 --model tiny --layers 24 --context 256 --steps 16 --drop 6 --compile inner --label launch-cost
  run 90 4 --model olmoe-1b-7b --profile
  run 100 4 --model qwen3-30b-a3b --profile
  run 150 4 --model qwen3-30b-a3b --sequences 8 --compile outer --steps 7 --drop 3 --profile
  run 90 4 --model olmoe-1b-7b --sequences 8 --steps 7 --drop 2 --profile
  ;;
micro)
  timeout -k 5 120 torchrun --standalone --nproc-per-node 4 microbench.py --out "$out/microbench_more.json" --tables "${3:-interference,cpu,launch}" 2>&1 |
    grep microbench
  ;;
esac
