#!/bin/sh
# Every figure of reports/paper.md, as tab-separated rows. Needs jq. Run from the repository root: reports/paper.sh [MOP]
set -eu
mop=${1:-build/release/bin/mop}
scenarios=$(dirname "$0")/../scenarios/paper
row='.[] | [.model, .plan.family, .calibration, .context, .routing, (.imbalance | . * 100 | round / 100), .fits,
  (.hbm_peak_bytes / 1073741824 * 10 | round / 10), (.host_peak_bytes / 1073741824 | round), .tokens_per_step,
  (.step_time_s // 0 | . * 100 | round / 100), (.tokens_per_s_per_gpu // 0 | . * 10 | round / 10),
  ((.time_by_component // {}) | (.attention // 0 | . * 10 | round / 10), (.experts // 0 | . * 10 | round / 10))] | @tsv'
show() { jq -r "$row"; }
title() { printf '\n# %s\n' "$*"; }

title 'model family calibration context routing imbalance fits HBM_GiB host_GiB tokens_a_step step_s tokens/s/GPU attention_s experts_s'
for calibration in paper measured; do
  title "Tables 2 and 3, $calibration"
  for name in 120b 600b 1t; do
    for family in mop fsdp; do
      $mop compare --config "$scenarios/$name-$family.toml" --calibration $calibration --no-store --format json | show
    done
  done
done

title 'measured, 600B MoP with the tokens a step of the FSDP plan'
$mop compare --config "$scenarios/600b-mop.toml" --accumulate 8 --no-store --format json | show

title 'measured, both plans chosen by the planner, equal tokens a step'
for name in 120b 600b 1t; do
  windows=$([ $name = 120b ] && echo "--windows off" || true)
  $mop compare --config "$scenarios/$name-mop.toml" --plan mop --plan fsdp2-best $windows --no-store --format json | show
done

imbalance() {  # scenario, contexts, routings
  $mop sweep --config "$scenarios/$1.toml" --context "$2" --routing "$3" --no-store --format json 2>/dev/null | show
}
title 'memory of the FSDP plans against expert imbalance'
hot() { y=$1; shift; for x in "$@"; do printf 'hot:%s@%s,' "$x" "$y"; done; }
imbalance 120b-fsdp 256K,512K,1M "$(hot 2 0.02 0.04 0.06 0.08 0.1 0.12 0.14 0.16 0.18 0.2 0.25 0.3 0.35 0.4 0.5)balanced"
imbalance 600b-fsdp 64K,128K,256K "$(hot 4 0.02 0.04 0.06 0.08 0.1 0.15 0.2 0.25 0.3 0.4 0.5)balanced,hot:0.75@6"
imbalance 1t-fsdp 256K,512K,1M "$(hot 1 0.03 0.05 0.055 0.06)balanced"
imbalance 1t-fsdp 256K,512K "hot:0.125@1,zipf:0.8,zipf:0.9,zipf:1,zipf:2"

title 'the same, 600B, with the experts of one rank (32 of 256) drawn 12, 16, 20 and 24 times as often as the others'
file=$(mktemp)
trap 'rm -f "$file"' EXIT
for weight in 12 16 20 24; do
  jq -cn --argjson w $weight '[range(256) | if . < 32 then $w else 1 end]' >"$file"
  imbalance 600b-fsdp 64K,128K "histogram:$file" | sed 's|histogram:[^\t]*|'"histogram $weight:1|"
done

title 'the same imbalances under the MoP plans, least-loaded on, then off'
for switch in on off; do
  $mop sweep --config "$scenarios/120b-mop.toml" --context 256K --routing "balanced,hot:0.1@2,hot:0.2@2,hot:0.4@2" --least-loaded $switch \
    --no-store --format json 2>/dev/null | show
  $mop sweep --config "$scenarios/600b-mop.toml" --context 128K --routing "balanced,hot:0.06@4,hot:0.25@4,hot:0.5@4" --least-loaded $switch \
    --no-store --format json 2>/dev/null | show
  $mop sweep --config "$scenarios/1t-mop.toml" --context 512K --routing "balanced,hot:0.06@1,hot:0.125@1,hot:0.5@4" --least-loaded $switch \
    --no-store --format json 2>/dev/null | show
done
