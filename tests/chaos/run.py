"""A run: callers work while faults come one after another; then everything settles, and the observer judges."""

import asyncio
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tests.chaos import readers
from tests.chaos.callers import CALM_MIX, Caller, Journal, Mix, Recovery
from tests.chaos.facts import Facts
from tests.chaos.faults import Fault
from tests.chaos.network import Loop, looping
from tests.chaos.report import Report
from tests.chaos.rules import violations
from tests.chaos.world import KEYS, World, embedded, fleet

START_S = 120.0
RECOVERY_S = 150.0
SETTLE_S = 180.0
OWNERS = ("anna", "ben")


@dataclass(frozen=True)
class Plan:
    """What a run does; the same seed chooses the same faults and jobs, though not the same moments."""

    minutes: float
    seed: int
    faults: Sequence[Fault]
    callers: int = 12
    pause_s: float = 0.5
    workers: int = 2
    embedded: bool = False
    """Whether everything is in one folder, on SQLite, instead of on servers."""
    mix: Mix = CALM_MIX
    beside: str = ""
    """A git revision of which one more API and one more worker run."""


def run(plan: Plan) -> Report:
    """Run the service under faults, and return what the observer found."""
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="zimage-chaos-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        loop = stack.enter_context(looping())
        clocks = any(fault.group == "clock" for fault in plan.faults)
        opened = (
            embedded(folder, loop, plan.seed, clocks)
            if plan.embedded
            else fleet(folder, loop, plan.seed, plan.workers, clocks, plan.beside)
        )
        world = stack.enter_context(opened)
        return _Run(plan, world, loop).run()


class _Run:
    def __init__(self, plan: Plan, world: World, loop: Loop) -> None:
        self._plan, self._world, self._loop = plan, world, loop
        self._journal = Journal()
        self._random = random.Random(plan.seed)
        self._recoveries = defaultdict[str, list[Recovery | None]](list)

    def run(self) -> Report:
        plan, world = self._plan, self._world
        assert world.pass_time(START_S, until=world.all_present), "the processes did not start"
        stopped = asyncio.Event()
        callers = [self._loop.begin(self._caller(number).run(stopped, plan.pause_s)) for number in range(plan.callers)]
        until = time.monotonic() + plan.minutes * 60
        upcoming: list[Fault] = []
        while time.monotonic() < until:
            world.pass_time(self._random.uniform(2, 5))
            if plan.faults:
                upcoming = upcoming or self._random.sample(plan.faults, len(plan.faults))
                self._suffer(upcoming.pop())
        self._loop.call(stopped.set)
        facts = self._settle(callers)
        ends = Counter({slot.name: slot.ends for slot in world.slots if slot.ends})
        return Report(facts, violations(facts), dict(self._recoveries), ends)

    def _caller(self, number: int, pooled: bool = True) -> Caller:
        key = KEYS[OWNERS[number % len(OWNERS)]]
        source = random.Random(f"{self._plan.seed} {number}")
        return Caller(self._world.url, key, self._journal, source, self._world.hooks.url, self._plan.mix, pooled)

    def _suffer(self, fault: Fault) -> None:
        try:
            fault.act(self._world)
        finally:
            self._world.heal()
        probe = self._loop.begin(self._caller(0, pooled=False).probe())
        recovered = self._world.pass_time(RECOVERY_S, until=probe.done)
        recovery = probe.result() if recovered else None
        self._recoveries[fault.name].append(recovery)
        print(f"{time.strftime('%H:%M:%S')} {fault.name}: {recovery or 'no job succeeded in time'}", flush=True)

    def _settle(self, callers: list[Future[None]]) -> Facts:
        """Wait until all jobs have ended and maintenance has caught up, or for so long that it never will."""
        world, store = self._world, self._world.store
        world.pass_time(SETTLE_S, until=lambda: all(caller.done() for caller in callers))
        for caller in callers:
            if not caller.cancel():
                caller.result()
        world.pass_time(SETTLE_S, until=lambda: readers.unended(store) == 0, every_s=1)
        world.pass_time(SETTLE_S, until=lambda: readers.undelivered(store) == 0, every_s=1)
        readers.hurry_deletions(store)
        world.pass_time(30, until=lambda: store.keys() == readers.named_keys(store), every_s=2)
        facts = readers.read_facts(store, self._journal, world.seen, world.samples, world.hooks.deliveries)
        ends = [(slot.name, status) for slot in world.slots for status in slot.unexpected]
        return replace(facts, unexpected_ends=ends)
