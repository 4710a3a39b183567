#!/usr/bin/env bash
# mop run against the strong FSDP2 peer on H200s of this host: executor.sh OUT MOP [ROW...]
# GPUS (default: the host's, at most 4): on fewer than 4 the full models' layers are cut in proportion, so that a GPU holds and computes the same.
# Rows with a peer: smoke (tiny models, a minute), qwen, oss-offload, oss-hbm; default: the last three. WHO=peer or WHO=mop runs one of the two.
# Rows of mop alone: qwen-12 (12 sequences), qwen-fsdp2 (its plan with our kernels), qwen-128k (one sequence over all GPUs), oss-64k, oss-128k (tokens a GPU;
# states on the host and in HBM), oss-noclip-8, -16, -32 (32K, 64K, 128K), oss-512k, oss-1m, largest (LAYERS layers of Qwen3-235B-A22B, 24 on 4 GPUs: 61 B parameters).
# Both read the same tokens (zipf_tokens.py; smoke: bytes of text), STEPS steps (20) with clipping; figures are of the LAST (10). TRACE=1: mop's timeline of the
# step before the last. Every run appends to OUT, none stops the next:
# fsdp2_runs.jsonl (peer), mop_steps.jsonl (a line with the command, then a line a step), results.db, log.txt, summary.jsonl.
# Limits in seconds: a peer's run takes 90 (qwen) to 240 (oss-offload); what falls back after running out of memory takes that again. UNTIL=SECONDS: all ends
# by then, counted from here; runs that 40 seconds are not left for are left out, and said.
set -u
out=$(realpath -m "$1"); mop=$(realpath -m "$2"); shift 2
here=$(cd "$(dirname "$0")" && pwd); root=$(dirname "$(dirname "$here")")
gpus=$(nvidia-smi -L | wc -l); gpus=${GPUS:-$((gpus > 4 ? 4 : gpus))}
[[ $gpus =~ ^[1-4]$ ]] || { echo "1 to 4 GPUs are needed, not $gpus (nvidia-smi -L, GPUS)" >&2; exit 2; }
who=${WHO:-mop peer}; steps=${STEPS:-20}; last=${LAST:-10}; begin=$SECONDS
export NCCL_NVLS_ENABLE=0 PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore MOP_HOME=${MOP_HOME:-$root}
mkdir -p "$out"
tokens=${DATA:-/tmp/executor.bin} text=/tmp/executor.txt
[ -s "$tokens" ] || python3 "$here/zipf_tokens.py" "${tokens%.bin}"
[ -s "$text" ] || find "$root" \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) -not -path '*/build/*' -exec cat {} + > "$text"

layers_of() {  # layers_of MODEL LAYERS: what --model takes, the name where LAYERS are all
  python3 - "$root/scenarios/models/$1/config.json" "$1" "$2" <<'PY'
import json, os, sys
path, name, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = json.load(open(path))
if config["num_hidden_layers"] == layers:
    sys.exit(print(name))
config["num_hidden_layers"] = layers
if "layer_types" in config:
    config["layer_types"] = config["layer_types"][:layers]
folder = f"/tmp/{name}-{layers}-layers"
os.makedirs(folder, exist_ok=True)
json.dump(config, open(f"{folder}/config.json", "w"))
print(folder)
PY
}
qwen_layers=$((48 * gpus / 4)) oss_layers=$((24 * gpus / 4))
qwen=$(layers_of qwen3-30b-a3b "$qwen_layers") oss=$(layers_of gpt-oss-20b "$oss_layers")
peer_qwen=(--model qwen3-30b-a3b --layers "$qwen_layers") peer_oss=(--model gpt-oss-20b --layers "$oss_layers")

limit_of() {  # limit_of SECONDS ROW: what of them is left, in $limit; fails where it is too little
  limit=$1
  [ -n "${UNTIL:-}" ] || return 0
  local left=$((UNTIL - (SECONDS - begin)))
  limit=$((left < limit ? left : limit))
  [ "$limit" -ge 40 ] || { echo "== $(date +%T) $2: left out, $left s are left" | tee -a "$out/log.txt"; return 1; }
}

run_mop() {  # run_mop SECONDS ROW ARGUMENTS...
  local limit row=$2
  [[ $who == *mop* ]] && limit_of "$1" "$row" || return 0
  shift 2
  local command=("$mop" run --data "$data" --cluster h200x4 --gpus "$gpus" --lr-decay constant --format json --db "$out/results.db" "$@")
  [[ " $* " == *" --plan "* ]] || command+=(--plan mop)
  local few=$steps
  if [[ " $* " =~ " --steps "([0-9]+) ]]; then few=${BASH_REMATCH[1]}; else command+=(--steps "$steps" --lr 1e-4 --warmup "$((steps / 2))"); fi
  [ -z "${TRACE:-}" ] || command+=(--profile-steps "$((few > 1 ? few - 1 : 1))" --trace "$out/$row.json")
  echo "== $(date +%T) mop, $row: ${command[*]}" | tee -a "$out/log.txt"
  printf '{"row":"%s","gpus":%s,"command":"%s"}\n' "$row" "$gpus" "${command[*]}" >> "$out/mop_steps.jsonl"
  timeout -k 5 "$limit" "${command[@]}" 2>> "$out/log.txt" >> "$out/mop_steps.jsonl"
  local status=$?
  echo "== mop, $row: exit status $status" | tee -a "$out/log.txt"
}

run_peer() {  # run_peer SECONDS ROW ARGUMENTS...
  local limit row=$2
  [[ $who == *peer* ]] && limit_of "$1" "$row" || return 0
  shift 2
  local command=(torchrun --standalone --nproc-per-node "$gpus" "$here/fsdp2_pytorch.py" --block strong --data "$data" --lr 3e-4 --steps "$steps"
    --report-last "$last" --out "$out" --label "$row" "$@")
  echo "== $(date +%T) peer, $row: ${command[*]}" | tee -a "$out/log.txt"
  timeout -k 5 "$limit" "${command[@]}" 2>&1 | grep --line-buffered -vE 'OMP_NUM|\*\*\*\*|^ *$' | stdbuf -oL cut -c1-3000 | tee -a "$out/log.txt" | grep --line-buffered -E '^(attention|step|RESULT|[0-9]+ ranks)|Error' | cut -c1-900
  local status=${PIPESTATUS[0]}
  echo "== peer, $row: exit status $status" | tee -a "$out/log.txt"
  [ "$status" -eq 124 ] || return "$status"   # out of time: what falls back would be too
}

for row in "${@:-qwen oss-offload oss-hbm}"; do for row in $row; do
  data=$tokens
  [ "$row" != smoke ] || data=$text
  case $row in
  smoke)
    run_mop 60 smoke --model tiny-gpt-oss --context 256 --sequences 2
    run_peer 150 smoke --model tiny-oss --context 256 --sequences 2 --gate-up-blocks 1
    run_peer 120 smoke --model tiny-oss --context 256 --sequences 2 --offload --no-checkpoint
    run_peer 120 smoke --model tiny --context 256 --sequences 2 --gate-up-blocks 1
    ;;
  qwen)
    run_mop 180 qwen --model "$qwen" --context 4096 --sequences 8
    run_peer 200 qwen "${peer_qwen[@]}" --context 4096 --sequences 8   # with --gate-up-blocks 4 the allocator ran out 38 times in 20 steps
    ;;
  oss-offload)   # optimizer states on the host
    run_mop 300 oss-offload --model "$oss" --context 4096 --sequences 8 --optimizer stream
    run_peer 330 oss-offload "${peer_oss[@]}" --context 4096 --sequences 8 --offload --no-checkpoint ||
      run_peer 330 oss-offload "${peer_oss[@]}" --context 4096 --sequences 8 --offload --gate-up-blocks "$oss_layers"
    ;;
  oss-hbm)
    run_mop 180 oss-hbm --model "$oss" --context 4096 --sequences 8 --optimizer hbm
    run_peer 240 oss-hbm "${peer_oss[@]}" --context 4096 --sequences 8 --gate-up-blocks "$oss_layers" ||
      run_peer 240 oss-hbm "${peer_oss[@]}" --context 4096 --sequences 8
    ;;
  qwen-12)
    run_mop 180 qwen-12 --model "$qwen" --context 4096 --sequences 12 ;;
  qwen-fsdp2)
    run_mop 180 qwen-fsdp2 --model "$qwen" --context 4096 --sequences 8 --plan fsdp2 ;;
  qwen-128k)
    run_mop 400 qwen-128k --model "$qwen" --context 128K --ulysses "$gpus" --optimizer stream ;;
  oss-64k | oss-128k)
    sequences=$([ "$row" = oss-64k ] && echo 16 || echo 32)
    for where in hbm stream; do
      run_mop 300 "$row-$where" --model "$oss" --context 4096 --sequences "$sequences" --ulysses 1 --optimizer "$where"
    done ;;
  oss-noclip-8 | oss-noclip-16 | oss-noclip-32)
    run_mop 300 "$row" --model "$oss" --context 4096 --sequences "${row##*-}" --ulysses 1 --optimizer stream --clip off ;;
  oss-512k)
    run_mop 300 oss-512k --model "$oss" --context 512K --ulysses "$gpus" --steps 2 ;;
  oss-1m)
    run_mop 560 oss-1m --model "$oss" --context 1M --ulysses "$gpus" --optimizer stream --steps 1 ;;
  largest)
    run_mop 500 largest --model "$(layers_of qwen3-235b-a22b "${LAYERS:-$((6 * gpus))}")" --context 4096 --sequences 4 --steps 3 ;;
  *) echo "no row is called $row" >&2 ;;
  esac
done; done

python3 - "$out" "$last" <<'PY' | tee -a "$out/summary.jsonl"
import json, os, statistics, sys
out, last = sys.argv[1], int(sys.argv[2])
def lines(name):
    path = os.path.join(out, name)
    for line in open(path) if os.path.exists(path) else ():
        try:
            yield json.loads(line)
        except ValueError:
            pass
runs = []
for line in lines("mop_steps.jsonl"):
    if "row" in line:
        runs.append(dict(line, who="mop", steps=[]))
    elif runs and "seconds" in line:
        runs[-1]["steps"].append(line)
for r in runs:
    steps = r.pop("steps")
    tail = steps[-last:]
    r.update(steps=len(steps), step_s_all=[s["seconds"] for s in steps])
    if tail:
        median = statistics.median(s["seconds"] for s in tail)
        tokens = tail[-1]["tokens_per_s"] * tail[-1]["seconds"] / r["gpus"]
        r.update(step_s_median=median, tokens_per_s_per_gpu=tokens / median, tokens_per_gpu=tokens, loss_last=tail[-1]["loss"])
for r in lines("fsdp2_runs.jsonl"):
    runs.append(dict(row=r["label"], who="peer", **{k: r.get(k) for k in ("command", "step_s_median", "tokens_per_s_per_gpu", "step_s_all", "loss_last",
                "max_memory_allocated_bytes", "max_memory_reserved_bytes", "attention", "split_on_compute_stream", "error")}))
for r in runs:
    print(json.dumps(r))
PY
