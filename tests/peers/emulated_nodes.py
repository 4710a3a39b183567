#!/usr/bin/env python3
"""The cluster of two emulated nodes on a host: emulated_nodes.py CALIBRATED.json NODES.json NIC

CALIBRATED: what `mop calibrate` wrote on that host, its emulated_network_ tables included. NODES (such as scenarios/validation/clusters/h200-2x2.json)
is changed in place: each node has half of the host, and a GPU's network is its share of what crosses between them. NIC: bytes/s that a node may send
(emulated_nic.cpp).
"""
import json
import sys


def main(calibrated, nodes, nic):
    host, cluster = json.load(open(calibrated)), json.load(open(nodes))
    figures, tables = host["figures"], host["tables"]
    when = tables["emulated_network_all_gather"]["where"].split("; ")[-1]

    def halved(name):
        figure = figures[name]
        where = f"half of the host's {name}: two emulated nodes share it; {figure['where'].split('; ')[-1]}"
        return {"value": figure["value"] / 2, "source": "assumed", "where": where}

    kinds = [kind for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send") if f"emulated_network_{kind}" in tables]

    # NCCL's rings pass (n - 1) / n of a buffer from node to node, shared by a node's GPUs; of an all-to-all half of a GPU's own leaves it, of what is
    # sent one way all.
    def crossing(kind):  # by bytes of the buffer: those that a GPU sends to the other node, and the seconds
        for ranks, buffer, bus in sorted(tables[f"emulated_network_{kind}"]["points"], key=lambda point: point[1]):
            passing = buffer * (ranks - 1) / ranks
            sent = {"all_to_all": buffer / 2, "send": buffer}.get(kind, passing / (ranks / 2))
            yield buffer, sent, (buffer if kind == "send" else passing) / bus

    rates = {kind: [[buffer, sent / seconds] for buffer, sent, seconds in crossing(kind)] for kind in kinds}
    fastest = max(kinds, key=lambda kind: rates[kind][-1][1])
    rate = rates[fastest][-1][1]
    small, sent, seconds = next(crossing("all_gather"))
    new = {
        "gpus_per_node": {"value": figures["gpus_per_node"]["value"] / 2, "source": "assumed", "where": "as emulated"},
        "host_bytes": halved("host_bytes"),
        "dram_bw": halved("native_dram_bw"),
        **{name: halved(name) for name in ("root_up_bw", "root_down_bw", "root_both_bw")},
        "nic_bw": {"value": rate, "source": "measured",
                   "where": f"a GPU's share of what crosses: of NCCL's collectives of {rates[fastest][-1][0] / 2**20:.0f} MiB the fastest, {fastest.replace('_', '-')}, over its sockets on the loopback; {float(nic):.3g} bytes/s a node; {when}"},
        "nic_peak_bw": {"value": float(nic), "source": "assumed", "where": "what a node may send (tests/peers/emulated_nic.cpp)"},
        "nic_latency_ns": {"value": max(0.0, (seconds - sent / rate) / 2 * 1e9), "source": "measured",
                           "where": f"half of what an all-gather of {small / 2**10:.0f} KiB takes beyond its bytes (one hop for each of two nodes); {when}"},
    }
    for name in ("communicator", "pair", "p2p"):  # what NCCL's memory between such nodes is
        if f"emulated_network_{name}_bytes" in figures:
            new[f"native_network_{name}_bytes"] = {key: figures[f"emulated_network_{name}_bytes"][key] for key in ("value", "source", "where")}
    cluster["figures"].update(new)
    cluster.setdefault("tables", {}).update({f"network_{kind}": {
        "source": "measured",
        "where": f"NCCL {kind} over its sockets on the loopback, {float(nic):.3g} bytes/s a node; (bytes of the full buffer) -> bytes/s that a GPU sends to the other node; {when}",
        "points": rates[kind]} for kind in kinds})
    with open(nodes, "w") as out:
        json.dump(cluster, out, indent=2)
        out.write("\n")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
