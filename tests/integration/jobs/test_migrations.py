"""The migrations make the very tables of the models, and can take them away again."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect

from tests.integration.jobs.examples import events, look, submit
from tests.services.postgres import Postgres
from zcore.jobs.database import Database
from zcore.jobs.models import Table
from zcore.stages import Stage

TREE = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Pair:
    """Two databases of one kind: one that migrations have made, one that nobody has touched."""

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
    """As the command line makes them with `-x url=...`."""
    return Config(toml_file=TREE / "pyproject.toml", cmd_opts=Namespace(x=[f"url={url}"]))


def shape(engine: Engine) -> dict[str, Any]:
    """Every table as the database itself describes it: columns, keys, constraints' and indexes' very text."""
    look = inspect(engine)
    tables = sorted(set(look.get_table_names()) - {"alembic_version"})
    return {
        table: {
            "columns": [
                (column["name"], str(column["type"]), column["nullable"], column["default"])
                for column in look.get_columns(table)
            ],
            "primary key": look.get_pk_constraint(table),
            "foreign keys": sorted(map(str, look.get_foreign_keys(table))),
            "unique": sorted(map(str, look.get_unique_constraints(table))),
            "checks": sorted((str(check["name"]), check["sqltext"]) for check in look.get_check_constraints(table)),
            "indexes": indexes(engine, table),
        }
        for table in tables
    }


def indexes(engine: Engine, table: str) -> list[str]:
    """The statements that would make them; SQLAlchemy's inspector leaves out those over expressions."""
    question = {
        "sqlite": "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name = ?",
        "postgresql": "SELECT indexdef FROM pg_indexes WHERE tablename = %s",
    }[engine.dialect.name]
    with engine.connect() as connection:
        return sorted(connection.exec_driver_sql(question, (table,)).scalars())


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index:sqlalchemy.exc.SAWarning")
def test_alembic_finds_nothing_to_change_at_the_newest_revision(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database, database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Table.metadata) == []


def test_migrated_tables_equal_those_made_from_the_models_to_the_letter(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as migrated, closing(Database(pair.empty)) as modelled:
        Table.metadata.create_all(modelled.engine)
        expected, found = shape(modelled.engine), shape(migrated.engine)
    assert sorted(found) == sorted(Table.metadata.tables)
    assert found == expected
    assert len(found["jobs"]["checks"]) == 8


def test_down_to_the_first_revision_and_up_again(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        before = shape(database.engine)
        command.downgrade(settings_of_alembic(pair.migrated), "base")
        assert shape(database.engine) == {}
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        assert shape(database.engine) == before


def test_upgrading_twice_keeps_what_is_stored(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        job = submit(database)
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        assert look(database, job.id).prompt == job.prompt


def test_what_was_recorded_before_there_were_stages_is_kept_and_waits_to_be_painted(pair: Pair) -> None:
    with closing(Database(pair.migrated)) as database:
        job = submit(database, stage=Stage.ENCODE)
        command.downgrade(settings_of_alembic(pair.migrated), "0001")
        command.upgrade(settings_of_alembic(pair.migrated), "head")
        kept = look(database, job.id)
        assert (kept.prompt, kept.stage, kept.embedding_attempt) == (job.prompt, Stage.GENERATE, None)
        assert events(database, job.id) == ["queued"]


def test_revisions_form_one_line() -> None:
    assert len(ScriptDirectory(str(TREE / "migrations")).get_heads()) == 1
