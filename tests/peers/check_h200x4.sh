#!/usr/bin/env bash
# Is the GPU backend right? check_h200x4.sh OUT BIN [PART...]   BIN: the folder with mop, test_cuda, test_gpus, test_kernels, bench_matmul, bench_memory.
# Parts, each on a GPU of its own where it needs one (default: all): operations (against the CPU backend and transformers), kernels, memcheck, racecheck
# (compute-sanitizer; cuDNN's own kernels left out of racecheck), gpus (mop on 1, 2 and 4 GPUs against the CPU, two emulated nodes, kill -9 and resume),
# agreement (50 steps of 1 GPU, fsdp2 on 4 and mop on 4), launchers (mpirun and torchrun), benches (alone on their GPU, others may run beside).
set -u
out=$(realpath -m "$1"); bin=$(realpath "$2"); shift 2
root=$(dirname "$(dirname "$(cd "$(dirname "$0")" && pwd)")")
export NCCL_NVLS_ENABLE=0 MOP_HOME=${MOP_HOME:-$root}
mkdir -p "$out"
text=/tmp/check_h200x4.txt
[ -s "$text" ] || find "$root" \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) -not -path '*/build/*' -exec cat {} + > "$text"
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
begin=$SECONDS

run() {  # run NAME SECONDS COMMAND...
  local name=$1 limit=$2; shift 2
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
  local status=$?
  echo "[$((SECONDS - begin)) s] $name: exit status $status; $(grep -E 'PASSED|FAILED|SUMMARY|^{"step":50' "$out/$name.log" | tail -3 | cut -c1-200 | tr '\n' ' ')"
}
tiny() { echo "$bin/mop" run --data "$text" --gpus 1 --context 128 --sequences 2 --steps 2 --warmup 1 --db "$out/$1.db" --model "$1" --plan mop; }
steps50() {  # steps50 NAME ARGUMENTS...
  local name=$1; shift
  run "$name" 120 "$bin/mop" run --data "$text" --model tiny-gpt-oss --context 512 --steps 50 --lr 1e-3 --warmup 5 --lr-decay constant --seed 1 --format json --db "$out/$name.db" "$@"
}

part() {
  case $1 in
  operations) CUDA_VISIBLE_DEVICES=0 run operations 300 "$bin/test_cuda" ;;
  kernels) CUDA_VISIBLE_DEVICES=1 run kernels 300 "$bin/test_kernels" ;;
  memcheck)
    for model in tiny-gpt-oss tiny-qwen3-moe tiny-deepseek-v3; do
      CUDA_VISIBLE_DEVICES=2 run memcheck-$model 120 "$sanitizer" --tool memcheck --target-processes all $(tiny $model)
    done
    CUDA_VISIBLE_DEVICES=2 run memcheck-kernels 400 "$sanitizer" --tool memcheck "$bin/test_kernels" ;;
  racecheck)
    for model in tiny-gpt-oss tiny-qwen3-moe; do
      CUDA_VISIBLE_DEVICES=3 run racecheck-$model 240 "$sanitizer" --tool racecheck --target-processes all --kernel-name-exclude kernel_substring=cudnn $(tiny $model)
    done ;;
  gpus) run gpus 560 "$bin/test_gpus" ;;
  agreement)
    steps50 agreement-1 --gpus 1 --sequences 8 --plan mop
    steps50 agreement-fsdp2 --gpus 4 --sequences 2 --plan fsdp2
    steps50 agreement-mop --gpus 4 --sequences 2 --plan mop
    steps50 agreement-mop-ep --gpus 4 --sequences 2 --plan mop:ep=4
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
    run mpirun 60 mpirun --allow-run-as-root --oversubscribe -n 4 "$bin/mop" "${common[@]}"
    run torchrun 60 torchrun --no-python --standalone --nproc-per-node 4 "$bin/mop" "${common[@]}"
    for name in mpirun torchrun; do grep '^{"step":3' "$out/$name.log" | head -1 | cut -c1-60; done ;;
  benches)
    CUDA_VISIBLE_DEVICES=0 run bench-matmul 200 "$bin/bench_matmul"
    CUDA_VISIBLE_DEVICES=0 run bench-memory 120 "$bin/bench_memory" ;;
  *) echo "no part is called $1" >&2 ;;
  esac
}

[ $# -gt 0 ] || set -- operations kernels memcheck racecheck gpus agreement launchers benches
for name in "$@"; do  # what has a GPU of its own runs beside the others
  case $name in operations | kernels | memcheck | racecheck) part "$name" & ;; esac
done
wait
for name in "$@"; do
  case $name in operations | kernels | memcheck | racecheck) ;; *) part "$name" ;; esac
done
