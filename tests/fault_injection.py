"""The drill, `make drill`: kills, full disks, two starters, lost ranks and bad inputs, as they happen to
people. It prints its table and ends with 1 if anything was not as it should be. `make test` has a short form
of each.

A kill is SIGKILL at a random moment; then the same command again, until it is through. What comes out must be
what an uninterrupted run leaves, bit for bit, but for seconds and dates. Filling a disk needs root, for a
small file system of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import bad_inputs
import pandas as pd
import yaml

from flowopd_lib.checkpoint import load_state
from flowopd_lib.identity import sha256_of
from flowopd_lib.runs.runner import read_status

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
}
RECIPE = {
    "student": {"rank": 4, "alpha": 8},
    "schedule": {"tasks": ["ocr"], "prompts_per_batch": 4, "images_per_prompt": 4},
    "sampler": {"steps": 4},
    "grpo": {"reward_weights": {"OCR": 0.6, "DeQA": 0.4}, "micro_batch_size": 8, "updates": 2},
    "train": {"iterations": 60, "lr": 1e-3, "save_every": 2},
}
EVALUATION = """
import sys
from pathlib import Path
from flowopd_lib import Sampler, evaluate, load_benchmark
benchmark, out = load_benchmark(), Path(sys.argv[1])
policy, rewards = benchmark.policy(), benchmark.rewards()
benchmark.load_experts(policy)
evaluate(policy, benchmark.first_prompts("test", 40), rewards, 0, Sampler(8),
         {"base": None, "ocr": "ocr", "geneval": "geneval"}, batch=8, progress=False,
         embed=rewards["PickScore"].embed, pictures=out / "pictures", into=out / "samples.parquet")
"""
# a GRPO training and an evaluation; a fine-tuning, merges and evaluations; distillations and an evaluation
NOTEBOOKS = ("03", "04", "06")
PROFILE = {
    "03_expert_training": {"iterations": 2, "n_test": 12, "steps": 4},
    "04_cold_start": {
        "sft_samples": 12,
        "sft_iterations": 3,
        "points": 3,
        "n_test": 12,
        "steps": 4,
    },
    "06_mar": {
        "variants": ["none", "deqa 0.04"],
        "iterations": 2,
        "prompts_per_batch": 6,
        "n_test": 12,
        "n_show": 1,
        "steps": 4,
    },
}
TIMES = ("seconds", "date", "time", "minutes")


def start(command: Sequence[str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def finish(command: Sequence[str]) -> tuple[int, str]:
    process = start(command)
    out, err = process.communicate()
    return process.returncode, out + err


def kills(command: Callable[[], list[str]], rng: random.Random, n: int, longest: float) -> int:
    """Start the command, kill it after a random time; `n` times. How many came before its end by itself."""
    done = 0
    for _ in range(n):
        process = start(command())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0.5, longest))
        if process.poll() is None:
            done += 1
            # the process alone: what it started must notice by itself
            process.send_signal(signal.SIGKILL)
            process.communicate()
    return done


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plain(node):
    """JSON without what is a time."""
    if isinstance(node, dict):
        return {k: plain(v) for k, v in node.items() if not any(word in k for word in TIMES)}
    return [plain(v) for v in node] if isinstance(node, list) else node


def contents(folder: Path) -> dict[str, object]:
    """What a folder holds, by name, without times: states and tables by their values, other files by their
    bytes."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if (
            name.split("/")[-1] in (".lock", "manifest.json", "status.json", "report.html")
            or path.suffix in (".png", ".ipynb")
            or "earlier/" in name
        ):
            continue  # figures and executed notebooks show seconds
        if path.name == "state.safetensors":
            state = load_state(path)
            state.pop("seconds")
            found[name] = sha256_of(state)
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
            found[name] = hashlib.sha256(
                repr([(c, table[c].tolist()) for c in table if c not in TIMES]).encode()
            ).hexdigest()
        elif path.suffix == ".jsonl":
            found[name] = [plain(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = plain(json.loads(path.read_text()))
        else:
            found[name] = digest(path)
    return found


def compared(a: Path, b: Path) -> str:
    """ "" if two folders hold the same, else what differs first."""
    left, right = contents(a), contents(b)
    for name in sorted(left.keys() | right.keys()):
        if left.get(name) != right.get(name):
            return f"{name} differs" if name in left and name in right else f"{name} is there once"
    return "" if left else "nothing came out"


class Drill:
    def __init__(self, work: Path, seed: int, n: int):
        self.work, self.rng, self.n, self.rows = work, random.Random(seed), n, []

    def row(self, what: str, tried: str, wrong: str) -> None:
        self.rows.append((what, tried, wrong))
        print(f"{'ok  ' if not wrong else 'FAIL'} {what:34} {tried:44} {wrong}", flush=True)

    def recipe(self, name: str, **changes) -> Path:
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, **changes}))
        return path

    def killed(
        self,
        what: str,
        command: Callable[[Path], list[str]],
        longest: float,
        whole: Path,
        cut: Path,
        compare=compared,
    ) -> None:
        code, said = finish(command(whole))
        if code:
            self.row(what, "uninterrupted", said[-300:])
            return
        began, done = time.time(), kills(lambda: command(cut), self.rng, self.n, longest)
        code, said = finish(command(cut))
        left = [p.name for p in cut.rglob("*.partial")] if cut.exists() else []
        self.row(
            what,
            f"{done} of {self.n} kills hit, {time.time() - began:.0f} s",
            said[-300:] if code else compare(whole, cut) or ", ".join(left),
        )

    def training(self) -> None:
        recipe = self.recipe("training")
        self.killed(
            "training, kill -9",
            lambda f: python("-m", "flowopd_lib.jobs", str(recipe), "--folder", str(f)),
            30,
            self.work / "t",
            self.work / "t_cut",
        )

    def evaluation(self) -> None:
        self.killed(
            "evaluation, kill -9",
            lambda f: python("-c", EVALUATION, str(f)),
            30,
            self.work / "e",
            self.work / "e_cut",
        )

    def notebooks(self) -> None:
        script = (
            "import sys; from pathlib import Path; from flowopd_lib import runs\n"
            f"runs.load_profile = lambda name: {PROFILE!r}\nruns.run_profile('drill', "
            "folder=Path(sys.argv[1]), resume=True)"
        )

        def compare(whole: Path, cut: Path) -> str:
            states = {s["state"] for s in read_status(cut).values()}
            return compared(whole, cut) if states == {"done"} else f"states {states}"

        self.killed(
            "three notebooks, kill -9",
            lambda f: python("-c", script, str(f)),
            90,
            self.work / "n",
            self.work / "n_cut",
            compare,
        )

    def signals(self) -> None:
        for name, number in (("SIGTERM", signal.SIGTERM), ("Ctrl-C", signal.SIGINT)):
            folder, recipe = self.work / name, self.recipe("training")
            wrong, stops = "", 0
            command = python("-m", "flowopd_lib.jobs", str(recipe), "--folder", str(folder))
            for _ in range(3):
                process = start(command)
                first = process.stdout.readline()
                time.sleep(self.rng.uniform(0, 1))
                process.send_signal(number)
                out, err = process.communicate()
                stops += "stopped after iteration" in first + out
                wrong = wrong or ("a traceback" if "Traceback" in err else "")
            code, said = finish(command)
            self.row(
                f"training, {name}",
                f"{stops} of 3 stopped with a checkpoint",
                wrong or (said[-300:] if code else compared(self.work / "t", folder)),
            )

    def two_starters(self) -> None:
        recipe, folder = self.recipe("training"), self.work / "two"
        command = python("-m", "flowopd_lib.jobs", str(recipe), "--folder", str(folder))
        both = [start(command) for _ in range(2)]
        said = [p.communicate() for p in both]
        lost = [i for i, p in enumerate(both) if p.returncode]
        named = (
            len(lost) == 1
            and f"is in use by process {both[1 - lost[0]].pid}" in said[lost[0]][1]
            and "Traceback" not in said[lost[0]][1]
        )
        self.row(
            "two starters at once",
            "one trains, the other is told by whom",
            compared(self.work / "t", folder)
            if named
            else f"exit codes {[p.returncode for p in both]}: {said[0][1][-200:]} | {said[1][1][-200:]}",
        )

    def lost_rank(self) -> None:
        recipe = self.recipe("ranks", train={**RECIPE["train"], "iterations": 12, "save_every": 1})

        def command(folder: Path) -> list[str]:
            return python(
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                "2",
                "-m",
                "flowopd_lib.jobs",
                str(recipe),
                "--folder",
                str(folder),
            )

        whole, folder = self.work / "r", self.work / "r_cut"
        code, said = finish(command(whole))
        process = start(command(folder))
        while process.poll() is None and "3/12" not in process.stdout.readline():
            pass
        pids = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        if pids:
            os.kill(int(self.rng.choice(pids)), signal.SIGKILL)
        process.communicate()
        ended = process.returncode
        again, said = finish(command(folder))
        wrong = (
            said[-300:]
            if code or again
            else "the others went on without it"
            if not ended
            else compared(whole, folder)
        )
        self.row("a rank killed", "2 processes, kill -9 of one, resumed", wrong)

    def full_disk(self) -> None:
        if os.geteuid():
            self.row("a disk that fills", "left out: needs root", "")
            return
        # room for a state and its successor
        place, size = (
            self.work / "disk",
            -(-(self.work / "t" / "state.safetensors").stat().st_size * 7 // 2 >> 20),
        )
        place.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(place)], check=True
        )
        try:
            recipe = self.recipe("training")
            command = python("-m", "flowopd_lib.jobs", str(recipe), "--folder", str(place / "t"))
            ballast = place / "ballast"
            process = start(command)
            while process.poll() is None and not process.stdout.readline().startswith("5/"):
                pass
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 4096)
            out, err = process.communicate()
            wrong = (
                ""
                if process.returncode
                and "No space left on device" in err
                and "Traceback" not in err
                else f"exit {process.returncode}: {err[-200:]}"
            )
            wrong = wrong or (
                ""
                if load_state(place / "t" / "state.safetensors")["iteration"] >= 4
                else "the state is gone"
            )
            ballast.unlink()
            code, said = finish(command)
            self.row(
                "a disk that fills",
                f"{size} MB, in the middle of a training; then room",
                wrong or (said[-300:] if code else compared(self.work / "t", place / "t")),
            )
        finally:
            # a state that was read is still mapped
            subprocess.run(["umount", "--lazy", str(place)], check=False)

    def bad_inputs(self) -> None:
        told, wrong = 0, []
        for name, (content, message) in bad_inputs.cases().items():
            folder = self.work / "bad"
            folder.mkdir(exist_ok=True)
            pid = os.fork()  # a process of its own, without importing everything once more
            if not pid:
                code, said = bad_inputs.said_of(content, folder)
                (folder / "said.json").write_text(json.dumps([code, said]))
                os._exit(0)
            os.waitpid(pid, 0)
            code, said = json.loads((folder / "said.json").read_text())
            good = (
                code not in (0, None)
                and message in said
                and "Traceback" not in said
                and len(said.strip().splitlines()) == 1
            )
            told += good
            wrong += [] if good else [f"{name}: {code} {said[-100:]}"]
            shutil.rmtree(folder)
        self.row(
            "bad inputs",
            f"{told} of {len(bad_inputs.cases())} told in one sentence, exit code 1",
            "; ".join(wrong),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tests/drill.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kills", type=int, default=20, help="of each of training, evaluation and run of notebooks"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parts = (
        "bad_inputs",
        "training",
        "signals",
        "two_starters",
        "full_disk",
        "lost_rank",
        "evaluation",
        "notebooks",
    )
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        drill = Drill(Path(work), args.seed, args.kills)
        chosen = list(
            dict.fromkeys(
                (["training"] if set(args.only) & {"signals", "two_starters", "full_disk"} else [])
                + list(args.only)
            )
        )
        for part in [p for p in parts if p in chosen]:
            getattr(drill, part)()
    failed = sum(bool(wrong) for *_, wrong in drill.rows)
    print(f"{len(drill.rows) - failed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
