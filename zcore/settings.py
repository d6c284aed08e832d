"""The operator's choices as one frozen tree: a TOML file with profiles, the environment above it, the command line on
top.

Takes a file, a profile's name and an environment; gives `Settings`, or a `ConfigurationError` that names the wrong key
and the nearest right one. Read once at an edge (the server's start, the worker's start, the migrations) and passed on
in
the smallest part a function needs. Does not know what the parts do with their settings.

    [default.storage]                    every profile starts from here
    bucket = "pictures"
    [rtx4090.pytorch]                    ZIMAGE_PROFILE=rtx4090 changes this
    compile = true
    ZIMAGE_STORAGE__BUCKET=other         one key, from the environment
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

import msgspec
from msgspec import Meta, field

from zcore.errors import ConfigurationError
from zcore.request import (
    BaseResolution,
    Dype,
    DypeExponent,
    DypeMethod,
    DypeScale,
    DypeStart,
    GenerationDefaults,
    GuidanceScale,
    HiddenLayer,
    LayerIndices,
    LongPromptMode,
    LoraScale,
    PartOfSteps,
    RequestLimits,
    Shift,
    Side,
    SkipLayerGuidance,
    SlgScale,
    Steps,
    said_plainly,
)
from zcore.stages import Stage

TREE = Path(__file__).resolve().parent.parent
ENVIRONMENT_PREFIX = "ZIMAGE_"
# Names with the prefix that choose the settings, or belong to the tests, and are not settings themselves.
ENVIRONMENT_RESERVED = ("ZIMAGE_CONFIG", "ZIMAGE_PROFILE", "ZIMAGE_LAYOUT_DIR")
ENVIRONMENT_RESERVED_PREFIX = "ZIMAGE_TEST_"

Device = Annotated[str, Meta(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")]
DeviceOrNone = Annotated[
    str, Meta(pattern=r"^(|auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N, or empty")
]
DType = Literal["bfloat16", "float32", "float16"]
Quantization = Literal["none", "8bit", "fp8", "4bit"]
Seconds = Annotated[float, Meta(gt=0, le=1_000_000_000)]
Delay = Annotated[float, Meta(ge=0, le=86_400)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file."""


class EncoderSettings(_Section, frozen=True):
    """Where and how the text encoder runs."""

    device: Device = "auto"
    torch_dtype: DType = "bfloat16"
    hidden_layer: HiddenLayer = -2
    quantization: Quantization = "none"
    weights_file: str = ""


class PipelineSettings(_Section, frozen=True):
    """Where and how the transformer and the VAE run. An empty `vae_device` means that of the transformer."""

    device: Device = "auto"
    vae_device: DeviceOrNone = ""
    torch_dtype: DType = "bfloat16"
    quantization: Quantization = "none"
    weights_file: str = ""
    vae_weights_file: str = ""


class GenerationSettings(_Section, frozen=True):
    """What a request gets where it is silent."""

    height: Side = 1024
    width: Side = 1024
    num_inference_steps: Steps = 8
    guidance_scale: GuidanceScale = 0.0


class SchedulerSettings(_Section, frozen=True):
    """The flow-matching schedule."""

    shift: Shift = 3.0


class PytorchSettings(_Section, frozen=True):
    """How the model is executed."""

    attention_backend: Literal["auto", "flash_attn_2", "flash_attn_3", "sage", "xformers", "sdpa"] = "auto"
    use_custom_scheduler: bool = False
    tiled_vae: bool = False
    tile_size: Annotated[int, Meta(ge=128, le=8192, multiple_of=16)] = 512
    tile_overlap: Annotated[int, Meta(ge=0, le=4096, multiple_of=8)] = 64
    long_prompt_mode: LongPromptMode = "interpolate"
    batch_size: Annotated[int, Meta(ge=1, le=16)] = 1
    cpu_offload: bool = False
    cpu_offload_unit: Literal["network", "block"] = "block"
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    embedding_cache: bool = True
    embedding_cache_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024**2


class DypeSettings(_Section, frozen=True):
    """Dynamic position extrapolation, for pictures far above the trained size."""

    enabled: bool = False
    method: DypeMethod = "vision_yarn"
    dype_scale: DypeScale = 2.0
    dype_exponent: DypeExponent = 2.0
    start_sigma: DypeStart = 1.0
    base_resolution: BaseResolution = 1024
    anisotropic: bool = False
    dynamic: bool = True

    @property
    def parts(self) -> Dype:
        """As a request says it."""
        return Dype(
            method=self.method,
            scale=self.dype_scale,
            exponent=self.dype_exponent,
            start_sigma=self.start_sigma,
            base_resolution=self.base_resolution,
            anisotropic=self.anisotropic,
            dynamic=self.dynamic,
        )


class SlgSettings(_Section, frozen=True):
    """Skip layer guidance."""

    enabled: bool = False
    scale: SlgScale = 2.5
    layers: LayerIndices = (7, 8, 9, 10, 11, 12)
    start: PartOfSteps = 0.05
    stop: PartOfSteps = 0.5

    def __post_init__(self) -> None:
        if self.start >= self.stop:
            raise ValueError(f"stop has to be above start, {self.start}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("layers names one twice")

    @property
    def parts(self) -> SkipLayerGuidance:
        """As a request says it."""
        return SkipLayerGuidance(scale=self.scale, layers=self.layers, start=self.start, stop=self.stop)


class LoraSettings(_Section, frozen=True):
    """LoRA files fused for every picture, and the library that requests choose from."""

    paths: tuple[str, ...] = ()
    scales: tuple[LoraScale, ...] = ()
    folder: str = ""
    cache_bytes: Annotated[int, Meta(ge=0)] = 1024**3
    max_bytes: Annotated[int, Meta(ge=1)] = 1024**3


class DatabaseSettings(_Section, frozen=True):
    """The durable record. An empty `url` means SQLite in `data_dir`."""

    url: str = ""
    pool_size: Annotated[int, Meta(ge=1, le=200)] = 10


class BrokerSettings(_Section, frozen=True):
    """The doorbell. An empty `url` means a folder in `data_dir` (one host only)."""

    url: str = ""


class StorageSettings(_Section, frozen=True):
    """Where pictures lie. An empty `bucket` means a folder in `data_dir`, served by the API with signed links."""

    bucket: str = ""
    endpoint_url: str = ""
    public_endpoint_url: str = ""
    region: str = "us-east-1"
    access_key_id: str = ""
    secret_access_key: str = ""
    addressing_style: Literal["path", "virtual", "auto"] = "path"
    link_expiry_s: Annotated[int, Meta(ge=1, le=604_800)] = 3600
    link_key: str = ""


class ServerSettings(_Section, frozen=True):
    """The HTTP API. With no `api_keys` only callers on the loopback interface are let in."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 8000
    public_url: str = ""
    api_keys: dict[Annotated[str, Meta(min_length=1, max_length=100)], Annotated[str, Meta(min_length=1)]] = {}
    admin_key: str = ""
    shutdown_grace_s: Annotated[int, Meta(ge=1)] = 10


class JobsSettings(_Section, frozen=True):
    """How jobs are kept alive, retried and kept."""

    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    lease_s: Seconds = 30.0
    retry_delay_s: Delay = 2.0
    retention_s: Seconds = 30 * 86_400.0
    input_retention_s: Seconds = 86_400.0
    split_encoding: bool = False

    @property
    def first_stage(self) -> Stage:
        """Where a job begins."""
        return Stage.ENCODE if self.split_encoding else Stage.GENERATE


class WorkerSettings(_Section, frozen=True):
    """A worker. `upkeep` = false leaves clock work to `python -m worker.upkeep`."""

    stages: Annotated[tuple[Stage, ...], Meta(min_length=1)] = tuple(Stage)
    upkeep: bool = True
    upkeep_interval_s: Seconds = 1.0
    progress_interval_s: Seconds = 0.25
    shutdown_grace_s: Annotated[float, Meta(ge=0)] = 60.0
    upload_backlog: Annotated[int, Meta(ge=1, le=64)] = 4
    upload_retry_s: Annotated[float, Meta(ge=0)] = 300.0


class WebhooksSettings(_Section, frozen=True):
    """How callers are told. `allow_private_addresses` also permits plain http, for development."""

    secret: str = ""
    timeout_s: Seconds = 20.0
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 8
    allow_private_addresses: bool = False
    retry_schedule_s: tuple[Delay, ...] = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)


class LogSettings(_Section, frozen=True):
    """Structured logs on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "console"


class Settings(_Section, frozen=True):
    """Everything that an operator can choose."""

    profile: str = "default"
    model_path: str = "Tongyi-MAI/Z-Image-Turbo"
    templates_dir: str = "templates/z_image"
    more_templates_dirs: tuple[str, ...] = ()
    data_dir: str = "var"
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    pytorch: PytorchSettings = field(default_factory=PytorchSettings)
    dype: DypeSettings = field(default_factory=DypeSettings)
    slg: SlgSettings = field(default_factory=SlgSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    limits: RequestLimits = field(default_factory=RequestLimits)
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    jobs: JobsSettings = field(default_factory=JobsSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    webhooks: WebhooksSettings = field(default_factory=WebhooksSettings)
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """The part of a request that the operator fills in."""
        return GenerationDefaults(
            width=self.generation.width,
            height=self.generation.height,
            steps=self.generation.num_inference_steps,
            shift=self.scheduler.shift,
            guidance_scale=self.generation.guidance_scale,
            hidden_layer=self.encoder.hidden_layer,
            long_prompt_mode=self.pytorch.long_prompt_mode,
            tiled_vae=self.pytorch.tiled_vae,
            slg=self.slg.parts if self.slg.enabled else None,
            slg_parts=self.slg.parts,
            dype=self.dype.parts if self.dype.enabled else None,
            dype_parts=self.dype.parts,
        )

    @property
    def data_path(self) -> Path:
        """The folder of everything this host keeps; relative ones lie in the source tree."""
        return TREE / self.data_dir

    @property
    def templates_paths(self) -> tuple[Path, ...]:
        """The folders of prompt templates; a later one's template takes the place of an earlier one's of its name."""
        return tuple(TREE / folder for folder in (self.templates_dir, *self.more_templates_dirs))

    @property
    def model_location(self) -> str:
        """The checkpoint's folder as an absolute path where there is one, else the hub id as written."""
        folder = TREE / self.model_path
        return str(folder) if folder.is_dir() else self.model_path

    @property
    def encoder_weights(self) -> Path | None:
        """The single file of the text encoder's weights, if any."""
        return TREE / self.encoder.weights_file if self.encoder.weights_file else None

    @property
    def dit_weights(self) -> Path | None:
        """The single file of the transformer's weights, if any."""
        return TREE / self.pipeline.weights_file if self.pipeline.weights_file else None

    @property
    def vae_weights(self) -> Path | None:
        """The single file of the VAE's weights, if any."""
        return TREE / self.pipeline.vae_weights_file if self.pipeline.vae_weights_file else None

    @property
    def lora_path(self) -> Path | None:
        """The folder of LoRAs that requests may name, if any."""
        return TREE / self.lora.folder if self.lora.folder else None

    @property
    def fused_loras(self) -> list[tuple[Path, float]]:
        """The LoRAs of every picture, with their scales. Raises `ConfigurationError` where there are not as many."""
        scales = self.lora.scales or (1.0,) * len(self.lora.paths)
        if len(scales) != len(self.lora.paths):
            raise ConfigurationError(
                f"lora.scales: {len(scales)} scales for {len(self.lora.paths)} files; give one for each, or none"
            )
        return [(TREE / path, scale) for path, scale in zip(self.lora.paths, scales, strict=True)]

    @property
    def database_url(self) -> str:
        """SQLAlchemy's URL."""
        return self.database.url or f"sqlite:///{self.data_path / 'zimage.db'}"

    @property
    def public_url(self) -> str:
        """Where callers reach the API, without a slash at the end."""
        host = f"[{self.server.host}]" if ":" in self.server.host else self.server.host
        return (self.server.public_url or f"http://{host}:{self.server.port}").rstrip("/")


def load_settings(
    environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None, file: Path | None = None
) -> Settings:
    """Settings of this process.

    `overrides` are dotted keys of the command line (`{"server.port": 9000}`); `file` is `--config`, before
    ZIMAGE_CONFIG, before `config/config.toml`. The profile is `overrides["profile"]`, before ZIMAGE_PROFILE, before
    `default`.
    Raises `ConfigurationError` for an unreadable file, an unknown key or profile (naming the nearest valid one) and a
    value out of bounds.
    """
    sources = _Sources.read(environment, overrides or {}, file)
    tree: dict[str, Any] = {"profile": sources.profile}
    for _name, table in sources.tables:
        _merge(tree, table)
    for name, value in _from_environment(environment):
        _set(tree, name, value, f"environment variable {ENVIRONMENT_PREFIX}{name.upper().replace('.', '__')}")
    for name, value in sources.given.items():
        _set(tree, name, value, f"option {name}")
    return _checked(tree, sources.path, sources.profile)


def setting_origins(
    environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None, file: Path | None = None
) -> dict[str, str]:
    """Where the value of each setting comes from, for a person who wonders: `default`, a table of the file,
    `environment` or `flag`.

    Takes what `load_settings` takes, and is meant for what that has accepted.
    """
    sources = _Sources.read(environment, overrides or {}, file)
    origins = dict.fromkeys(setting_names(), "default")
    for profile, table in sources.tables:
        origins |= {name: f"{sources.path.name} [{profile}]" for name in origins if _holds(table, name)}
    origins |= {name: "environment" for name, _value in _from_environment(environment)}
    return origins | dict.fromkeys(sources.given, "flag")


def profile_names(environment: Mapping[str, str], file: Path | None = None) -> list[str]:
    """The profiles of the settings file, in its order. Raises `ConfigurationError` as `load_settings` does."""
    return list(_read(_path(environment, file)))


def overrides_from_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """`server.port=9000 profile=demo` of a command line as overrides. Raises `ConfigurationError` for anything else."""
    overrides: dict[str, str] = {}
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not separator:
            raise ConfigurationError(f"`{argument}`: settings are given as name=value, as in server.port=9000")
        overrides[name] = value
    return overrides


def setting_names() -> dict[str, Any]:
    """Every key as a dotted name with its type, for documentation and for near matches."""
    names: dict[str, Any] = {}
    for name, kind in get_type_hints(Settings, include_extras=True).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            names |= {f"{name}.{key}": hint for key, hint in get_type_hints(kind, include_extras=True).items()}
        else:
            names[name] = kind
    del names["profile"]
    return names


def setting_value(name: str, value: Any, origin: str) -> Any:
    """A value as the setting `name` has it; text is read as the environment's is.

    Raises `ConfigurationError`, which begins with `origin`.
    """
    names = setting_names()
    kind = names.get(name)
    if kind is None:
        raise ConfigurationError(f"{origin} is not a setting{_nearest(name, list(names))}")
    if isinstance(value, str):
        value = _from_text(value, kind)
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as fault:
        raise ConfigurationError(f"{origin}: {said_plainly(str(fault))}") from fault
    return value


@dataclass(frozen=True, slots=True)
class _Sources:
    """What settings are read from: the profile's tables of the file, lowest first, and the command line's keys."""

    path: Path
    profile: str
    tables: tuple[tuple[str, dict[str, Any]], ...]
    given: dict[str, Any]

    @classmethod
    def read(cls, environment: Mapping[str, str], overrides: Mapping[str, Any], file: Path | None) -> "_Sources":
        given = dict(overrides)
        path = _path(environment, file)
        profiles = _read(path)
        profile = str(given.pop("profile", None) or environment.get("ZIMAGE_PROFILE") or "default")
        if profile != "default" and profile not in profiles:
            known = [*profiles, "default"]
            raise ConfigurationError(f"{path}: there is no profile `{profile}`{_nearest(profile, known)}")
        for name, table in profiles.items():
            _refuse_unknown(table, f"{path}: [{name}]")
        names = dict.fromkeys(["default", profile])
        return cls(path, profile, tuple((name, profiles.get(name, {})) for name in names), given)


def _path(environment: Mapping[str, str], file: Path | None) -> Path:
    return file or Path(environment.get("ZIMAGE_CONFIG") or TREE / "config" / "config.toml")


def _holds(table: Mapping[str, Any], name: str) -> bool:
    section, _, key = name.rpartition(".")
    return key in (table.get(section, {}) if section else table)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise ConfigurationError(f"{path}: cannot be read: {fault.strerror}") from fault
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ConfigurationError(f"{path}: is not valid TOML: {fault}") from fault
    for name, table in content.items():
        if not isinstance(table, dict):
            raise ConfigurationError(f"{path}: `{name}` stands outside a profile; write it below [default]")
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
    """Text of the environment: itself where the setting is text, else read as TOML reads a value."""
    try:
        msgspec.convert(text, kind)
        return text
    except msgspec.ValidationError:
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
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
                raise ConfigurationError(f"{origin}: `{name}` has to be a table")
            for key in cast(dict[str, Any], value):
                if f"{name}.{key}" not in names:
                    raise ConfigurationError(
                        f"{origin}: `{name}.{key}` is not a setting{_nearest(f'{name}.{key}', list(names))}"
                    )
        elif name not in names:
            raise ConfigurationError(f"{origin}: `{name}` is not a setting{_nearest(name, [*names, *sections])}")


def _checked(tree: dict[str, Any], path: Path, profile: str) -> Settings:
    try:
        return msgspec.convert(tree, Settings)
    except msgspec.ValidationError as fault:
        _, _, where = str(fault).partition(" - at ")
        name = where.strip("`").removeprefix("$.")
        raise ConfigurationError(f"{path} (profile {profile}): `{name}`: {said_plainly(str(fault))}") from fault


def _nearest(name: str, known: list[str]) -> str:
    """The close match by whole name, else by the key alone (a right key in a wrong section)."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        by_key = {entry.rpartition(".")[2]: entry for entry in known}
        near = [by_key[key] for key in difflib.get_close_matches(name.rpartition(".")[2], list(by_key), n=1)]
    return f"; did you mean `{near[0]}`?" if near else ""
