"""What a busy installation leaves in its database: jobs of revision 0008 with their events, images and webhooks.

Realistic in what decides speed: prompts of 20 to 60 words, few of them common and most rare, some in Japanese;
metadata; hundreds of owners; ids and times spread over days; almost all jobs ended. The same arguments give the same
rows.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import psycopg

OWNERS = 500
BATCH = 5_000
NEWEST_AT = datetime(2026, 11, 27, tzinfo=UTC)
KANJI = "冬森狐雪月夜山川海空花鳥風光影青赤白黒金銀町道駅橋城雨雲星春夏秋朝夕村島"

COLUMNS = {
    "jobs": (
        "id", "owner", "status", "priority", "request", "prompt", "caller_metadata", "webhook_url", "idempotency_key",
        "fingerprint", "attempt", "attempts_left", "worker", "lease_token", "lease_until", "progress_step",
        "progress_steps", "error_code", "error_message", "error_retryable", "metrics", "engine", "created_at",
        "available_at", "notified_at", "started_at", "completed_at", "expires_at", "stage", "embedding_attempt",
    ),
    "job_outputs": ("job_id", "position", "key", "format", "width", "height", "bytes", "sha256", "seed"),
    "job_events": ("job_id", "at", "type", "attempt", "detail"),
    "webhook_events": (
        "id", "job_id", "type", "url", "snapshot", "created_at", "attempt", "next_attempt_at", "delivered_at",
    ),
    "webhook_attempts": ("event_id", "number", "at", "duration_ms", "status_code", "response_body"),
}  # fmt: skip
Value = str | None
Rows = dict[str, list[Sequence[Value]]]


@dataclass(frozen=True, slots=True)
class History:
    """`count` jobs submitted evenly over the `days` before `NEWEST_AT`; the newest, one in that many, are active."""

    count: int
    days: float = 60.0
    active_one_in: int = 1_000

    def fill(self, url: str) -> None:
        """Insert the rows into a database at revision 0008."""
        if url.startswith("sqlite"):
            with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
                connection.execute("PRAGMA foreign_keys = OFF")
                for rows in self._batches():
                    _insert(connection, rows)
            connection.close()
        else:
            with psycopg.connect(url.replace("+psycopg", "")) as connection:
                connection.execute("SET session_replication_role = replica")  # the rows refer to each other correctly
                for rows in self._batches():
                    _copy(connection, rows)
            with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
                connection.execute("VACUUM ANALYZE")

    def submitted_at(self, number: int) -> datetime:
        """Return when the job with this number, from 0, was submitted."""
        return NEWEST_AT - timedelta(days=self.days * (self.count - number) / self.count)

    def _batches(self) -> Iterator[Rows]:
        source = np.random.default_rng(7)
        words = _vocabulary(source)
        likelihood = np.cumsum(1 / np.arange(1, len(words) + 1))
        likelihood /= likelihood[-1]
        for first in range(0, self.count, BATCH):
            rows: Rows = {table: [] for table in COLUMNS}
            numbers = range(first, min(first + BATCH, self.count))
            lengths = source.integers(20, 60, len(numbers))
            picked = iter(np.searchsorted(likelihood, source.random(int(lengths.sum()))).tolist())
            chances = source.random(len(numbers)).tolist()
            for number, length, chance in zip(numbers, lengths.tolist(), chances, strict=True):
                prompt = " ".join(words[next(picked)] for _ in range(length))
                if chance < 0.03:
                    prompt = f"{KANJI[number % len(KANJI)]}{KANJI[number % 11]}の{KANJI[number % 7]} {prompt}"
                self._add(rows, number, prompt, chance)
            yield rows

    def _add(self, rows: Rows, number: int, prompt: str, chance: float) -> None:
        at = self.submitted_at(number)
        job_id, webhook_id = (_id(at, 2 * number + part) for part in (0, 1))
        submitted, ended = _time(at), _time(at + timedelta(seconds=9))
        status = self._status(number, chance)
        running, over = status == "running", status not in ("queued", "running")
        done = status in ("succeeded", "expired")
        request = {"prompt": prompt, "width": 1024, "height": 1024, "steps": 9, "seed": number, "n": 1, "format": "png"}
        metadata = {"customer": number % 9_000, "campaign": f"spring-{number % 40}"} if number % 3 == 0 else {}
        hook = "https://caller.example/hook" if number % 5 == 0 else None
        failure = ("cuda_out_of_memory", "needs 9 GB more", "1") if status == "failed" else (None, None, None)
        lease = ("gpu-7", job_id, ended) if running else ("gpu-7" if done else None, None, None)
        rows["jobs"].append(
            (
                job_id, f"owner-{number * 7919 % OWNERS}", status, "0", _json(request), prompt, _json(metadata), hook,
                f"key-{number}" if number % 4 == 0 else None, "0" * 64, "0" if status == "queued" else "1", "2", *lease,
                "9" if done else "0", "9", *failure, _json({"total_ms": 8_000} if done else {}),
                _json({"device": "NVIDIA H100", "dtype": "bfloat16"} if done else {}), submitted, submitted, submitted,
                submitted if running or done else None, ended if over else None, ended if done else None, "generate",
                None,
            )
        )  # fmt: skip
        events = [("queued", "0"), *([] if status == "queued" else [("claimed", "1")])]
        for event, attempt in [*events, *([(status.replace("expired", "succeeded"), "1")] if over else [])]:
            rows["job_events"].append((job_id, submitted, event, attempt, _json({})))
        if done:
            key = f"jobs/{job_id}/1/0.png"
            rows["job_outputs"].append((job_id, "0", key, "png", "1024", "1024", "1500000", "a" * 64, str(number)))
        if over and hook is not None:
            snapshot = _json({"id": job_id, "status": status, "request": request})
            delivered = (ended, "1", None, ended)
            rows["webhook_events"].append((webhook_id, job_id, f"job.{status}", hook, snapshot, *delivered))
            rows["webhook_attempts"].append((webhook_id, "1", ended, "35", "204", ""))

    def _status(self, number: int, chance: float) -> str:
        if number >= self.count - self.count // self.active_one_in:
            return "running" if number % 10 == 0 else "queued"
        if chance > 0.94:
            return "failed" if chance > 0.97 else "canceled"
        return "succeeded" if number > self.count * 0.9 else "expired"


def _vocabulary(source: np.random.Generator) -> list[str]:
    """Return 30,000 distinct words, the most common first."""
    syllables = [first + vowel for first in "bcdfghklmnprstvw" for vowel in ("a", "e", "i", "o", "u", "an", "er", "in")]
    picked = source.integers(0, len(syllables), (60_000, 4)).tolist()
    lengths = source.integers(1, 5, 60_000).tolist()
    made = ("".join(syllables[part] for part in parts[:length]) for parts, length in zip(picked, lengths, strict=True))
    return list(dict.fromkeys(made))[:30_000]


def _id(at: datetime, number: int) -> str:
    """Return a UUIDv7 of that time, in hexadecimal without hyphens; larger for a larger number of the same time."""
    spread = number * 0x9E3779B97F4A7C15 % 2**46
    return f"{int(at.timestamp() * 1000):012x}7{number % 4096:03x}8{spread:015x}"


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S.%f}"


def _json(document: dict[str, object]) -> str:
    return json.dumps(document, ensure_ascii=False)


def _insert(connection: sqlite3.Connection, rows: Rows) -> None:
    for table, columns in COLUMNS.items():
        names, places = ", ".join(columns), ", ".join("?" for _ in columns)
        connection.executemany(f"INSERT INTO {table} ({names}) VALUES ({places})", rows[table])


def _copy(connection: psycopg.Connection, rows: Rows) -> None:
    for table, columns in COLUMNS.items():
        lines = ("\t".join("\\N" if value is None else value for value in row) for row in rows[table])
        with connection.cursor().copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN".encode()) as copy:
            copy.write("".join(f"{line}\n" for line in lines))
