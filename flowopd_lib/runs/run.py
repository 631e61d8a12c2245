"""`python -m flowopd_lib.runs PROFILE`: execute the notebooks of a profile headlessly."""

from __future__ import annotations

import signal
import sys
from functools import cache

from ..benchmarks import load_benchmark
from .cost import cost_table
from .profiles import NOTEBOOKS, choose, overrides_of, parameters_of, profile_parser
from .runner import run_profile


def costs(chosen: dict[str, dict]) -> str:
    """What a profile's notebooks will cost, as a table to read."""
    benchmarks = cache(load_benchmark)
    whole = {n: {**parameters_of(NOTEBOOKS / f"{n}.ipynb"), **p} for n, p in chosen.items()}
    table = cost_table(whole, benchmarks)
    rates = [w.rates for w in map(benchmarks, {p["benchmark"] for p in whole.values()}) if w.rates]
    told = "".join(
        f"\nat {r['forwards']:g} forwards and {r['updates']:g} updates a second of one {r['device']}"
        for r in rates
    )
    return table.round(2).to_string(index=False, na_rep="-") + told


def main() -> None:
    parser = profile_parser("python -m flowopd_lib.runs", __doc__)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out what is done and unchanged, go on with what was cut off",
    )
    parser.add_argument("--cost", action="store_true", help="only tell what it would cost")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="notebooks beside one another, each with its share of the cores (default: 1)",
    )
    args = parser.parse_args()
    # a kill ends like Ctrl-C: in order, the kernel too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        overrides = overrides_of(args.set)
        chosen = choose(args.profile, args.only, overrides)
        if args.cost or any(parameters.get("launcher") for parameters in chosen.values()):
            print(costs(chosen))
        if args.cost:
            return
        folder = run_profile(
            args.profile, args.only, overrides, args.folder, resume=args.resume, jobs=args.jobs
        )
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command with --resume goes on from there")
    print(f"Read {folder / 'report.html'}")


if __name__ == "__main__":
    main()
