"""The migrations create exactly the tables of the models, and can remove them."""

import uuid
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect
from sqlalchemy.exc import IntegrityError

from tests.integration.jobs.examples import HOOK, claim, complete, events, fetch, submit
from tests.services.postgres import Postgres
from zcore.jobs import lifecycle, lora_library, queries, uploads, webhooks
from zcore.jobs.database import Database
from zcore.jobs.lora_library import UploadedLora
from zcore.jobs.models import ONLY_ON, Input, Table
from zcore.jobs.queries import JobFilter
from zcore.jobs.uploads import UploadedImage
from zcore.jobs.webhooks import AttemptOutcome
from zcore.stages import Stage

TREE = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Pair:
    """Two databases of one kind: one with all migrations applied, and an empty one."""

    migrated: str
    empty: str


@pytest.fixture
def on_sqlite(sqlite_url: str, tmp_path: Path) -> Pair:
    return Pair(sqlite_url, f"sqlite:///{tmp_path / 'empty.db'}")


@pytest.fixture
def on_postgresql(database_url: str, postgres: Postgres) -> Iterator[Pair]:
    with postgres.database() as empty:
        yield Pair(database_url, empty)


@pytest.fixture(params=["on_sqlite", "on_postgresql"])
def pair(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.getfixturevalue(request.param)
    return found


def settings_of_alembic(url: str) -> Config:
    """Return the configuration of the command line with `-x url=...`."""
    return Config(toml_file=TREE / "pyproject.toml", cmd_opts=Namespace(x=[f"url={url}"]))


def shape(engine: Engine) -> dict[str, Any]:
    """Describe every table by the database's catalog: columns, keys, and the text of constraints and indexes."""
    inspector = inspect(engine)
    tables = sorted(set(filter(is_modelled, inspector.get_table_names())) - partitions(engine))
    return {
        table: {
            "columns": [
                (column["name"], str(column["type"]), column["nullable"], column["default"])
                for column in inspector.get_columns(table)
            ],
            "primary key": inspector.get_pk_constraint(table),
            "foreign keys": sorted(map(str, inspector.get_foreign_keys(table))),
            "unique": sorted(map(str, inspector.get_unique_constraints(table))),
            "checks": sorted(
                (str(check["name"]), check["sqltext"]) for check in inspector.get_check_constraints(table)
            ),
            "indexes": indexes(engine, table),
            "options": options(engine, table),
        }
        for table in tables
    }


def is_modelled(table: str | None) -> bool:
    """Return False for Alembic's own table, and for the virtual table of the search and its shadows."""
    return table is not None and table != "alembic_version" and not table.startswith("search_index")


def partitions(engine: Engine) -> set[str]:
    """Return the names of the partitions, of which the models know nothing."""
    if engine.dialect.name == "sqlite":
        return set()
    with engine.connect() as connection:
        return set(connection.exec_driver_sql("SELECT relname FROM pg_class WHERE relispartition").scalars())


def tables_of(engine: Engine) -> list[sqlalchemy.Table]:
    """Return the tables that this kind of database has."""
    kind = engine.dialect.name
    return [table for table in Table.metadata.sorted_tables if table.info.get(ONLY_ON, kind) == kind]


def indexes(engine: Engine, table: str) -> list[str]:
    """Return the CREATE INDEX statements; SQLAlchemy's inspector omits indexes over expressions."""
    question = {
        "sqlite": "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name = ?",
        "postgresql": "SELECT indexdef FROM pg_indexes WHERE tablename = %s",
    }[engine.dialect.name]
    with engine.connect() as connection:
        return sorted(connection.exec_driver_sql(question, (table,)).scalars())


def options(engine: Engine, table: str) -> list[str]:
    """Return by what PostgreSQL partitions the table, and its storage parameters."""
    if engine.dialect.name == "sqlite":
        return []
    with engine.connect() as connection:
        question = "SELECT pg_get_partkeydef(oid), reloptions::text FROM pg_class WHERE oid = %s::regclass"
        return [str(value) for value in connection.exec_driver_sql(question, (table,)).one()]


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index:sqlalchemy.exc.SAWarning")
def test_alembic_finds_nothing_to_change_at_the_newest_revision(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database, database.engine.connect() as connection:
        parts = partitions(database.engine)
        absent = set(Table.metadata.sorted_tables) - set(tables_of(database.engine))
        options = {
            "compare_type": True,
            "compare_server_default": True,
            "include_name": lambda name, kind, _: kind != "table" or (is_modelled(name) and name not in parts),
            "include_object": lambda item, *_: item not in absent,
        }
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Table.metadata) == []


def test_migrated_tables_equal_those_made_from_the_models_to_the_letter(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as migrated, closing(Database(pair.empty)) as modelled:
        Table.metadata.create_all(modelled.engine, tables_of(modelled.engine))
        expected, found = shape(modelled.engine), shape(migrated.engine)
        assert sorted(found) == sorted(table.name for table in tables_of(modelled.engine))
    assert found == expected
    assert len(found["jobs"]["checks"]) == len(found["queue"]["checks"]) == 7


def test_down_to_the_first_revision_and_up_again(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        before = shape(database.engine)
        command.downgrade(settings_of_alembic(pair.migrated), "base")
        assert shape(database.engine) == {}
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        assert shape(database.engine) == before


def test_upgrading_twice_preserves_rows(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        job = submit(database)
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        assert fetch(database, job.id).prompt == job.prompt


def test_jobs_from_before_stages_are_preserved_at_the_generate_stage(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        job = submit(database, stage=Stage.ENCODE)
        command.downgrade(settings_of_alembic(pair.migrated), "0001")
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        stored = fetch(database, job.id)
        assert (stored.prompt, stored.stage, stored.embedding_attempt) == (job.prompt, Stage.GENERATE, None)
        assert events(database, job.id) == ["queued"]


def test_jobs_from_before_the_search_are_found(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        job = submit(database, prompt="it's a fox \\ 冬の森", metadata={"say": "it's \\"})
        command.downgrade(settings_of_alembic(pair.migrated), "0008")
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        later = submit(database, prompt="another fox")
        for text, found in (
            ("fox", [later, job]),
            ("it's \\ の森", [job]),
            ("say=it's", []),
            ('say="it\'s \\"', [job]),
        ):
            with database.read() as transaction:
                page = queries.page(transaction, JobFilter(text=text), None, 10)
            assert [one.id for one in page.jobs] == [one.id for one in found]


def test_loras_from_before_strict_are_strict(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        with database.write() as transaction:
            lora_library.register(transaction, UploadedLora("night", "0a", "MIT", 10, strict=False), "loras/night")
        command.downgrade(settings_of_alembic(pair.migrated), "0006")
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        with database.read() as transaction:
            (stored,) = lora_library.list_all(transaction)
            assert (stored.name, stored.bytes, stored.strict) == ("night", 10, True)


def test_uploads_that_an_earlier_version_could_not_find_are_back_after_an_upgrade(pair: Pair) -> None:
    """The earlier version derives the key of an upload, and would look for a newer one where it is not."""
    with closing(Database(pair.migrated)) as database:
        with database.write() as transaction:
            for owner in ("anna", "ben"):
                recorded = uploads.record(transaction, owner, UploadedImage("a" * 64, "png", 64, 48, 1234))
                uploads.mark_stored(transaction, recorded, 86_400)
        before = {owner: found.storage_key for owner, found in stored_uploads(database).items()}
        command.downgrade(settings_of_alembic(pair.migrated), "0011")
        again = f"INSERT INTO inputs SELECT 'ben', '{'a' * 64}', 'png', 64, 48, 1234, CURRENT_TIMESTAMP"
        with database.engine.begin() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM inputs").scalar_one() == 0
            connection.exec_driver_sql(again)
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        after = stored_uploads(database)
        assert after["anna"].storage_key == before["anna"]
        assert after["anna"].stored_at is not None
        assert after["ben"].storage_key != before["ben"], "it was uploaded again"


def stored_uploads(database: Database) -> dict[str, Input]:
    """Return the uploads by owner."""
    with database.read() as transaction:
        return {row.owner: row for row in transaction.session.query(Input)}


def test_events_are_renamed_in_both_directions(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        job = submit(database)
        lease = claim(database)
        with database.write() as transaction:
            lifecycle.release(transaction, lease)
        command.downgrade(settings_of_alembic(pair.migrated), "0004")
        with database.engine.connect() as connection:
            old = connection.exec_driver_sql("SELECT type FROM job_events ORDER BY id").scalars().all()
        assert old == ["queued", "claimed", "handed_back"]
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        assert events(database, job.id) == ["queued", "claimed", "released"]


def test_an_open_connection_enforces_a_constraint_by_its_new_name(pair: Pair) -> None:
    """On SQLite the rename edits the stored schema, which open connections must read again."""
    violation = "UPDATE jobs SET expires_at = CURRENT_TIMESTAMP"
    with closing(Database(pair.migrated)) as database:
        submit(database)
        command.downgrade(settings_of_alembic(pair.migrated), "0004")
        with database.engine.connect() as connection:
            with pytest.raises(IntegrityError, match="ck_jobs_pictures_expire"):
                connection.exec_driver_sql(violation)
            connection.rollback()
            command.upgrade(settings_of_alembic(pair.migrated), "head")
            with pytest.raises(IntegrityError, match="ck_jobs_outputs_expire"):
                connection.exec_driver_sql(violation)
            connection.rollback()
            if connection.dialect.name == "sqlite":
                assert connection.exec_driver_sql("PRAGMA integrity_check").scalars().all() == ["ok"]


def test_what_belongs_to_jobs_is_the_same_after_a_downgrade_to_whole_tables_and_back(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        jobs = [submit(database, webhook_url=HOOK) for _ in range(3)]
        for _ in jobs[:2]:
            lease = claim(database)
            with database.write() as transaction:
                lifecycle.release(transaction, lease)
            complete(database, claim(database))
        refuse_webhooks(database)
        before = [belongings(database, job.id) for job in jobs]
        assert [len(found["events"]) for found in before] == [5, 5, 1]
        command.downgrade(settings_of_alembic(pair.migrated), "0014")
        files = table_files(database)
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        assert table_files(database, "_first") == files
        assert [belongings(database, job.id) for job in jobs] == before
        refuse_webhooks(database)
        complete(database, claim(database))
        after = [belongings(database, job.id) for job in jobs]
        assert [len(found["attempts"]) for found in after] == [2, 2, 0]
        assert [event[0] for event in after[2]["events"]] == ["queued", "claimed", "succeeded"]


def refuse_webhooks(database: Database) -> None:
    """Record a failed attempt for every due webhook; the next one is due at once."""
    with database.write() as transaction:
        for due in webhooks.claim_due(transaction, 10, 60):
            webhooks.record_attempt(transaction, due, AttemptOutcome(False, 500, "later", 9, 0))


def belongings(database: Database, job_id: uuid.UUID) -> dict[str, list[Any]]:
    """Return the rows that belong to a job, without the numbers by which they are ordered."""
    with database.read() as transaction:
        timeline = queries.timeline(transaction, job_id)
        job = queries.get(transaction, job_id)
        return {
            "job": [job.status, job.request, job.completed_at],
            "events": [(event.type, event.at, event.attempt, event.detail) for event in timeline.events],
            "outputs": [(output.position, output.key, output.sha256) for output in job.outputs],
            "webhooks": [(event.id, event.snapshot, event.created_at) for event, _ in timeline.webhooks],
            "attempts": [
                (attempt.number, attempt.at, attempt.status_code, attempt.event_id)
                for _, attempts in timeline.webhooks
                for attempt in attempts
            ],
        }


def table_files(database: Database, suffix: str = "") -> list[int]:
    """Return the numbers of the files in which PostgreSQL stores the tables that are not to be copied."""
    if database.engine.dialect.name == "sqlite":
        return []
    tables = ("jobs", "job_outputs", "job_events", "webhook_events")
    with database.engine.connect() as connection:
        question = "SELECT pg_relation_filenode(%s::regclass)"
        return [connection.exec_driver_sql(question, (f"{table}{suffix}",)).scalar_one() for table in tables]


def test_the_revisions_have_one_head() -> None:
    assert len(ScriptDirectory(str(TREE / "migrations")).get_heads()) == 1
