"""The settings as one frozen tree: sections, keys with their bounds, and values derived from them.

Pass functions the smallest part that they need. Does not know where the values come from (`sources`).
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, field

from zcore.choices import (
    TILE_OVERLAP_PX,
    TILE_SIZE_PX,
    AttentionBackend,
    BatchSize,
    CacheBytes,
    CompileMode,
    Device,
    DeviceOrNone,
    DTypeName,
    OffloadUnit,
    Quantization,
    TileOverlap,
    TileSize,
)
from zcore.errors import ConfigurationError
from zcore.request import (
    PUBLISHED,
    BaseResolution,
    Dype,
    DypeExponent,
    DypeMethod,
    DypeScale,
    DypeStart,
    GenerationDefaults,
    GuidanceScale,
    HiddenLayer,
    LongPromptMode,
    LoraScale,
    RequestLimits,
    Shift,
    Side,
    SkipLayerGuidance,
    Steps,
)
from zcore.stages import Stage

TREE = Path(__file__).resolve().parents[2]

Seconds = Annotated[float, Meta(gt=0, le=1_000_000_000)]
ApiKeys = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=100)], Annotated[str, Meta(min_length=1)]],
    Meta(extra={"allowed": 'a table of owners and their keys, such as { anna = "..." }'}),
]
Network = Annotated[
    str, Meta(pattern=r"^[0-9A-Fa-f.:]+(/\d{1,3})?$", description="an IP address or a network such as 10.0.0.0/8")
]
Delay = Annotated[float, Meta(ge=0, le=86_400)]


def is_loopback(host: str) -> bool:
    """Return whether this is `localhost` or a loopback address, without brackets."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the sections: one table of the file each."""


class EncoderSettings(_Section, frozen=True):
    """Device, dtype and weights of the text encoder."""

    device: Device = "auto"
    torch_dtype: DTypeName = "bfloat16"
    hidden_layer: HiddenLayer = PUBLISHED.hidden_layer
    quantization: Quantization = "none"
    weights_file: str = ""


class PipelineSettings(_Section, frozen=True):
    """Device, dtype and weights of the transformer and the VAE; an empty `vae_device` is the transformer's."""

    device: Device = "auto"
    vae_device: DeviceOrNone = ""
    torch_dtype: DTypeName = "bfloat16"
    quantization: Quantization = "none"
    weights_file: str = ""
    vae_weights_file: str = ""


class GenerationSettings(_Section, frozen=True):
    """Defaults of fields that a request omits."""

    height: Side = PUBLISHED.height
    width: Side = PUBLISHED.width
    num_inference_steps: Steps = PUBLISHED.steps
    guidance_scale: GuidanceScale = PUBLISHED.guidance_scale


class SchedulerSettings(_Section, frozen=True):
    """The flow-matching schedule; a `shift` of None leaves the choice to the checkpoint."""

    shift: Shift | None = None


class PytorchSettings(_Section, frozen=True):
    """How the model is executed."""

    attention_backend: AttentionBackend = "auto"
    use_custom_scheduler: bool = False
    tiled_vae: bool = PUBLISHED.tiled_vae
    tile_size: TileSize = TILE_SIZE_PX
    tile_overlap: TileOverlap = TILE_OVERLAP_PX
    long_prompt_mode: LongPromptMode = PUBLISHED.long_prompt_mode
    batch_size: BatchSize = 1
    cpu_offload: bool = False
    cpu_offload_unit: OffloadUnit = "block"
    compile: bool = False
    compile_mode: CompileMode = "default"
    embedding_cache: bool = True
    embedding_cache_bytes: CacheBytes = 256 * 1024**2


class DypeSettings(_Section, frozen=True):
    """Dynamic position extrapolation, for images far above the trained resolution."""

    enabled: bool = False
    method: DypeMethod = Dype().method
    dype_scale: DypeScale = Dype().scale
    dype_exponent: DypeExponent = Dype().exponent
    start_sigma: DypeStart = Dype().start_sigma
    base_resolution: BaseResolution = Dype().base_resolution
    anisotropic: bool = Dype().anisotropic
    dynamic: bool = Dype().dynamic

    @property
    def as_request(self) -> Dype:
        """The same values as a request holds them."""
        return Dype(
            method=self.method,
            scale=self.dype_scale,
            exponent=self.dype_exponent,
            start_sigma=self.start_sigma,
            base_resolution=self.base_resolution,
            anisotropic=self.anisotropic,
            dynamic=self.dynamic,
        )


class SlgSettings(SkipLayerGuidance, frozen=True):
    """Skip layer guidance: the fields of a request's `slg`, and whether requests without one get it."""

    enabled: bool = False

    @property
    def as_request(self) -> SkipLayerGuidance:
        """The same values as a request holds them."""
        return SkipLayerGuidance(scale=self.scale, layers=self.layers, start=self.start, stop=self.stop)


class LoraSettings(_Section, frozen=True):
    """LoRA files fused into the model for every image, and the folder of those that requests may name."""

    paths: tuple[str, ...] = ()
    scales: tuple[LoraScale, ...] = ()
    folder: str = ""
    cache_bytes: CacheBytes = 1024**3
    max_bytes: Annotated[int, Meta(ge=1)] = 1024**3


class ImageFilesSettings(_Section, frozen=True):
    """What image files contain for other programs; without `c2pa_certificate` they are not signed."""

    digital_source_type: bool = True
    parameters_text: bool = True
    c2pa_certificate: str = ""
    c2pa_key: str = ""


class DatabaseSettings(_Section, frozen=True):
    """The database of jobs; an empty `url` means SQLite in `data_dir`."""

    url: str = ""
    pool_size: Annotated[int, Meta(ge=1, le=200)] = 8


class BrokerSettings(_Section, frozen=True):
    """The broker that notifies workers; an empty `url` means a folder in `data_dir`, for one host only."""

    url: str = ""


class StorageSettings(_Section, frozen=True):
    """Storage of images; an empty `bucket` means a folder in `data_dir`, served by the API through signed links."""

    bucket: str = ""
    endpoint_url: str = ""
    public_endpoint_url: str = ""
    region: str = "us-east-1"
    access_key_id: str = ""
    secret_access_key: str = ""
    addressing_style: Literal["path", "virtual", "auto"] = "path"
    link_expiry_s: Annotated[int, Meta(ge=1, le=604_800)] = 3600
    link_key: str = ""
    sweep_min_age_s: Annotated[float, Meta(ge=3600)] = 86_400.0


class ServerSettings(_Section, frozen=True):
    """The HTTP API; without `api_keys` one is generated, unless it is `keyless`."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 8000
    public_url: str = ""
    api_keys: ApiKeys = {}
    keyless: bool = False
    admin_key: str = ""
    trusted_proxies: tuple[Network, ...] = ()
    drain_s: Annotated[float, Meta(ge=0)] = 5.0
    shutdown_grace_s: Annotated[int, Meta(ge=1)] = 10
    head_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 30.0
    min_body_bytes_per_s: Annotated[int, Meta(ge=1)] = 4096
    max_connections: Annotated[int, Meta(ge=1)] = 500

    @property
    def is_local(self) -> bool:
        """Whether `host` is a loopback address, which only this machine reaches."""
        return is_loopback(self.host)


class JobsSettings(_Section, frozen=True):
    """Leases, retries and retention of jobs."""

    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    lease_s: Seconds = 30.0
    retry_delay_s: Delay = 2.0
    attempt_deadline_s: Seconds = 21_600.0
    retention_s: Seconds = 30 * 86_400.0
    input_retention_s: Seconds = 86_400.0
    history_s: Annotated[float, Meta(ge=0, le=1_000_000_000)] = 90 * 86_400.0
    split_encoding: bool = False

    @property
    def first_stage(self) -> Stage:
        """The stage at which a new job starts."""
        return Stage.ENCODE if self.split_encoding else Stage.GENERATE


class WorkerSettings(_Section, frozen=True):
    """Settings of a worker; without `maintenance`, `python -m worker maintenance` has to run somewhere."""

    stages: Annotated[tuple[Stage, ...], Meta(min_length=1)] = tuple(Stage)
    maintenance: bool = False
    maintenance_interval_s: Seconds = 1.0
    progress_interval_s: Seconds = 1.0
    stall_floor_s: Seconds = 1800.0
    stall_factor: Annotated[float, Meta(ge=1, le=1000)] = 20.0
    shutdown_grace_s: Annotated[float, Meta(ge=0)] = 60.0
    upload_backlog: Annotated[int, Meta(ge=1, le=64)] = 4
    upload_retry_s: Annotated[float, Meta(ge=0)] = 300.0


class WebhooksSettings(_Section, frozen=True):
    """Webhook delivery; `allow_private_addresses` also permits plain http, for development."""

    secret: str = ""
    timeout_s: Seconds = 20.0
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 8
    allow_private_addresses: bool = False
    denied_networks: tuple[Network, ...] = ()
    retry_schedule_s: tuple[Delay, ...] = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)


class LogSettings(_Section, frozen=True):
    """Structured logs on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "console"] = "console"


class Settings(_Section, frozen=True):
    """All settings of an installation."""

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
    image_files: ImageFilesSettings = field(default_factory=ImageFilesSettings)
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    jobs: JobsSettings = field(default_factory=JobsSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    webhooks: WebhooksSettings = field(default_factory=WebhooksSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def generation_defaults(self, shift: float | None) -> GenerationDefaults:
        """Return the defaults of requests; a `shift` of None is that of the published checkpoint.

        `zcore.checkpoint.defaults.generation_defaults` determines the shift to pass.
        """
        return GenerationDefaults(
            width=self.generation.width,
            height=self.generation.height,
            steps=self.generation.num_inference_steps,
            shift=PUBLISHED.shift if shift is None else shift,
            guidance_scale=self.generation.guidance_scale,
            hidden_layer=self.encoder.hidden_layer,
            long_prompt_mode=self.pytorch.long_prompt_mode,
            tiled_vae=self.pytorch.tiled_vae,
            slg=self.slg.as_request if self.slg.enabled else None,
            slg_fields=self.slg.as_request,
            dype=self.dype.as_request if self.dype.enabled else None,
            dype_fields=self.dype.as_request,
        )

    @property
    def data_path(self) -> Path:
        """The data folder of this host; a relative `data_dir` is below the source tree."""
        return TREE / self.data_dir

    @property
    def templates_paths(self) -> tuple[Path, ...]:
        """The folders of prompt templates; a template of a later folder replaces one of the same name."""
        return tuple(TREE / folder for folder in (self.templates_dir, *self.more_templates_dirs))

    @property
    def model_location(self) -> str:
        """The checkpoint's folder as an absolute path if it exists, else the hub id as configured."""
        folder = TREE / self.model_path
        return str(folder) if folder.is_dir() else self.model_path

    @property
    def encoder_weights(self) -> Path | None:
        """The single file with the text encoder's weights, if configured."""
        return TREE / self.encoder.weights_file if self.encoder.weights_file else None

    @property
    def dit_weights(self) -> Path | None:
        """The single file with the transformer's weights, if configured."""
        return TREE / self.pipeline.weights_file if self.pipeline.weights_file else None

    @property
    def vae_weights(self) -> Path | None:
        """The single file with the VAE's weights, if configured."""
        return TREE / self.pipeline.vae_weights_file if self.pipeline.vae_weights_file else None

    @property
    def lora_path(self) -> Path | None:
        """The folder of LoRAs that requests may name, if configured."""
        return TREE / self.lora.folder if self.lora.folder else None

    @property
    def fused_loras(self) -> list[tuple[Path, float]]:
        """The LoRAs of every image, with their scales. Raises `ConfigurationError` if only some files have a scale."""
        scales = self.lora.scales or (1.0,) * len(self.lora.paths)
        if len(scales) != len(self.lora.paths):
            raise ConfigurationError(
                f"lora.scales: must have one scale per file ({len(self.lora.paths)}) or be empty, not {len(scales)}"
            )
        return [(TREE / path, scale) for path, scale in zip(self.lora.paths, scales, strict=True)]

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the database."""
        return self.database.url or f"sqlite:///{self.data_path / 'zimage.db'}"

    @property
    def public_url(self) -> str:
        """The URL at which callers reach the API, without a trailing slash."""
        host = f"[{self.server.host}]" if ":" in self.server.host else self.server.host
        return (self.server.public_url or f"http://{host}:{self.server.port}").rstrip("/")
