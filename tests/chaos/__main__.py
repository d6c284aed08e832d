"""`python -m tests.chaos`: run the service under random faults, print a table, and exit with 1 on any violation."""

import argparse

from tests.chaos.callers import Mix
from tests.chaos.faults import FAULTS, selected
from tests.chaos.run import Plan, run


def main() -> int:
    """Read the arguments, run, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults come")
    parser.add_argument("--seed", type=int, default=1, help="seed of faults and jobs")
    parser.add_argument("--faults", default="all", help=f"names, groups or `none`: {', '.join(FAULTS)}")
    parser.add_argument("--callers", type=int, default=12, help="callers at once")
    parser.add_argument("--pause", type=float, default=0.5, help="mean pause of a caller between two jobs, in seconds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=float, default=0.0, help="share of jobs that kill their worker")
    parser.add_argument("--raises", type=float, default=0.0, help="share of jobs that raise an error in their worker")
    parser.add_argument("--embedded", action="store_true", help="in one folder, on SQLite, instead of on servers")
    parser.add_argument("--beside", default="", help="git revision of which one more API and one more worker run")
    chosen = parser.parse_args()
    if chosen.embedded and chosen.beside:
        parser.error("--beside is for servers: one folder has one API and one worker")
    faults = [] if chosen.faults == "none" else selected(chosen.faults, chosen.embedded)
    mix = Mix(kills=chosen.kills, raises=chosen.raises)
    plan = Plan(
        chosen.minutes, chosen.seed, faults, chosen.callers, chosen.pause, chosen.workers, chosen.embedded, mix,
        chosen.beside,
    )  # fmt: skip
    print(f"{plan.minutes:g} minutes, seed {plan.seed}, faults: {chosen.faults}", flush=True)
    report = run(plan)
    print(report)
    return 1 if report.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
