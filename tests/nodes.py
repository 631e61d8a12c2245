"""Two nodes on one machine: `make test-nodes`. Needs root and iproute2.

Two network namespaces with addresses of their own stand for the nodes; `srun` and `scontrol` are small
dummy models on the PATH that start a command in each of them with the scheduler's variables. What runs is the
command line of papermill_runs/launchers/slurm.yaml: torchrun on each node, two processes each, which meet at
the first node. The training, the evaluation and a resume must be those of one process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from test_jobs import apart, gradients

from flowopd_lib.files import ROOT, read_lines
from flowopd_lib.jobs.processes import Launched

NODES = {"flowopd1": "10.99.7.1", "flowopd2": "10.99.7.2"}
TRAIN = {
    "benchmark": "tiny",
    "student": {"merge": "cat", "adapters": ["geneval", "ocr"]},
    "schedule": {"tasks": ["geneval", "ocr"], "prompts_per_batch": 6},
    "sampler": {"steps": 4, "kind": "sde"},
    "opd": {"steps": 1, "mar": 0.04, "anchor": "deqa"},
    "train": {"iterations": 4, "lr": 1.0e-3, "ema": 0.0, "save_every": 1},
}
EVALUATE = {
    "job": "evaluate",
    "benchmark": "tiny",
    "models": {"base": None},
    "n": 6,
    "steps": 4,
    "batch": 3,
}
SCONTROL = f"""#!/bin/sh
# scontrol show hostnames LIST
echo {chr(10).join(NODES)!r}
"""
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


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def set_up(dummies: Path) -> None:
    """The namespaces, joined by a cable, their names in each other's hosts file, and the dummy models."""
    first, second = NODES
    for node in NODES:
        run("ip", "netns", "add", node)
        run("ip", "-n", node, "link", "set", "lo", "up")
        hosts = Path("/etc/netns") / node / "hosts"
        hosts.parent.mkdir(parents=True, exist_ok=True)
        hosts.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{ip} {n}\n" for n, ip in NODES.items())
        )
    run(
        "ip",
        "link",
        "add",
        "cable1",
        "netns",
        first,
        "type",
        "veth",
        "peer",
        "cable2",
        "netns",
        second,
    )
    for (node, address), cable in zip(NODES.items(), ("cable1", "cable2")):
        run("ip", "-n", node, "addr", "add", f"{address}/24", "dev", cable)
        run("ip", "-n", node, "link", "set", cable, "up")
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (dummies / name).write_text(text)
        (dummies / name).chmod(0o755)


def take_down() -> None:
    for node in NODES:
        subprocess.run(["ip", "netns", "del", node], stderr=subprocess.DEVNULL)
        shutil.rmtree(Path("/etc/netns") / node, ignore_errors=True)


def on_nodes(spec: dict, folder: Path) -> Launched:
    job = Launched(spec, folder, "slurm")
    job.start()
    return job


def here(spec: dict, folder: Path) -> None:
    job = Launched(spec, folder, "local")
    job.start()
    job.wait()


def processes_of(job: str) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-f", f"flowopd_lib.jobs .*{job}"], capture_output=True, text=True
    )
    mine = [int(p) for p in found.stdout.split()]
    return [p for p in mine if "RANK=" in Path(f"/proc/{p}/environ").read_text(errors="replace")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def largest(a: dict, b: dict) -> float:
    return max((a[key] - b[key]).abs().max().item() for key in a)


def main() -> None:
    if os.geteuid() or not shutil.which("ip"):
        sys.exit(
            "error: two nodes on one machine need root and iproute2; run as root, apt install iproute2"
        )
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        take_down()
        try:
            set_up(out)
            os.environ |= {
                "PATH": f"{out}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "flowopd[1-2]",
                "SLURM_JOB_NUM_NODES": "2",
                "GPUS_PER_NODE": "2",
                "OMP_NUM_THREADS": "1",
                "FLOWOPD_PRECISION": "float32",
            }
            began = time.monotonic()
            on_nodes(TRAIN, out / "nodes").wait()
            print(
                f"trained on two nodes, two processes each, in {time.monotonic() - began:.0f} s",
                flush=True,
            )
            here(TRAIN, out / "one")
            difference = apart(gradients(out / "one"), gradients(out / "nodes"))
            losses = [
                read_lines(out / n / "metrics.jsonl")["loss"].to_numpy() for n in ("nodes", "one")
            ]
            print(
                f"mean gradients of two nodes and of one process: {difference:.2g} apart, relatively"
            )
            print(f"losses: at most {abs(losses[0] / losses[1] - 1).max():.2g} apart, relatively")
            assert difference < 1e-4

            on_nodes(EVALUATE, out / "nodes").wait()
            here(EVALUATE, out / "one")
            tables = [pd.read_parquet(out / n / "samples.parquet") for n in ("nodes", "one")]
            pd.testing.assert_frame_equal(*tables, check_exact=True)
            print(f"evaluation: the same table, {len(tables[0])} rows, to the last digit")

            for how in (signal.SIGKILL, signal.SIGTERM):
                folder = out / how.name
                longer = {**TRAIN, "train": {**TRAIN["train"], "iterations": 8}}
                job = on_nodes(longer, folder)
                end = time.monotonic() + 240
                while len(read_lines(folder / "metrics.jsonl")) < 2:
                    assert job.state == "running" and time.monotonic() < end, job.error
                    time.sleep(0.1)
                if how == signal.SIGKILL:
                    os.kill(processes_of(folder.name)[-1], how)
                else:
                    job.stop()
                with_error = None
                try:
                    job.wait()
                except RuntimeError as error:
                    with_error = error
                done = len(read_lines(folder / "metrics.jsonl"))
                on_nodes(longer, folder).wait()
                if how == signal.SIGKILL:
                    whole = out / "whole"
                    on_nodes(longer, whole).wait()
                same = largest(weights(folder), weights(whole))
                said = "ended with an error" if with_error else "stopped"
                print(
                    f"{how.name} after {done} of 8 iterations: {said}, went on, {same:.2g} from one uncut"
                )
                assert done < 8 and same == 0
        finally:
            take_down()
    print("two nodes: all as on one")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
