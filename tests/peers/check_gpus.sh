#!/usr/bin/env bash
# Is the GPU backend right? check_gpus.sh OUT BIN [PART...]   BIN: the folder with mop, test_cuda, test_gpus, test_kernels, bench_matmul, bench_memory.
# Parts (default: all): of one GPU, dealt out over the host's (at most 4): operations (against the CPU backend and transformers), kernels, memcheck,
# memcheck-kernels, racecheck (compute-sanitizer; cuDNN's own kernels left out of racecheck); of all, one after the other: gpus (mop on 1, 2 and 4 GPUs against
# the CPU, two emulated nodes, kill -9 and resume), agreement (50 steps of 1 GPU, of fsdp2 and mop on all), launchers (mpirun and torchrun), benches.
set -u
out=$(realpath -m "$1"); bin=$(realpath "$2"); shift 2
root=$(dirname "$(dirname "$(cd "$(dirname "$0")" && pwd)")")
export NCCL_NVLS_ENABLE=0 MOP_HOME=${MOP_HOME:-$root}
mkdir -p "$out"
text=/tmp/check_gpus.txt
[ -s "$text" ] || find "$root" \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) -not -path '*/build/*' -exec cat {} + > "$text"
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
gpus=$(nvidia-smi -L | wc -l)
for few in 4 2 1; do [ "$gpus" -lt "$few" ] || { gpus=$few; break; }; done  # 8 sequences are dealt out
[ "$gpus" -gt 0 ] || { echo "no GPU is here (nvidia-smi -L)" >&2; exit 2; }
begin=$SECONDS

run() {  # run NAME SECONDS COMMAND...
  local name=$1 limit=$2; shift 2
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
  local status=$?
  echo "[$((SECONDS - begin)) s] $name: exit status $status; $(grep -E 'PASSED|FAILED|SUMMARY|^{"step":50' "$out/$name.log" | tail -3 | cut -c1-200 | tr '\n' ' ')"
}
tiny() { echo "$bin/mop" run --data "$text" --gpus 1 --context "$2" --sequences 2 --steps 2 --warmup 1 --db "$out/$1.db" --model "$1" --plan mop; }
steps50() {  # steps50 NAME ARGUMENTS...
  local name=$1; shift
  run "$name" 120 "$bin/mop" run --data "$text" --model tiny-gpt-oss --context 512 --steps 50 --lr 1e-3 --warmup 5 --lr-decay constant --seed 1 --format json --db "$out/$name.db" "$@"
}

part() {
  case $1 in
  operations) run operations 300 "$bin/test_cuda" ;;
  kernels) run kernels 300 "$bin/test_kernels" ;;
  memcheck)
    for model in tiny-gpt-oss tiny-qwen3-moe tiny-deepseek-v3; do
      run memcheck-$model 120 "$sanitizer" --tool memcheck --target-processes all $(tiny $model 128)
    done ;;
  memcheck-kernels)
    run memcheck-kernels 400 "$sanitizer" --tool memcheck "$bin/test_kernels" ;;
  racecheck)  # of few tokens: the tool takes 40 GB of the host for the kernels that their rows may lead to, and 129 GB for those of 256
    for model in tiny-gpt-oss tiny-qwen3-moe; do
      run racecheck-$model 240 "$sanitizer" --tool racecheck --target-processes all --kernel-name-exclude kernel_substring=cudnn $(tiny $model 16)
    done ;;
  gpus) run gpus 560 "$bin/test_gpus" ;;
  agreement)
    steps50 agreement-1 --gpus 1 --sequences 8 --plan mop
    steps50 agreement-fsdp2 --gpus "$gpus" --sequences "$((8 / gpus))" --plan fsdp2
    steps50 agreement-mop --gpus "$gpus" --sequences "$((8 / gpus))" --plan mop
    steps50 agreement-mop-ep --gpus "$gpus" --sequences "$((8 / gpus))" --plan "mop:ep=$gpus"
    python3 - "$out" <<'PY'
import json, sys
runs = {n: [json.loads(l) for l in open(f"{sys.argv[1]}/agreement-{n}.log") if l.startswith('{"step"')] for n in ("1", "fsdp2", "mop", "mop-ep")}
for n, steps in runs.items():
    loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, runs["1"]))
    norm = max(abs(a["gradient_norm"] / b["gradient_norm"] - 1) for a, b in zip(steps, runs["1"]))
    print(f"agreement {n}: {len(steps)} steps, last loss {steps[-1]['loss']:.4f}, largest difference of a loss {loss:.4f}, of a gradient norm {100 * norm:.2f} %")
PY
    ;;
  launchers)
    common=(run --data "$text" --model tiny-qwen3-moe --context 256 --sequences 2 --steps 3 --warmup 1 --plan mop --format json --db "$out/launchers.db")
    run mpirun 60 mpirun --allow-run-as-root --oversubscribe -n "$gpus" "$bin/mop" "${common[@]}"
    run torchrun 60 torchrun --no-python --standalone --nproc-per-node "$gpus" "$bin/mop" "${common[@]}"
    for name in mpirun torchrun; do grep '^{"step":3' "$out/$name.log" | head -1 | cut -c1-60; done ;;
  benches)
    CUDA_VISIBLE_DEVICES=0 run bench-matmul 200 "$bin/bench_matmul"
    CUDA_VISIBLE_DEVICES=0 run bench-memory 120 "$bin/bench_memory" ;;
  *) echo "no part is called $1" >&2 ;;
  esac
}

[ $# -gt 0 ] || set -- operations kernels memcheck memcheck-kernels racecheck gpus agreement launchers benches
one=() all=()
for name in "$@"; do
  case $name in operations | kernels | memcheck* | racecheck) one+=("$name") ;; *) all+=("$name") ;; esac
done
for ((gpu = 0; gpu < gpus; ++gpu)); do
  for ((i = gpu; i < ${#one[@]}; i += gpus)); do CUDA_VISIBLE_DEVICES=$gpu part "${one[i]}"; done &
done
wait
for name in "${all[@]}"; do part "$name"; done
