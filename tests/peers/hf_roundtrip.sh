#!/usr/bin/env bash
# Weights exported by mop run, loaded by Hugging Face transformers: the loss of the same tokens, for every family.
#   PYTHON=venv/bin/python tests/peers/hf_roundtrip.sh build/release/bin/mop
# Prints a line a model: mop's loss in fp32, transformers' in fp64, their relative difference; fails above 1e-5.
set -euo pipefail
mop=$(realpath "$1")
python=${PYTHON:-python3}
here=$(dirname "$(realpath "$0")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
seq 1 2000 | awk '{ printf "line %d of the text, and %d more to come.\n", $1, 2000 - $1 }' > "$work/text.txt"
"$python" - "$work" <<'PY'
import json, pathlib, sys
work = pathlib.Path(sys.argv[1])
text = (work / "text.txt").read_bytes()
sequences = [list(text[i * 128:(i + 1) * 128 + 1]) for i in range(2)]
(work / "tokens.json").write_text(json.dumps({"tokens": [s[:-1] for s in sequences], "targets": [s[1:] for s in sequences]}))
PY
for model in tiny-qwen3-moe tiny-gpt-oss tiny-deepseek-v3 tiny-mixtral tiny-olmoe tiny-glm4-moe; do
  # Two steps of training first, so that the weights are not the random ones; then the loss of what was exported.
  (cd "$work" && "$mop" run --model $model --data text.txt --context 128 --ranks 4 --plan mop --precision fp32 --lr 1e-3 --steps 3 \
    --no-store --export "$model" --export-type f32 > /dev/null 2>&1)
  ours=$(cd "$work" && "$mop" run --model $model --weights "$model" --data text.txt --order data --context 128 --ranks 2 --plan fsdp2 \
    --precision fp32 --lr 0 --steps 1 --no-store --format json 2> /dev/null | "$python" -c 'import json, sys; print(repr(json.loads(sys.stdin.readline())["loss"]))')
  theirs=$("$python" "$here/hf_roundtrip.py" "$work/$model" "$work/tokens.json" --dtype float64 2> /dev/null | "$python" -c 'import json, sys; print(json.load(sys.stdin)["loss"])')
  "$python" -c "
ours, theirs = $ours, $theirs
print(f'$model: mop {ours:.9f}, transformers {theirs:.9f}, difference {abs(ours / theirs - 1):.1e}')
raise SystemExit(abs(ours / theirs - 1) > 1e-5)"
done
