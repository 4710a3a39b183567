#!/usr/bin/env bash
# The validation suite on this host's GPUs: suite.sh OUT MOP [LABEL...]
# Works in OUT, on copies of hwmodels/ and scenarios/: makes the tokens, calibrates the host (CALIBRATE=0: not; CALIBRATE=adam,copies: that alone) into its
# hwmodels/ and, of 2 or 4 GPUs, into the cluster of two emulated nodes, then makes the runs of scenarios/validation/suite.toml that LABELs name, in that
# order (default: all that the host is for, those of one GPU on a host of two; held-out ones first), and that suite.db has not.
# Emulated nodes have a NIC of NIC bytes/s each (1.25e9 a GPU; emulated_nic.cpp, which MOP's folder has).
# CLUSTER (default: h200x4 on 4 GPUs, h200x2 on fewer): the suite's name for such a host.
# UNTIL=SECONDS: all ends by then, counted from here; runs that 45 seconds are not left for are left out, and said.
# OUT: suite.db, hwmodels/CLUSTER.json, log.txt (a line a run), runs.txt (what they print), traces/.
set -u
out=$(realpath -m "$1"); mop=$(realpath -m "$2"); shift 2
here=$(cd "$(dirname "$0")" && pwd); root=$(dirname "$(dirname "$here")")
gpus=$(nvidia-smi -L | wc -l); gpus=$((gpus > 4 ? 4 : gpus))
[ "$gpus" -gt 0 ] || { echo "no GPU is here (nvidia-smi -L)" >&2; exit 2; }
cluster=${CLUSTER:-$([ "$gpus" -eq 4 ] && echo h200x4 || echo h200x2)}
begin=$SECONDS
nic=$(dirname "$mop")/libemulated_nic.so
[ -f "$nic" ] || { echo "$nic is not there: build it (emulated_nic)" >&2; exit 2; }
export LD_PRELOAD=$nic EMULATED_NIC=${NIC:-$((1250000000 * (gpus > 1 ? gpus / 2 : 1)))}  # of processes with an NCCL_HOSTID only
export NCCL_NVLS_ENABLE=0 MOP_HOME=$out PATH=$(dirname "$mop"):$PATH
mkdir -p "$out" && cd "$out" || exit 2
for folder in hwmodels scenarios; do [ -d $folder ] || cp -r "$root/$folder" .; done
say() { echo "[$((SECONDS - begin)) s] $*" | tee -a log.txt; }

for tokens in "zipf 150000" "zipf50k 50000" "zipf32k 32000" "hot 16"; do
  [ -s "${tokens% *}.bin" ] || python3 "$here/zipf_tokens.py" $tokens &
done
wait
calibrate=${CALIBRATE:-1}
if [ "$calibrate" != 0 ]; then
  only=(); [ "$calibrate" = 1 ] || only=(--only "$calibrate")
  "$mop" calibrate --gpus "$gpus" --base "$cluster" --out calibrated.json "${only[@]}" > calibrate.txt 2>&1
  status=$?
  say "calibrate: exit status $status"
  grep -h "there was no time\|mop: error" calibrate.txt | tee -a log.txt
  if [ $status -eq 0 ]; then
    mv calibrated.json "hwmodels/$cluster.json"
    [ "$gpus" -ne 2 ] && [ "$gpus" -ne 4 ] || python3 "$here/emulated_nodes.py" "hwmodels/$cluster.json" "scenarios/validation/clusters/h200-2x$((gpus / 2)).json" "$EMULATED_NIC" || exit 2
  fi
fi
"$mop" validate --suite scenarios/validation/suite.toml --commands --missing --db suite.db > commands.sh || exit 2
mkdir -p traces
eval "$(sed -n '/^on_nodes()/,/^)/p' commands.sh)"
here_too="$([ "$gpus" -eq 4 ] && echo "--gpus 4 " || echo "--gpus [1-$gpus] ")|^on_nodes 2 $((gpus / 2)) "
runs=$(grep -E -- "$here_too" commands.sh)
[ $# -gt 0 ] || set -- $(sed -n 's/.*--label held-out\/\([^ ]*\).*/\1/p' <<< "$runs") $(sed -n 's/.*--label \([^ /]*\) .*/\1/p' <<< "$runs")
for label in "$@"; do
  left=$((${UNTIL:-1000000} - (SECONDS - begin)))
  [ "$left" -gt 45 ] || { say "$label: left out, $left s are left"; continue; }
  line=$(grep -E -- "--label (held-out/)?$label " commands.sh) || { say "$label: no run that is missing is called so"; continue; }
  started=$SECONDS
  echo "== $label" >> runs.txt
  (eval "$line") >> runs.txt 2>&1 &
  run=$!
  (sleep "$left"; pkill -x "$(basename "$mop")") & watch=$!
  wait $run
  say "$label: exit status $?, $((SECONDS - started)) s"
  kill $watch 2> /dev/null
done
"$mop" validate --db suite.db | tail -12
