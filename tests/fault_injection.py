"""Fault injection, `make fault-injection`: kills, signals, two starters, full disks, lost processes
and bad inputs. It prints a table and ends with 1 if anything was not as it should be; `make test`
has a short form of each.

A kill is SIGKILL at a random moment; then the same command again, until it has finished. The
results must be those of an uninterrupted run, bit for bit, but for seconds and dates. Filling a
disk needs root, for a small file system of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import bad_inputs
import pandas as pd
import psutil
import yaml

from flowopd_lib.files import load_state
from flowopd_lib.fingerprint import sha256_of

LIMITS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
TRAIN = {
    "student": {"rank": 4, "alpha": 8},
    "schedule": {"tasks": ["ocr"], "prompts_per_batch": 4, "images_per_prompt": 4},
    "sampler": {"steps": 4, "noisy_steps": 1, "window_start": [0, 2], "branch": True},
    "grpo": {"reward_weights": {"OCR": 0.6, "DeQA": 0.4}, "micro_batch_size": 8, "updates": 2},
    "train": {"iterations": 60, "lr": 1e-3, "save_every": 2},
}
RANKS = {**TRAIN, "train": {"iterations": 12, "lr": 1e-3, "save_every": 1}}
EVALUATE = {
    "models": {"base": None, "ocr": "ocr", "geneval": "geneval"},
    **{"n": 13, "steps": 8, "batch": 8, "embed": True, "images": True},
}
RUN = {  # GRPO; fine-tuning and merges; distillations; each with an evaluation
    "03_expert_training": {"iterations": 2, "n_test": 12, "steps": 4},
    "04_cold_start": {
        "sft_samples": 12,
        "sft_iterations": 3,
        "points": 3,
        "n_test": 12,
        "steps": 4,
    },
    "06_mar": {"iterations": 2, "prompts_per_batch": 6, "n_test": 12, "n_show": 1, "steps": 4},
}
TIMES = ("seconds", "date", "time", "minutes")
SKIPPED = ("status.json", "manifest.json", ".lock")


def without_times(node):
    if isinstance(node, dict):
        return {k: without_times(v) for k, v in node.items() if not any(t in k for t in TIMES)}
    return [without_times(v) for v in node] if isinstance(node, list) else node


def content(path: Path):
    """What a file holds, without times: states and tables by their values, other files by their
    bytes."""
    if path.name == "state.safetensors":
        return sha256_of({k: v for k, v in load_state(path).items() if k != "seconds"})
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        return sha256_of([(c, table[c].tolist()) for c in table if c not in TIMES])
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [without_times(json.loads(line)) for line in lines]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict:
    """By name; without figures, executed notebooks and pages, which show seconds."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {
        name: content(path)
        for name, path in files.items()
        if path.name not in SKIPPED and path.suffix not in (".png", ".ipynb", ".html", ".log")
        if not name.startswith("earlier/") and "log.txt" not in name
    }


def difference(a: Path, b: Path) -> str:
    """What differs first between two folders; "" if nothing does."""
    left, right = contents(a), contents(b)
    names = (name for name in sorted(left | right) if left.get(name) != right.get(name))
    partial = [path.name for path in b.rglob("*.partial")]
    return next(names, "") or ", ".join(partial) or ("" if left else "there are no results")


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, error = process.communicate()
    return process.returncode, (out + error)[-300:]


class FaultInjection:
    def __init__(self, work: Path, seed: int, kills: int):
        self.work, self.random, self.kills, self.failed = work, random.Random(seed), kills, 0

    def check(self, what: str, how: str, wrong: str) -> None:
        self.failed += bool(wrong)
        print(f"{'FAIL' if wrong else 'ok  '} {what:24} {how:48} {wrong}", flush=True)

    def start(self, command: str, folder: Path, spec: dict, *before: str) -> subprocess.Popen:
        path = self.work / f"{command}.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        words = [*before, "-m", "flowopd_lib", command, str(path), "--folder", str(folder)]
        words += ["--resume"] if command == "run" else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, **LIMITS}
        start = {"env": environment, "start_new_session": True, **pipes}
        return subprocess.Popen([sys.executable, *words], **start)

    def uninterrupted(self, command: str, spec: dict, *before: str) -> Path:
        """The folder of the same command, not killed; run once."""
        folder = self.work / f"{command}{len(before)}"
        if not folder.exists():
            code, error = finish(self.start(command, folder, spec, *before))
            self.check(f"{command}, uninterrupted", " ".join(before), error if code else "")
        return folder

    def killed(self, command: str, spec: dict, longest: float) -> None:
        whole, folder, hits = self.uninterrupted(command, spec), self.work / f"{command}_cut", 0
        for _ in range(self.kills):
            process = self.start(command, folder, spec)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=self.random.uniform(0.5, longest))
            if process.poll() is None:  # the process alone: what it started must notice by itself
                hits += 1
                process.kill()
                process.communicate()
        code, error = finish(self.start(command, folder, spec))
        wrong = error if code else difference(whole, folder)
        self.check(f"{command}, kill -9", f"{hits} of {self.kills} kills before the end", wrong)

    def training(self) -> None:
        self.killed("train", TRAIN, 30)

    def evaluation(self) -> None:
        self.killed("evaluate", EVALUATE, 30)

    def notebooks(self) -> None:
        self.killed("run", RUN, 90)

    def signals(self) -> None:
        whole = self.uninterrupted("train", TRAIN)
        for number in (signal.SIGTERM, signal.SIGINT):
            folder, stops, wrong = self.work / number.name, 0, ""
            for _ in range(3):
                process = self.start("train", folder, TRAIN)
                first = process.stdout.readline()
                time.sleep(self.random.uniform(0, 1))
                process.send_signal(number)
                out, error = process.communicate()
                stops += "stopped after iteration" in first + out
                wrong = wrong or ("a traceback" if "Traceback" in error else "")
            code, error = finish(self.start("train", folder, TRAIN))
            wrong = wrong or (error if code else difference(whole, folder))
            how = f"{stops} of 3 stopped with a checkpoint"
            self.check(f"train, {number.name}", how, wrong)

    def two_starters(self) -> None:
        whole, folder = self.uninterrupted("train", TRAIN), self.work / "two"
        both = [self.start("train", folder, TRAIN) for _ in range(2)]
        (code, error), (other, other_error) = sorted(map(finish, both))
        winner = both[[p.returncode for p in both].index(0)].pid if 0 in (code, other) else -1
        named = other and f"is in use by process {winner}" in other_error
        wrong = difference(whole, folder) if named else f"{code} {error} | {other} {other_error}"
        self.check("two starters", "one trains, the other names it", wrong)

    def lost_process(self) -> None:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        whole, folder = self.uninterrupted("train", RANKS, *torchrun), self.work / "ranks_cut"
        process = self.start("train", folder, RANKS, *torchrun)
        while process.poll() is None and "3/12" not in process.stdout.readline():
            pass
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            self.random.choice(psutil.Process(process.pid).children()).kill()
        ended, _ = finish(process)
        code, error = finish(self.start("train", folder, RANKS, *torchrun))
        wrong = error if code else difference(whole, folder)
        wrong = wrong if ended else "the other went on without it"
        self.check("a lost process", "kill -9 of one of two, then the same command", wrong)

    @contextlib.contextmanager
    def disk(self, megabytes: int) -> Iterator[Path]:
        place, size = self.work / "disk", f"size={megabytes}m"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)], check=True)
        try:
            yield place
        finally:  # a state that was read is still mapped
            subprocess.run(["umount", "--lazy", str(place)], check=False)

    def full_disk(self) -> None:
        if os.geteuid():
            self.check("a full disk", "left out: needs root", "")
            return
        whole = self.uninterrupted("train", TRAIN)
        state = (whole / "state.safetensors").stat().st_size
        with self.disk(state * 7 // 2 // (1 << 20) + 1) as disk:  # room for it and its successor
            process = self.start("train", disk / "train", TRAIN)
            while process.poll() is None and not process.stdout.readline().startswith("5/"):
                pass
            ballast = disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 4096)
            code, error = finish(process)
            said = code and "No space left on device" in error and "Traceback" not in error
            kept = load_state(disk / "train" / "state.safetensors")["iteration"] >= 4
            ballast.unlink()
            again, last = finish(self.start("train", disk / "train", TRAIN))
            wrong = last if again else difference(whole, disk / "train")
            wrong = wrong if said and kept else f"exit code {code}, {error}, state kept: {kept}"
            self.check("a full disk", "in the middle of a training, then room", wrong)

    def bad_inputs(self) -> None:
        wrong, cases = [], bad_inputs.cases()
        for name, (data, message) in cases.items():
            path = self.work / "bad.yaml"
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)
            words = ["-m", "flowopd_lib", "job", str(path), "--folder", str(self.work / "bad")]
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
            lines = done.stderr.strip().splitlines()
            if done.returncode != 1 or len(lines) != 1 or message not in lines[0]:
                wrong.append(f"{name}: {done.returncode} {done.stderr[-100:]}")
        how = f"{len(cases) - len(wrong)} of {len(cases)} are one sentence, exit code 1"
        self.check("bad inputs", how, "; ".join(wrong))


CASES = (
    "bad_inputs training signals two_starters full_disk lost_process evaluation notebooks".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of their moments")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        faults = FaultInjection(Path(work), args.seed, args.kills)
        for case in args.only:
            getattr(faults, case)()
    sys.exit(bool(faults.failed))


if __name__ == "__main__":
    main()
