#!/usr/bin/env python3
"""Turns the tables of microbench.py into a cluster file of hwmodels/ (h200x4.json).

Usage: tests/peers/hwmodel_from_microbench.py reports/measurements/h200x4 > hwmodels/h200x4.json
Reads microbench.json, microbench_eager.json and launch.json (a model too small for the GPUs to matter) of that folder.
Every figure carries its source; nothing here looks at a training step.
"""
import json
import sys



def read(name):
    with open(f"{sys.argv[1]}/{name}") as f:
        return json.load(f)


bench, eager, launches = read("microbench.json"), read("microbench_eager.json"), read("launch.json")
where = f"reports/measurements/h200x4/microbench.json, {bench['provenance']['date']}, {bench['provenance']['machine']}"


def rows(table, **match):
    return [r for r in bench[table]["rows"] if all(r.get(k) == v for k, v in match.items())]


def one(table, field, **match):
    found = rows(table, **match)
    assert len(found) == 1, (table, match, len(found))
    return found[0][field]


def figure(value, source, why):
    return {"value": value, "source": source, "where": why}


def measured(value, what):
    return figure(value, "measured", f"{what}; {where}")


def copies(gpus, direction, field):
    return one("host_copies", field, gpus=gpus, direction=direction, bytes=1 << 28) * 1e9


def interference(victim, other):
    hits = [r for r in rows("interference", measured=victim, against=[other]) if "collective_stream_priority" not in r]
    assert len(hits) == 1
    return hits[0]["slowdown"]


def constants():
    by_step = {r["after"]: r for r in rows("hbm_constants")}
    context = by_step["first element-wise kernel"]["outside_torch_bytes"]
    kept = by_step["empty_cache (what torch keeps: cuBLAS workspaces)"]
    libraries = kept["outside_torch_bytes"] - context + kept["torch_reserved_bytes"]
    comm = by_step["communicator 2, 4 GPUs: first all-gather"]["delta_outside_bytes"]
    p2p = by_step["communicator 2, 4 GPUs: first all-to-all (point-to-point connections)"]["delta_outside_bytes"]
    return by_step, context, libraries, comm, p2p


by_step, context, libraries, comm, p2p = constants()
launch = {r["what"]: r for r in rows("launch")}


def cpu(field, what, data, processes):
    """Mean over the runs on two hosts: PyTorch's CPU rates vary from host to host."""
    found = [r[field] for table in ("cpu", "cpu_second_run") for r in rows(table, what=what, data=data, processes=processes)]
    assert len(found) == 2, (what, data, found)
    return sum(found) / len(found)


torch_adam = cpu("parameters_per_s_all", "adamw_fused", "list of 8.4M-element tensors, parameters and gradients pinned", 4)
torch_norm = cpu("norm_gb_per_s_all", "foreach_norm_and_scale", "list of 8.4M-element tensors", 4)
torch_scale = cpu("scale_gb_per_s_all", "foreach_norm_and_scale", "list of 8.4M-element tensors", 4)
gpus = bench["provenance"]["gpus"]

block = launches["cpu_submit"]["per_block_median_us"]
kernels = launches["kernels_per_block"]
unshard_us = block["forward_with_hooks"] - block["forward_body"]
backward_kernels = next(v for k, v in kernels.items() if k.startswith("backward")) - (kernels["forward with FSDP hooks"] - kernels["forward body"])
backward_us = launch["autograd_linear_mul_add"]["backward_cpu_us_per_forward_op"] / 2
reduce_us = max(0.0, block["backward_with_hooks"] - unshard_us - backward_kernels * backward_us)


def tiny(us, what):
    p = launches["provenance"]
    return figure(us * 1e3, "measured", f"{what}; reports/measurements/h200x4/launch.json, {p['date']}, {p['machine']}")


def eager_table(op):
    p = eager["provenance"]
    points = [[r["elements"], r["elements_per_s"]] for r in eager["rows"] if r["op"] == op]
    assert points, op
    return {"source": "measured", "points": points,
            "where": f"eager PyTorch {op}, all its kernels; (elements) -> elements/s; "
                     f"reports/measurements/h200x4/microbench_eager.json, {p['date']}, {p['machine']}"}


figures = {
    "gpus_per_node": measured(gpus, "GPUs of the host"),
    "host_bytes": figure(512 * 2**30, "measured", "memory of the host, 512 GiB"),
    "dram_bw": figure(217e9, "measured", "host DRAM ceiling with 64 cores, 215-220 GB/s; design notes gpu.md, 2026-11-22"),
    "root_up_bw": measured(gpus * copies(gpus, "up", "up_gb_per_s"), "four GPUs reading the host at once, in all"),
    "root_down_bw": measured(gpus * copies(gpus, "down", "down_gb_per_s"), "four GPUs writing the host at once, in all"),
    "root_both_bw": measured(
        gpus * (copies(gpus, "both", "up_gb_per_s") + copies(gpus, "both", "down_gb_per_s")),
        "four GPUs reading and writing the host at once, in all"),
    "host_adam_rate_alone": figure(5.3e9, "measured", "fused AdamW, one large tensor, 16 threads (a GPU's share) and nothing else on the DRAM, parameters/s; design notes gpu.md, 2026-11-22"),
    "torch_adam_rate": measured(torch_adam / gpus,
                                "torch.optim.AdamW(fused=True), list of 8.4M-element tensors, parameters and gradients pinned, 4 processes x 16 threads, parameters/s of one process, mean of two hosts"),
    "torch_norm_bw": measured(torch_norm * 1e9 / gpus, "torch foreach norm of a list of CPU tensors, 4 processes, bytes/s of one, mean of two hosts"),
    "torch_scale_bw": measured(torch_scale * 1e9 / gpus, "torch foreach in-place multiply of a list of CPU tensors, 4 processes, bytes read and written/s of one, mean of two hosts"),
    "peak_flops": figure(989e12, "published", "H200 SXM data sheet, dense bf16"),
    "hbm_bytes": measured(by_step["CUDA context creation"]["total_bytes"], "cudaMemGetInfo total"),
    "hbm_peak_bw": figure(4.8e12, "published", "H200 SXM data sheet"),
    "nvlink_bw": figure(18 * 26.56e9, "measured", "18 links x 26.56 GB/s each way; design notes gpu.md, 2026-11-22"),
    "pcie_up_bw": measured(copies(1, "up", "up_gb_per_s"), "pinned host to device, one GPU"),
    "pcie_down_bw": measured(copies(1, "down", "down_gb_per_s"), "device to pinned host, one GPU"),
    "pcie_both_bw": measured(copies(1, "both", "up_gb_per_s") + copies(1, "both", "down_gb_per_s"), "both ways at once, one GPU, sum"),
    "pcie_peak_bw": figure(63e9, "published", "PCIe Gen5 x16 each way after encoding"),
    "kernel_ns": measured(launch["tiny_kernel_gpu_side"]["gpu_us_per_kernel"] * 1e3, "tiny kernels back to back, device side"),
    "copy_latency_ns": measured(one("host_copies", "down_us", gpus=1, direction="down", bytes=65536) * 1e3, "64 KiB copy"),
    "nic_bw": figure(46e9, "published", "8 x 400 Gb/s InfiniBand a node, NCCL all-to-all bus bandwidth a GPU; design notes gpu.md"),
    "nic_peak_bw": figure(50e9, "published", "400 Gb/s line rate"),
    "nic_latency_ns": figure(15000, "assumed", "one network hop of an NCCL collective, small message"),
    "all_gather_matmul_slowdown": measured(interference("matmul_8192", "all_gather_1GiB"), "8192^3 matmul under an all-gather"),
    "all_gather_slowdown": measured(interference("all_gather_1GiB", "matmul_8192"), "1 GiB all-gather under matmuls"),
    "reduce_scatter_matmul_slowdown": measured(interference("matmul_8192", "reduce_scatter_1GiB"), "8192^3 matmul under a reduce-scatter"),
    "reduce_scatter_slowdown": measured(interference("reduce_scatter_1GiB", "matmul_8192"), "1 GiB reduce-scatter under matmuls"),
    "all_to_all_matmul_slowdown": measured(interference("matmul_8192", "all_to_all_1GiB"), "8192^3 matmul under an all-to-all"),
    "all_to_all_slowdown": measured(interference("all_to_all_1GiB", "matmul_8192"), "1 GiB all-to-all under matmuls"),
    "context_bytes": measured(context, "CUDA context and kernels"),
    "library_bytes": measured(libraries, "cuBLAS, cuDNN and their workspaces"),
    "communicator_bytes": measured(comm, "one NCCL communicator of 4 GPUs (the first takes 370 MB more)"),
    "communicator_p2p_bytes": measured(p2p / (gpus - 1), "NCCL point-to-point buffers of one communicator, a peer of the node"),
    "native_launch_ns": figure(4000, "assumed", "C++ launch of one kernel with its event wait"),
    "eager_launch_ns": tiny(block["forward_body"] / kernels["forward body"], "one eager kernel in forward, CPU time"),
    "eager_recompute_launch_ns": tiny(block["recompute_body"] / kernels["recompute body"], "one eager kernel recorded by autograd, CPU time"),
    "eager_backward_launch_ns": measured(launch["autograd_linear_mul_add"]["backward_cpu_us_per_forward_op"] * 1e3 / 2,
                                         "autograd backward, CPU time a kernel (two kernels a forward op)"),
    "fsdp_unshard_launch_ns": tiny(unshard_us, "FSDP2's unshard and reshard of one group, CPU time"),
    "fsdp_reduce_launch_ns": tiny(reduce_us, "FSDP2's reduce-scatter of one group, CPU time"),
    "compiled_launch_ns": measured(launch["x_add_no_grad"]["cpu_us_per_op"] * 1e3, "one launch from Python"),
    "fused_kernel_share": measured(one("memory_bound", "rw_gb_per_s", kernel="rmsnorm_fused", bytes=134217728) /
                                   one("memory_bound", "rw_gb_per_s", kernel="copy", bytes=268435456),
                                   "bandwidth of a fused RMSNorm over that of a copy"),
    "collective_launch_ns": measured(launch["call_all_gather_into_tensor"]["cpu_us_per_op"] * 1e3, "torch.distributed collective call, CPU time"),
}


def table(points, what):
    points = list({tuple(p[:-1]): p for p in points}.values())  # a shape measured twice: the later run
    return {"source": "measured", "where": f"{what}; {where}", "points": points}


def collective(op):
    points = [[r["gpus"], r["bytes"], r["bus_gb_per_s"] * 1e9] for r in rows("nccl", op=op, dtype="bf16")]
    return table(points, f"NCCL {op}, back to back; (ranks, bytes of the full buffer) -> bus bytes/s")


ok = lambda name: [r for r in rows(name) if "error" not in r]
grid = lambda values: all(v & (v - 1) == 0 for v in values)
tables = {
    "matmul": table([[r["M"], r["N"], r["K"], r["tflops"] * 1e12] for r in ok("dense_matmul")
                     if r["layout"] == "forward" and "tflops" in r and grid((r["M"], r["N"], r["K"]))
                     and r["M"] in (128, 512, 2048, 8192, 32768, 131072) and r["N"] in (128, 512, 2048, 8192, 32768)
                     and r["K"] in (128, 512, 2048, 8192, 32768)],
                    "bf16 matmul through cuBLAS; (m, n, k) -> FLOP/s"),
    "grouped_matmul": table([[r["K"], r["N"], r["experts"], r["rows_per_expert"], r["tflops"] * 1e12] for r in ok("grouped_matmul")
                             if r["layout"] == "forward" and "tflops" in r and r["experts"] in (4, 16, 64, 128)
                             and r["rows_per_expert"] in (16, 64, 256, 1024, 4096, 16384)],
                            "torch._grouped_mm (CUTLASS), equal rows; (k, n, experts, rows an expert) -> FLOP/s"),
    "attention_forward": table([[r["d_qk"], r["d_v"], r["heads"] * r["batch"], r["S"], r["forward_tflops"] * 1e12]
                                for r in ok("attention") if r["backend"] == "cudnn" and "forward_tflops" in r],
                               "cuDNN causal attention; (qk, v, heads x batch, S) -> FLOP/s, causal"),
    "attention_backward": table([[r["d_qk"], r["d_v"], r["heads"] * r["batch"], r["S"], r["backward_tflops"] * 1e12]
                                 for r in ok("attention") if r["backend"] == "cudnn" and "backward_tflops" in r],
                                "cuDNN causal attention backward, 2.5 x forward FLOPs; (qk, v, heads x batch, S) -> FLOP/s"),
    "memory_bound": table([[r["moved_bytes"], r["rw_gb_per_s"] * 1e9] for r in rows("memory_bound", kernel="copy")],
                          "device copy; (bytes read + written) -> bytes/s"),
    "all_gather": collective("all_gather"),
    "reduce_scatter": collective("reduce_scatter"),
    "all_reduce": collective("all_reduce"),
    "all_to_all": collective("all_to_all"),
}


def shard_table(name, op):
    """Optimizer and clipping over the tensor lists of real shards; the smallest point is the short list's."""
    small = [r for r in eager["rows"] if r["op"] == op][:1]
    points = [[r["elements"], r["elements_per_s"]] for r in small]
    points += [[r["shard_elements"], r["shard_elements"] / r["time_us"] * 1e6] for r in rows("eager_ops", op=name)]
    return table(points, f"PyTorch {name} over one block's shard; (elements) -> elements/s")


for op in ("rms_norm", "rms_norm_bwd", "rope", "rope_bwd", "gather", "index_add", "gate_multiply", "gate_multiply_bwd", "swiglu",
           "swiglu_bwd", "router", "router_bwd", "sort", "cross_entropy", "cross_entropy_bwd", "embedding_bwd", "shard_copy_in",
           "unsharded_copy_out", "gradient_cast", "expert_bias", "expert_bias_bwd", "clamped_swiglu", "clamped_swiglu_bwd"):
    tables[f"torch_{op}"] = eager_table(op)
tables["torch_adamw"] = shard_table("adamw_fused on the GPU, fp32", "adamw")
tables["torch_gradient_norm"] = shard_table("clip: foreach_norm fp32", "gradient_norm")
tables["torch_gradient_scale"] = shard_table("clip: foreach_mul_ fp32", "gradient_scale")
print("{")
print('"description": "4 x H200 SXM in one host (64 cores, 512 GiB), as measured",')
print('"figures": {')
print(",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in figures.items()))
print('},\n"tables": {')
blocks = []
for k, v in tables.items():
    body = ",\n    ".join(json.dumps(p) for p in v["points"])
    blocks.append(f'  {json.dumps(k)}: {{"source": {json.dumps(v["source"])}, "where": {json.dumps(v["where"])}, "points": [\n    {body}]}}')
print(",\n".join(blocks))
print("}\n}")
