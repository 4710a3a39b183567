#!/usr/bin/env python3
"""The table and the plot of validation-h200x4.md: the suite's runs and what is predicted for them, for the rows and the host's memory that they found; beside it what was predicted before.

validation.py MOP DATABASE[@CLUSTER]...: prints the table, writes validation-h200x4.svg beside this file. CLUSTER: the calibration of the database's host, where the runs' own name means another.
"""
import json
import math
import os
import subprocess
import sys

suite = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../scenarios/validation/suite.toml")
mop, databases = sys.argv[1], sys.argv[2:]
runs = {}
for database in databases:
    path, _, cluster = database.partition("@")
    said = {r["id"]: r for r in json.loads(subprocess.run([mop, "results", "--db", path, "--compare", "--format", "json"], check=True, capture_output=True, text=True).stdout)}
    judged = subprocess.run([mop, "validate", "--suite", suite, "--db", path, "--format", "json"] + (["--cluster", cluster] if cluster else []), capture_output=True, text=True)
    if judged.returncode not in (0, 3):  # 3: some bounds do not hold
        sys.exit(judged.stderr)
    for r in json.loads(judged.stdout)["runs"]:
        r["before"] = said[r["id"]]["predicted_step_time_s"]
        runs[r["label"]] = r  # the last database's
runs = list(runs.values())
if not runs:
    sys.exit("no measurement is in " + ", ".join(databases))
runs.sort(key=lambda r: r["step_time_s"])
gib = 2**30
print("| run | plan | GPUs | context | measured step | predicted | error | before the run | measured GPU memory | predicted | error |\n|---|---|---|---|---|---|---|---|---|---|---|")
for r in runs:
    then = r["label"].startswith("held-out/")
    name = r["label"].split("/")[-1] + (" (held out)" if r["held_out"] else " (held out then)" if then else "")
    print(f"| {name} | `{r['plan'].split(':')[0]}` | {r['gpus']} | {r['context'] // 1024}K | {r['step_time_s']:.3f} s | {r['predicted_step_time_s']:.3f} s | {100 * r['step_error']:+.1f} % | "
          f"{r['before']:.3f} s | {r['hbm_peak_bytes'] / gib:.1f} GiB | {r['predicted_hbm_peak_bytes'] / gib:.1f} GiB | {100 * r['hbm_error']:+.1f} % |")
for what, some in (("all", runs), ("held out", [r for r in runs if r["held_out"]])):
    errors = [abs(r["step_error"]) for r in some]
    if errors:
        print(f"\n{what}: {len(some)} runs, mean absolute error of the step {100 * sum(errors) / len(errors):.1f} %, worst {100 * max(errors):.1f} %")

low = min(min(r["step_time_s"], r["predicted_step_time_s"]) for r in runs) / 1.25
high = 1.25 * max(max(r["step_time_s"], r["predicted_step_time_s"]) for r in runs)
size, margin = 560, 60
at = lambda s: margin + (size - 2 * margin) * math.log(s / low) / math.log(high / low)
svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" font-family="sans-serif" font-size="12">',
       f'<rect width="{size}" height="{size}" fill="white"/>']
for share, colour in ((1, "#444"), (1.05, "#bbb"), (1 / 1.05, "#bbb"), (1.12, "#ddd"), (1 / 1.12, "#ddd")):
    a, b = (low, low * share) if share >= 1 else (low / share, low)
    c, d = (high / share, high) if share >= 1 else (high, high * share)
    svg.append(f'<line x1="{at(a):.1f}" y1="{size - at(b):.1f}" x2="{at(c):.1f}" y2="{size - at(d):.1f}" stroke="{colour}"/>')
for tick in (0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 50):
    if low <= tick <= high:
        svg.append(f'<text x="{at(tick):.1f}" y="{size - margin + 18}" text-anchor="middle">{tick:g} s</text>')
        svg.append(f'<text x="{margin - 8}" y="{size - at(tick) + 4:.1f}" text-anchor="end">{tick:g} s</text>')
for r in runs:
    held, mop_plan = r["held_out"], r["plan"].startswith("mop")
    colour = "#0a58ca" if mop_plan else "#c2410c"
    svg.append(f'<circle cx="{at(r["step_time_s"]):.1f}" cy="{size - at(r["predicted_step_time_s"]):.1f}" r="4.5" stroke="{colour}" stroke-width="1.5" '
               f'fill="{colour if held else "none"}"><title>{r["label"]}</title></circle>')
svg += [f'<text x="{size / 2}" y="{size - 14}" text-anchor="middle">measured step</text>',
        f'<text x="18" y="{size / 2}" text-anchor="middle" transform="rotate(-90 18 {size / 2})">predicted</text>',
        f'<text x="{margin}" y="24">mop blue, fsdp2 (native) orange; filled: held out; lines at 5 and 12 %</text>', "</svg>"]
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "validation-h200x4.svg"), "w") as f:
    f.write("\n".join(svg) + "\n")
