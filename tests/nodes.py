"""Two nodes on one machine: `make test-nodes`. Needs root and iproute2.

Two network namespaces with addresses of their own are the nodes; `srun` and `scontrol` are small
scripts on the PATH that start a command in each of them with the scheduler's variables. What runs
is the command line of papermill_runs/launchers/slurm.yaml: torchrun on each node, two processes
each, which meet at the first node. The training, the evaluation and a resume must be those of one
process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
from safetensors.torch import load_file

from flowopd_lib.files import ROOT, read_lines
from flowopd_lib.lab.launch import LaunchedJob

NODES = {"flowopd1": "10.99.7.1", "flowopd2": "10.99.7.2"}
TRAIN = {
    "student": {"merge": "cat", "adapters": ["geneval", "ocr"]},
    "schedule": {"tasks": ["geneval", "ocr"], "prompts_per_batch": 6},
    "sampler": {"steps": 4, "kind": "sde"},
    "opd": {"trained_steps": 1, "mar": 0.04, "anchor": "deqa"},
    "train": {"iterations": 4, "lr": 1.0e-3, "ema": 0.0, "save_every": 1},
}
LONGER = {**TRAIN, "train": {**TRAIN["train"], "iterations": 8}}
EVALUATE = {"job": "evaluate", "models": {"base": None}, "n": 6, "steps": 4, "batch": 3}
ENVIRONMENT = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "flowopd[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "GPUS_PER_NODE": "2",
    "FLOWOPD_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
    "FLOWOPD_PRECISION": "float32",
}
SCONTROL = f"#!/bin/sh\n# scontrol show hostnames LIST\necho {chr(10).join(NODES)!r}\n"
SRUN = """#!/bin/bash
# srun [options] COMMAND...: in every node, with the variables that Slurm would give it
while [ $# -gt 0 ]; do
  case "$1" in
    --nodes|--ntasks-per-node) shift 2;;
    --*) shift;;
    *) break;;
  esac
done
number=0; started=()
for node in NODES; do
  SLURM_NODEID=$number SLURM_PROCID=$number ip netns exec $node unshare --uts bash -c \
    'hostname "$0"; exec "$@"' $node "$@" &
  started+=($!); number=$((number + 1))
done
trap 'kill -TERM "${started[@]}" 2> /dev/null' TERM INT
code=0
for one in "${started[@]}"; do
  wait -n "${started[@]}" || { code=$?; kill -TERM "${started[@]}" 2> /dev/null; }
done
wait
exit $code
""".replace("NODES", " ".join(NODES))


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def remove_nodes() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], stderr=subprocess.DEVNULL)
        shutil.rmtree(Path("/etc/netns") / node, ignore_errors=True)


@contextlib.contextmanager
def two_nodes(scripts: Path) -> Iterator[None]:
    """The namespaces, joined by a cable, with their names in each other's hosts file."""
    remove_nodes()
    try:
        for node in NODES:
            ip(f"netns add {node}")
            ip(f"-n {node} link set lo up")
            hosts = Path("/etc/netns") / node / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            names = "".join(f"{address} {name}\n" for name, address in NODES.items())
            hosts.write_text(f"127.0.0.1 localhost\n{names}")
        first, second = NODES
        ip(f"link add cable1 netns {first} type veth peer cable2 netns {second}")
        for (node, address), cable in zip(NODES.items(), ("cable1", "cable2")):
            ip(f"-n {node} addr add {address}/24 dev {cable}")
            ip(f"-n {node} link set {cable} up")
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
            (scripts / name).write_text(text)
            (scripts / name).chmod(0o755)
        os.environ |= {"PATH": f"{scripts}:{os.environ['PATH']}", **ENVIRONMENT}
        yield
    finally:
        remove_nodes()


def start(spec: dict, folder: Path, launcher: str = "slurm") -> LaunchedJob:
    job = LaunchedJob(spec, folder, launcher)
    job.start()
    return job


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def largest_difference(a: dict, b: dict) -> float:
    return max((a[key] - b[key]).abs().max().item() for key in a)


def interrupted(how: signal.Signals, folder: Path) -> str:
    """A training of which one process is killed, or that is stopped; how it ended."""
    job, end = start(LONGER, folder), time.monotonic() + 240
    while len(read_lines(folder / "metrics.jsonl")) < 2:
        assert job.state == "running" and time.monotonic() < end, job.error
        time.sleep(0.1)
    if how == signal.SIGKILL:
        ranks = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in p.info["cmdline"]]
        next(p for p in ranks if "RANK" in p.environ()).kill()
    else:
        job.stop()
    with contextlib.suppress(RuntimeError):
        job.wait()
    return f"{job.state} after {len(read_lines(folder / 'metrics.jsonl'))} of 8 iterations"


def main() -> None:
    if os.geteuid() or not shutil.which("ip"):
        sys.exit("error: two nodes on one machine need root and iproute2")
    with tempfile.TemporaryDirectory() as folder, two_nodes(Path(folder)):
        out = Path(folder)
        for spec in (TRAIN, EVALUATE):
            start(spec, out / "nodes").wait()
            start(spec, out / "one", "local").wait()
        losses = [read_lines(out / n / "metrics.jsonl")["loss"] for n in ("nodes", "one")]
        differences = (losses[0] / losses[1] - 1).abs()
        print(f"losses of two nodes and of one process differ by {differences.max():.2g}")
        assert differences[0] < 1e-5 and differences.max() < 1e-2
        tables = [pd.read_parquet(out / n / "samples.parquet") for n in ("nodes", "one")]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
        print(f"the evaluation is the same table, {len(tables[0])} rows, to the last digit")
        start(LONGER, out / "whole").wait()
        for how in (signal.SIGKILL, signal.SIGTERM):
            ended = interrupted(how, out / how.name)
            start(LONGER, out / how.name).wait()
            distance = largest_difference(adapter(out / how.name), adapter(out / "whole"))
            print(f"{how.name}: {ended}; resumed, it differs by {distance:.2g} from a whole one")
            assert distance == 0
    print("two nodes: all as on one")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
