"""Sources of settings: a TOML file with profiles, the environment, and the command line.

Each source overrides the one before. Errors name the wrong key and the nearest valid one. Settings are read once, when
the server, a worker or the migrations start.

    [default.storage]                    every profile starts from here
    bucket = "images"
    [rtx4090.pytorch]                    applied if ZIMAGE_PROFILE=rtx4090
    compile = true
    ZIMAGE_STORAGE__BUCKET=other         sets one key from the environment
"""

import ipaddress
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import msgspec

from zcore.errors import ConfigurationError, did_you_mean
from zcore.request import mismatches, slg_errors
from zcore.settings.tree import TREE, Settings

ENVIRONMENT_PREFIX = "ZIMAGE_"
# Names with the prefix that are not settings: they select the settings, or configure the tests.
ENVIRONMENT_RESERVED = ("ZIMAGE_CONFIG", "ZIMAGE_PROFILE", "ZIMAGE_LAYOUT_DIR")
ENVIRONMENT_RESERVED_PREFIX = "ZIMAGE_TEST_"
# Of malformed TOML, of an integer with too many digits for Python (a ValueError), and of brackets nested too deeply.
UNREADABLE_TOML = (tomllib.TOMLDecodeError, ValueError, RecursionError)


def load_settings(
    environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None, file: Path | None = None
) -> Settings:
    """Load the settings of this process.

    `overrides` are dotted keys of the command line (`{"server.port": 9000}`). The file is `file` (`--config`), else
    ZIMAGE_CONFIG, else `config/config.toml`. The profile is `overrides["profile"]`, else ZIMAGE_PROFILE, else
    `default`.
    Raises `ConfigurationError` for an unreadable file, an unknown key or profile (naming the nearest valid one), and an
    invalid value (naming what is allowed).
    """
    sources = _Sources.read(environment, overrides or {}, file)
    tree: dict[str, Any] = {"profile": sources.profile}
    for _name, table in sources.tables:
        _merge(tree, table)
    for name, value in _from_environment(environment):
        _set(tree, name, value, f"environment variable {ENVIRONMENT_PREFIX}{name.upper().replace('.', '__')}")
    for name, value in sources.overrides.items():
        _set(tree, name, value, f"option {name}")
    return _validated(tree, sources.path, sources.profile)


def setting_origins(
    environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None, file: Path | None = None
) -> dict[str, str]:
    """Return the source of each setting's value: `default`, a table of the file, `environment` or `flag`.

    Takes arguments that `load_settings` has accepted.
    """
    sources = _Sources.read(environment, overrides or {}, file)
    origins = dict.fromkeys(setting_names(), "default")
    for profile, table in sources.tables:
        origins |= {name: f"{sources.path.name} [{profile}]" for name in origins if _holds(table, name)}
    origins |= {name: "environment" for name, _value in _from_environment(environment)}
    return origins | dict.fromkeys(sources.overrides, "flag")


def profile_names(environment: Mapping[str, str], file: Path | None = None) -> list[str]:
    """Return the profiles of the settings file, in its order. Raises `ConfigurationError` as `load_settings` does."""
    return list(_read(_path(environment, file)))


def overrides_from_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """Parse arguments such as `server.port=9000` into overrides. Raises `ConfigurationError` for any other form."""
    overrides: dict[str, str] = {}
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator:
            raise ConfigurationError(f"`{argument}`: settings must be written as name=value, such as server.port=9000")
        overrides[name] = value
    return overrides


def setting_names() -> dict[str, Any]:
    """Return every key as a dotted name, with its type."""
    names: dict[str, Any] = {}
    for name, kind in get_type_hints(Settings, include_extras=True).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            names |= {f"{name}.{key}": hint for key, hint in get_type_hints(kind, include_extras=True).items()}
        else:
            names[name] = kind
    del names["profile"]
    return names


def setting_value(name: str, value: Any, origin: str) -> Any:
    """Return `value` as the setting `name` holds it; text is parsed like an environment variable.

    Raises `ConfigurationError` with a message that starts with `origin`.
    """
    names = setting_names()
    kind = names.get(name)
    if kind is None:
        raise ConfigurationError(f"{origin} is not a setting{_similar_setting(name, names)}")
    if isinstance(value, str):
        value = _from_text(value, kind)
    if found := mismatches(value, kind):
        raise ConfigurationError("; ".join(f"{origin}{_dotted(one.path)}: {one.detail}" for one in found))
    return value


@dataclass(frozen=True, slots=True)
class _Sources:
    """The tables of the file that apply, `default` first, and the overrides of the command line."""

    path: Path
    profile: str
    tables: tuple[tuple[str, dict[str, Any]], ...]
    overrides: dict[str, Any]

    @classmethod
    def read(cls, environment: Mapping[str, str], overrides: Mapping[str, Any], file: Path | None) -> "_Sources":
        overrides = dict(overrides)
        path = _path(environment, file)
        profiles = _read(path)
        profile = str(overrides.pop("profile", None) or environment.get("ZIMAGE_PROFILE") or "default")
        if profile != "default" and profile not in profiles:
            known = [*profiles, "default"]
            raise ConfigurationError(f"{path}: there is no profile `{profile}`{did_you_mean(profile, known)}")
        for name, table in profiles.items():
            _refuse_unknown(table, f"{path}: [{name}]")
        names = dict.fromkeys(["default", profile])
        return cls(path, profile, tuple((name, profiles.get(name, {})) for name in names), overrides)


def _path(environment: Mapping[str, str], file: Path | None) -> Path:
    return file or Path(environment.get("ZIMAGE_CONFIG") or TREE / "config" / "config.toml")


def _holds(table: Mapping[str, Any], name: str) -> bool:
    section, _, key = name.rpartition(".")
    return key in (table.get(section, {}) if section else table)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as fault:
        raise ConfigurationError(f"{path}: cannot be read: {fault.strerror}") from fault
    except UnicodeDecodeError as fault:
        raise ConfigurationError(f"{path}: is not text in UTF-8; save it in that encoding") from fault
    except UNREADABLE_TOML as fault:
        raise ConfigurationError(f"{path}: is not valid TOML: {fault}") from fault
    for name, table in content.items():
        if not isinstance(table, dict):
            raise ConfigurationError(f"{path}: `{name}` is outside a profile; move it below [default]")
    return content


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for name, text in environment.items():
        if (
            not name.startswith(ENVIRONMENT_PREFIX)
            or name in ENVIRONMENT_RESERVED
            or name.startswith(ENVIRONMENT_RESERVED_PREFIX)
        ):
            continue
        yield name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."), text


def _set(tree: dict[str, Any], name: str, value: Any, origin: str) -> None:
    value = setting_value(name, value, origin)
    section, _, key = name.partition(".")
    if key:
        tree.setdefault(section, {})[key] = value
    else:
        tree[section] = value


def _from_text(text: str, kind: Any) -> Any:
    """Return the text itself if the setting is text, else its value in TOML, or that of an object in JSON."""
    try:
        msgspec.convert(text, kind)
        return text
    except msgspec.ValidationError:
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except UNREADABLE_TOML:
            return _from_json_object(text)


def _from_json_object(text: str) -> Any:
    """Return the object, or the text if it is none. Numbers, lists and the like are the same in TOML."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return text


def _merge(tree: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(tree.setdefault(name, {}), dict):
            _merge(tree[name], cast(dict[str, Any], value))
        else:
            tree[name] = value


def _refuse_unknown(table: Mapping[str, Any], origin: str) -> None:
    names = setting_names()
    sections = {name.partition(".")[0] for name in names if "." in name}
    for name, value in table.items():
        if name in sections:
            if not isinstance(value, dict):
                raise ConfigurationError(f"{origin}: `{name}` must be a table")
            for key in cast(dict[str, Any], value):
                if f"{name}.{key}" not in names:
                    hint = _similar_setting(f"{name}.{key}", names)
                    raise ConfigurationError(f"{origin}: `{name}.{key}` is not a setting{hint}")
        elif name not in names:
            hint = _similar_setting(name, [*names, *sections])
            raise ConfigurationError(f"{origin}: `{name}` is not a setting{hint}")


def _validated(tree: dict[str, Any], path: Path, profile: str) -> Settings:
    if found := mismatches(tree, Settings):
        faults = [(_dotted(one.path).removeprefix("."), one.detail) for one in found]
    else:
        settings = msgspec.convert(tree, Settings)
        faults = [(f"slg.{name}", detail) for name, detail in slg_errors(settings.slg)]
        faults += _network_faults("server.trusted_proxies", settings.server.trusted_proxies)
        faults += _network_faults("webhooks.denied_networks", settings.webhooks.denied_networks)
        if not faults:
            return settings
    listed = "; ".join(f"`{name}`: {detail}" for name, detail in faults)
    raise ConfigurationError(f"{path} (profile {profile}): {listed}")


def _network_faults(name: str, networks: Iterable[str]) -> Iterator[tuple[str, str]]:
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as fault:
            yield name, f"{fault}; must be IP addresses and networks such as 10.0.0.0/8"


def _dotted(path: Sequence[str | int]) -> str:
    """Return the path of a part as TOML would write it, as in `.paths[0]`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def _similar_setting(name: str, known: Iterable[str]) -> str:
    """Suggest the setting with this key in another section, or else one with a similar name or key."""
    known = list(known)
    same_key = [one for one in known if _key(one) == _key(name)]
    return did_you_mean(name, same_key or known) or did_you_mean(name, known, compare=_key)


def _key(name: str) -> str:
    return name.rpartition(".")[2]
