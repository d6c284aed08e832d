"""Settings: a file with profiles, overridden by the environment, overridden by the command line."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zcore.errors import ConfigurationError
from zcore.settings import Settings, load_settings, overrides_from_arguments, setting_names

TREE = Path(__file__).resolve().parents[2]
SHIPPED = TREE / "config" / "config.toml"
SNIPPETS = re.findall(
    r"```toml\n(.*?)```", (Path(__file__).parent / "settings_in_the_wild.md").read_text(), flags=re.DOTALL
)

UNSET_EXAMPLES = {"scheduler.shift": 3.0}
"""A value for each setting that is unset by default, which TOML cannot express."""


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Function that writes a settings file and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def value(settings: Settings, name: str) -> Any:
    found: Any = settings
    for part in name.split("."):
        found = getattr(found, part)
    return found


def as_toml(found: Any) -> str:
    """Format a setting's value as TOML."""
    return "{}" if found == {} else msgspec.json.encode(found).decode()


# The format


def test_there_are_snippets_to_load() -> None:
    assert len(SNIPPETS) == 9


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_examples_of_the_models_documentation_load_unchanged(written: Any, snippet: str) -> None:
    path = written(snippet)
    for profile in ["default", *re.findall(r"^\[(\w+)", snippet, flags=re.MULTILINE)]:
        assert load_settings({}, {"profile": profile}, path).profile == profile


def test_the_examples_have_their_values(written: Any) -> None:
    loaded = [load_settings({}, file=written(snippet)) for snippet in SNIPPETS[:4]]
    assert loaded[0].model_path == "/path/to/z-image"
    assert loaded[0].encoder.hidden_layer == -2
    assert loaded[0].generation_defaults(None).steps == 9
    assert loaded[0].pytorch.long_prompt_mode == "interpolate"
    assert (loaded[1].dype.enabled, loaded[1].dype.method) == (True, "vision_yarn")
    assert loaded[2].slg.layers == (7, 8, 9, 10, 11, 12)
    assert loaded[3].lora.scales == (0.5, 0.3)


def test_compile_in_the_default_profile_applies_to_every_profile(written: Any) -> None:
    path = written("[default.pytorch]\ncompile = true\n[small.encoder]\ndevice = 'cpu'\n")
    assert load_settings({}, file=path).pytorch.compile
    assert load_settings({"ZIMAGE_PROFILE": "small"}, file=path).pytorch.compile


def test_the_shipped_file_and_each_of_its_profiles_load() -> None:
    profiles = set(re.findall(r"^\[(\w+)", SHIPPED.read_text(), flags=re.MULTILINE))
    assert {"default", "demo", "rtx4090", "rtx4080"} <= profiles
    for profile in profiles:
        assert load_settings({"ZIMAGE_PROFILE": profile}).profile == profile
    assert load_settings({"ZIMAGE_PROFILE": "demo"}).generation_defaults(None).width == 128


def test_an_empty_file_means_the_defaults(written: Any) -> None:
    assert load_settings({}, file=written("")) == Settings()


def test_the_shipped_default_profile_contains_the_defaults() -> None:
    assert load_settings({}) == Settings()


# Sources


def test_a_profile_overrides_only_its_own_keys(written: Any) -> None:
    path = written("[default.storage]\nbucket = 'a'\nregion = 'here'\n[big.storage]\nbucket = 'b'\n")
    assert load_settings({}, file=path).storage.bucket == "a"
    storage = load_settings({}, {"profile": "big"}, path).storage
    assert (storage.bucket, storage.region) == ("b", "here")


def test_each_source_overrides_the_one_before(written: Any) -> None:
    path = written("[default.storage]\nbucket = 'default'\n[big.storage]\nbucket = 'profile'\n")
    big = {"ZIMAGE_PROFILE": "big"}
    environment = big | {"ZIMAGE_STORAGE__BUCKET": "environment"}
    assert load_settings({}, file=path).storage.bucket == "default"
    assert load_settings(big, file=path).storage.bucket == "profile"
    assert load_settings(environment, file=path).storage.bucket == "environment"
    assert load_settings(environment, {"storage.bucket": "option"}, path).storage.bucket == "option"


def test_options_select_file_and_profile_before_the_environment(written: Any, tmp_path: Path) -> None:
    path = written("[default]\nmodel_path = 'one'\n[big]\nmodel_path = 'big'\n")
    other = tmp_path / "other.toml"
    other.write_text("[default]\nmodel_path = 'other'\n")
    environment = {"ZIMAGE_CONFIG": str(path), "ZIMAGE_PROFILE": "big"}
    assert load_settings(environment).model_path == "big"
    assert load_settings(environment, {"profile": "default"}).model_path == "one"
    assert load_settings({"ZIMAGE_CONFIG": str(path)}, file=other).model_path == "other"


@pytest.mark.parametrize("scale", ["nan", "inf", "10.5"])
def test_the_scale_of_a_fused_lora_has_the_bounds_of_a_request(written: Any, scale: str) -> None:
    path = written(f"[default.lora]\npaths = ['a']\nscales = [{scale}]\n")
    with pytest.raises(ConfigurationError, match=r"lora\.scales"):
        load_settings({}, file=path)


def test_tables_of_keys_are_merged(written: Any) -> None:
    path = written("[default.server.api_keys]\nanna = 'k1'\n[big.server.api_keys]\nben = 'k2'\n")
    assert load_settings({}, {"profile": "big"}, path).server.api_keys == {"anna": "k1", "ben": "k2"}


@pytest.mark.parametrize("name", sorted(setting_names()))
def test_every_setting_can_be_written_in_the_environment_on_the_command_line_and_in_the_file(
    name: str, written: Any
) -> None:
    default = value(Settings(), name)
    if default is None:
        default = UNSET_EXAMPLES[name]
    as_text = default if isinstance(default, str) else as_toml(default)
    variable = "ZIMAGE_" + name.upper().replace(".", "__")
    assert value(load_settings({variable: as_text}), name) == default
    assert value(load_settings({}, {name: as_text}), name) == default
    path = written(f"default.{name} = {as_toml(default)}\n")
    assert value(load_settings({}, file=path), name) == default


@pytest.mark.parametrize(
    ("variable", "text", "name", "expected"),
    [
        ("ZIMAGE_STORAGE__BUCKET", "2024", "storage.bucket", "2024"),
        ("ZIMAGE_STORAGE__BUCKET", "true", "storage.bucket", "true"),
        ("ZIMAGE_MODEL_PATH", "/models/z", "model_path", "/models/z"),
        ("ZIMAGE_SERVER__PORT", "9000", "server.port", 9000),
        ("ZIMAGE_JOBS__LEASE_S", "12", "jobs.lease_s", 12.0),
        ("ZIMAGE_PYTORCH__COMPILE", "true", "pytorch.compile", True),
        ("ZIMAGE_SLG__LAYERS", "[1, 2]", "slg.layers", (1, 2)),
        ("ZIMAGE_LORA__PATHS", '["a.safetensors"]', "lora.paths", ("a.safetensors",)),
        ("ZIMAGE_SERVER__API_KEYS", '{anna = "k1"}', "server.api_keys", {"anna": "k1"}),
        ("ZIMAGE_SERVER__API_KEYS", '{"anna": "k1", "ben": "k2"}', "server.api_keys", {"anna": "k1", "ben": "k2"}),
        ("ZIMAGE_ENCODER__DEVICE", "cuda:1", "encoder.device", "cuda:1"),
    ],
)
def test_text_of_the_environment_is_parsed_by_the_settings_type(
    variable: str, text: str, name: str, expected: Any
) -> None:
    assert value(load_settings({variable: text}), name) == expected


def test_other_names_in_the_environment_are_ignored() -> None:
    assert load_settings(
        {"PATH": "/bin", "ZIMAGE_LAYOUT_DIR": "x", "ZIMAGE_TEST_DATABASE_URL": "y", "STORAGE__BUCKET": "z"}
    ) == load_settings({})


def test_arguments_of_the_command_line_become_overrides() -> None:
    assert overrides_from_arguments(["server.port=9000", "database.url=postgresql://h/d?x=y"]) == {
        "server.port": "9000",
        "database.url": "postgresql://h/d?x=y",
    }
    with pytest.raises(ConfigurationError, match="`--fast`: settings must be written as name=value"):
        overrides_from_arguments(["--fast"])


# Refusals


def refusal(*arguments: Any, **named: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        load_settings(*arguments, **named)
    return refused.value.message


@pytest.mark.parametrize(
    ("text", "wrong", "similar"),
    [
        ("[default.storage]\nbuckett = 'x'\n", "storage.buckett", "storage.bucket"),
        ("[default.server]\nlease_s = 3\n", "server.lease_s", "jobs.lease_s"),
        ("[default.storrage]\nbucket = 'x'\n", "storrage", "storage"),
        ("[default]\nmodelpath = 'x'\n", "modelpath", "model_path"),
        ("[default]\nprofile = 'x'\n", "profile", None),
        ("[never.pytorch]\ncompiled = true\n", "pytorch.compiled", "pytorch.compile"),
        ("[storage]\nbucket = 'x'\n", "bucket", "storage.bucket"),
    ],
)
def test_an_unknown_key_is_refused_with_a_similar_one(written: Any, text: str, wrong: str, similar: str | None) -> None:
    message = refusal({}, file=written(text))
    assert f"`{wrong}` is not a setting" in message
    assert similar is None or f"did you mean `{similar}`?" in message


def test_an_unknown_name_in_the_environment_is_refused_with_a_similar_one() -> None:
    message = refusal({"ZIMAGE_STORAGE__BUCKETS": "x"})
    assert message == ("environment variable ZIMAGE_STORAGE__BUCKETS is not a setting; did you mean `storage.bucket`?")


def test_an_unknown_option_is_refused_with_a_similar_one() -> None:
    assert refusal({}, {"servr.port": 1}) == "option servr.port is not a setting; did you mean `server.port`?"


@pytest.mark.parametrize("environment", [{"ZIMAGE_PROFILE": "rtx409O"}, {}])
def test_an_unknown_profile_is_refused_with_a_similar_one(environment: dict[str, str]) -> None:
    overrides = {} if environment else {"profile": "rtx409O"}
    assert "there is no profile `rtx409O`; did you mean `rtx4090`?" in refusal(environment, overrides)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[default.server]\nport = 'high'\n", "`server.port`: must be a whole number from 1 to 65535"),
        (
            "[default.server]\nport = 70000\n",
            "`server.port`: must be a whole number from 1 to 65535; the nearest is",
        ),
        ("[default.encoder]\ndevice = 'gpu'\n", "`encoder.device`: must be auto, cpu, mps, cuda or cuda:N"),
        ('[default.pipeline]\nvae_device = "cpu\\n"\n', "`pipeline.vae_device`: must be auto, cpu, mps, cuda or"),
        ("[default.pipeline]\ndevice = 'cuda:٣'\n", "`pipeline.device`: must be auto, cpu, mps, cuda or cuda:N"),
        (
            "[default.pipeline]\ntorch_dtype = 'bf16'\n",
            "`pipeline.torch_dtype`: must be one of bfloat16, ",
        ),
        (
            "[default.generation]\nwidth = 1000\n",
            "`generation.width`: must be a whole number from 64 to 8192 that is",
        ),
        (
            "[default.generation]\nnum_inference_steps = 51\n",
            "`generation.num_inference_steps`: must be a whole",
        ),
        (
            "[default.limits]\nmax_pixels = 0\n",
            "`limits.max_pixels`: must be a whole number of at least 4096; ",
        ),
        ("[default.server]\napi_keys = 3\n", "`server.api_keys`: must be a table of owners and their keys"),
        ("[default.server.api_keys]\nanna = ''\n", "`server.api_keys.anna`: must be text of at least 1 character"),
        ("[default.lora]\npaths = [1]\n", "`lora.paths[0]`: must be text"),
        ("[default.slg]\nstart = 0.6\n", "`slg.stop`: must be above start, 0.6"),
        ("[default.slg]\nlayers = [3, 3]\n", "`slg.layers`: must not repeat a layer; 3 is listed twice"),
        ("[default.worker]\nstages = []\n", "`worker.stages`: must be a list of at least 1 value"),
        ("[default.worker]\nstages = ['draw']\n", "`worker.stages[0]`: must be one of encode, generate"),
        (
            "[default.jobs]\nretention_s = inf\n",
            "`jobs.retention_s`: must be a number above 0 and at most 1000000000",
        ),
        ("[default]\nmodel_path = 7\n", "`model_path`: must be text"),
        ("[default.model_path]\nx = 7\n", "`model_path`: must be text"),
        ("[default.storage.bucket]\nx = 7\n", "`storage.bucket`: must be text"),
    ],
)
def test_an_invalid_value_is_refused_with_its_key_and_what_is_allowed(written: Any, text: str, named: str) -> None:
    message = refusal({}, file=written(text))
    assert named in message
    assert "config.toml (profile default)" in message


def test_a_table_instead_of_a_value_is_refused_in_any_profile(written: Any) -> None:
    path = written("[default]\nmodel_path = 'x'\n[big.model_path]\ny = 1\n")
    assert "`model_path`: must be text" in refusal({}, {"profile": "big"}, path)


def test_an_invalid_value_of_the_environment_or_an_option_is_refused_with_its_origin() -> None:
    allowed = "must be a whole number from 1 to 65535"
    assert refusal({"ZIMAGE_SERVER__PORT": "high"}) == f"environment variable ZIMAGE_SERVER__PORT: {allowed}"
    assert refusal({}, {"server.port": 0}) == f"option server.port: {allowed}; the nearest is 1"
    assert refusal({}, {"worker.stages": ["encode", "x"]}) == "option worker.stages[1]: must be one of encode, generate"


def test_all_invalid_values_of_a_file_are_listed(written: Any) -> None:
    message = refusal({}, file=written("[default.server]\nport = 0\n[default.generation]\nwidth = 70\n"))
    assert "`server.port`: must be" in message
    assert "`generation.width`: must be" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bucket = 'x'\n", "`bucket` is outside a profile"),
        ("[default]\nstorage = 'x'\n", "`storage` must be a table"),
        ("[default\n", "is not valid TOML"),
        ("[default]\na = 1\na = 2\n", "is not valid TOML"),
    ],
)
def test_a_malformed_file_is_refused_with_its_path(written: Any, text: str, expected: str) -> None:
    path = written(text)
    message = refusal({}, file=path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert refusal({"ZIMAGE_CONFIG": str(path)}) == f"{path}: cannot be read: No such file or directory"
    assert "cannot be read" in refusal({}, file=tmp_path)


# Paths and addresses


def test_relative_paths_are_below_the_source_tree() -> None:
    assert load_settings({}).data_path == TREE / "var"
    assert load_settings({"ZIMAGE_DATA_DIR": "/srv/zimage"}).data_path == Path("/srv/zimage")
    assert load_settings({}).templates_paths == (TREE / "templates" / "z_image",)
    more = load_settings({"ZIMAGE_MORE_TEMPLATES_DIRS": '["/ours", "mine"]'})
    assert more.templates_paths == (TREE / "templates" / "z_image", Path("/ours"), TREE / "mine")


def test_the_default_database_is_a_file_in_the_data_folder() -> None:
    assert load_settings({"ZIMAGE_DATA_DIR": "/srv/zimage"}).database_url == "sqlite:////srv/zimage/zimage.db"
    assert load_settings({"ZIMAGE_DATABASE__URL": "postgresql://h/d"}).database_url == "postgresql://h/d"


def test_a_model_path_is_a_folder_if_it_exists_and_else_a_hub_id(tmp_path: Path) -> None:
    assert load_settings({"ZIMAGE_MODEL_PATH": str(tmp_path)}).model_location == str(tmp_path)
    assert load_settings({}).model_location == "Tongyi-MAI/Z-Image-Turbo"


def test_the_public_url_has_no_trailing_slash() -> None:
    assert load_settings({}).public_url == "http://127.0.0.1:8000"
    assert load_settings({"ZIMAGE_SERVER__PUBLIC_URL": "https://images.example/"}).public_url == (
        "https://images.example"
    )
    assert load_settings({"ZIMAGE_SERVER__HOST": "::1"}).public_url == "http://[::1]:8000"


@pytest.mark.parametrize(
    "text", ["[" * 5_000, "[" * 5_000 + "]" * 5_000, "9" * 5_000, '{"a":' * 5_000, "{a=" * 5_000, "\x00"]
)
@pytest.mark.parametrize(
    "name", ["SERVER__PORT", "SLG__LAYERS", "SERVER__API_KEYS", "PYTORCH__COMPILE", "JOBS__LEASE_S"]
)
def test_any_text_in_the_environment_is_a_value_or_a_configuration_error(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"ZIMAGE_{name}") as refused:
        load_settings({f"ZIMAGE_{name}": text})
    assert "must be" in refused.value.message


@pytest.mark.parametrize("value", ["[" * 5_000, "9" * 5_000, "{a=" * 5_000])
def test_a_file_that_cannot_be_parsed_is_a_configuration_error(written: Any, value: str) -> None:
    with pytest.raises(ConfigurationError, match="is not valid TOML"):
        load_settings({}, file=written(f"[default.server]\nport = {value}\n"))


def test_a_file_from_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbf[default.server]\r\nport = 9000\r\n")
    assert load_settings({}, file=path).server.port == 9000
    path.write_text("[default.server]\nport = 9000\n", encoding="utf-16")
    with pytest.raises(ConfigurationError, match="is not text in UTF-8; save it in that encoding"):
        load_settings({}, file=path)


def test_a_malformed_table_is_refused_with_the_form_to_write() -> None:
    with pytest.raises(
        ConfigurationError, match=r'must be a table of owners and their keys, such as \{ anna = "..." \}'
    ):
        load_settings({"ZIMAGE_SERVER__API_KEYS": "anna: k1"})
