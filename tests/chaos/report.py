"""The report of a run: what happened, how fast the service recovered from each fault, and what broke a rule."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.callers import Recovery
from tests.chaos.facts import Facts, Sample
from tests.chaos.rules import Violation


@dataclass
class Report:
    """The result of a run."""

    facts: Facts
    violations: list[Violation]
    recoveries: dict[str, list[Recovery | None]] = field(default_factory=dict[str, list[Recovery | None]])
    """The recovery after each fault, by its name; None if a new job had not succeeded in time."""
    replaced: Counter[str] = field(default_factory=Counter[str])
    """How often each process was started again."""

    def __str__(self) -> str:
        return "\n".join([*self._summary(), *self._resources(), "", *self._table(), "", *self._violations()])

    def _summary(self) -> list[str]:
        facts = self.facts
        states = Counter(row.status for row in facts.jobs.values())
        rescues = [Counter(events)["rescued"] for events in facts.events.values()]
        replayed = sum(job.replayed for job in facts.accepted)
        repeated = len(facts.deliveries) - len({delivery.webhook_id for delivery in facts.deliveries})
        answers = Counter(answer.status or "broken" for answer in facts.answers)
        slowest_s = max((answer.took_s for answer in facts.answers), default=0.0)
        return [
            f"jobs {len(facts.jobs)}: {_listed(states)}",
            f"accepted {len(facts.accepted)}, of these replayed by key {replayed}",
            f"rescued once {rescues.count(1)}, more often {sum(count > 1 for count in rescues)}",
            f"webhooks arrived {len(facts.deliveries)}, of these repeated {repeated}",
            f"answers {_listed(answers)}; slowest {slowest_s:.1f} s",
            f"started again: {_listed(self.replaced) or 'none'}",
        ]

    def _resources(self) -> list[str]:
        """Describe the longest-lived process of each name: its resources early and at the end."""
        lives = defaultdict[tuple[str, int], list[Sample]](list)
        for sample in self.facts.samples:
            lives[sample.process, sample.pid].append(sample)
        longest: dict[str, list[Sample]] = {}
        for (name, _), samples in lives.items():
            longest[name] = max(longest.get(name, []), samples, key=len)
        return [_growth(name, samples[len(samples) // 4], samples[-1]) for name, samples in longest.items()]

    def _table(self) -> list[str]:
        return [
            "| fault | count | accepted after, s: p50 / max | succeeded after, s: p50 / max |",
            "|---|---|---|---|",
            *(_row(name, found) for name, found in sorted(self.recoveries.items())),
        ]

    def _violations(self) -> list[str]:
        found = [f"  {violation.rule}: {violation.what}" for violation in self.violations]
        return [f"violations: {len(found)}", *found]


def _listed(counts: Counter[str] | Counter[int | str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=str))


def _growth(name: str, first: Sample, last: Sample) -> str:
    return (
        f"{name}, {last.at - first.at:.0f} s: MiB {first.rss_bytes >> 20} -> {last.rss_bytes >> 20}, "
        f"descriptors {first.descriptors} -> {last.descriptors}, threads {first.threads} -> {last.threads}, "
        f"sockets {first.sockets} -> {last.sockets}"
    )


def _row(name: str, recoveries: Sequence[Recovery | None]) -> str:
    found = [recovery for recovery in recoveries if recovery is not None]
    late = len(recoveries) - len(found)
    accepted = _spread([recovery.accepted_s for recovery in found])
    succeeded = _spread([recovery.succeeded_s for recovery in found])
    return f"| {name} | {len(recoveries)} | {accepted} | {succeeded}{f', {late} not in time' if late else ''} |"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} / {max(values):.1f}" if values else "-"
