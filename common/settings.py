"""Every setting of every process, in one frozen object that is checked once.

Precedence: command line (`--set section.name=value`) > environment (`CHORUS_SECTION_NAME`) > file (`chorus.toml`, or
the one that `CHORUS_CONFIG` names) > default. Names are the same everywhere: `service.listen` is
`CHORUS_SERVICE_LISTEN`.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from common.errors import StartupError


def _check_address(address: str) -> str:
    if not address.startswith("unix:") and not _is_host_port(address):
        raise ValueError("must be HOST:PORT or unix:PATH")
    return address


def _check_http_address(address: str) -> str:
    if not _is_host_port(address):
        raise ValueError("must be HOST:PORT")
    return address


def _is_host_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdecimal() and int(port) < 65536


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches a listener there."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def _check_backends(backends: str) -> str:
    addresses = [address.strip() for address in backends.split(",")]
    if len(addresses) > 1:
        if not all(_IPV4_PORT.fullmatch(address) for address in addresses):
            raise ValueError("several services must each be an IPv4 address and a port; a name stands alone")
    elif not _TARGET.fullmatch(addresses[0]):
        raise ValueError("must be HOST:PORT, several of them, or a gRPC target such as dns:///name:port")
    return backends


_IPV4_PORT = re.compile(r"(localhost|\d{1,3}(\.\d{1,3}){3}):\d{1,5}")
_TARGET = re.compile(r"\S+:\d{1,5}|(unix|dns|ipv4|ipv6|xds):\S+")

Address = Annotated[str, AfterValidator(_check_address)]
HttpAddress = Annotated[str, AfterValidator(_check_http_address)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LogSettings(Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"
    """`auto`: for people on a terminal, JSON elsewhere."""


class LimitSettings(Section):
    """What a caller may ask for at most."""

    text_characters: Count = 5000
    unary_audio_seconds: PositiveSeconds = 60.0
    message_bytes: Count = 4 * 1024 * 1024
    concurrent_calls: Count = 2000
    """Calls in one process at once; more are refused."""
    deadline_default: PositiveSeconds = 60.0
    """Seconds that a call without a deadline gets."""
    deadline_max: PositiveSeconds = 3600.0
    """A longer deadline is cut to this."""
    encoder_load: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.75
    """The share of its cores that a process's encoders may need, all at the pace of real time; more are refused."""


class TlsSettings(Section):
    """Encryption between callers, gateways and services. Files are PEM; each process has settings of its own."""

    certificate: Path | None = None
    key: Path | None = None
    """What this process shows: to its callers and, as a gateway, to services. Without it nothing is encrypted."""
    callers_ca: Path | None = None
    """Who signs the certificates of callers. With it, callers without one are not let in (mutual TLS)."""
    services_ca: Path | None = None
    """For gateways: who signs the certificates of services. With it, gateways speak TLS to them."""
    services_name: str | None = None
    """For gateways: the name in the services' certificates, where it is not the one that they are called by."""


class ServiceSettings(Section):
    """The process that owns an engine."""

    listen: Address = "127.0.0.1:50061"
    advertise: Address | None = None
    """Where gateways reach this service, if it is not where it listens."""
    allow_direct: bool = False
    """Let callers from other machines go round the gateway. From this machine they may."""
    metrics_listen: HttpAddress = "127.0.0.1:9461"
    drain_seconds: Seconds = 5.0
    """After SIGTERM: how long calls are still accepted while balancers notice."""
    grace_seconds: Seconds = 60.0
    """Then: how long running calls may take to finish."""


class GatewaySettings(Section):
    """The process that callers talk to."""

    listen: Address = "127.0.0.1:50051"
    tenants: Path | None = None
    """A file with the tenants: their keys and limits, see docs/tenants.md. Without it nobody needs a key."""
    allow_anonymous: bool = False
    """Listen to other machines too, although nobody needs a key."""
    reflection: bool = True
    """Tell what services and messages there are."""
    reflection_needs_key: bool = False
    health_needs_key: bool = False
    """For callers that may not even know whether anybody is there."""
    metrics_listen: HttpAddress = "127.0.0.1:9451"
    backends: Annotated[str, AfterValidator(_check_backends)] = "127.0.0.1:50061"
    """Services: `HOST:PORT`, several separated by commas, or one target that gRPC resolves, such as `dns:///name:port`."""
    deadline_margin: Seconds = 0.05
    """Seconds kept back from the caller's deadline for the way back."""
    drain_seconds: Seconds = 5.0
    """After SIGTERM: how long calls are still accepted while balancers notice."""
    grace_seconds: Seconds = 60.0
    """Then: how long running calls may take to finish."""


class CacheSettings(Section):
    """Speeches that were made, for those who ask again."""

    enabled: bool = True
    memory_bytes: Count = 256 * 1024 * 1024
    """In each gateway."""
    seconds: PositiveSeconds = 86_400.0
    """How long a speech is kept, a tenth more or less."""
    inline_bytes: Count = 512 * 1024
    """What is larger lies in the object store; a segment that is larger in its service's memory only."""
    segment_bytes: Count = 64 * 1024 * 1024
    """In each service's memory: segments of texts that are spoken while they are written."""


class FlightSettings(Section):
    """Speeches that are being made, and heard by all who ask for the same."""

    linger_seconds: Seconds = 2.0
    """A speech goes on so long after its last caller has left, in case somebody comes."""
    kept_seconds: Seconds = 2.0
    """A speech that has ended can be heard so long from where it was made, until it is in every cache."""
    bytes: Count = 256 * 1024 * 1024
    """Of audio that may be held for those who come late; beyond it each caller gets a speech of its own."""


class LimiterSettings(Section):
    """How much all callers together may ask for. What each tenant may is in the tenants' file."""

    mode: Literal["on", "shadow", "off"] = "on"
    """`shadow`: what would be refused is counted, and let through."""
    requests_per_second: PositiveSeconds | None = 600.0
    requests_burst: PositiveSeconds | None = None
    """Requests that may come at once. Default: those of a second."""
    audio_seconds_per_second: PositiveSeconds | None = None
    audio_seconds_burst: PositiveSeconds | None = None
    """Default: the audio seconds of a second."""
    interactive_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """The share of each burst that batch work leaves to interactive calls."""
    gateways: Count = 1
    """Gateways that there are: while the store is away, each lets through its share."""
    leasing: bool = True
    """Gateways take tokens in blocks. Off: each call asks the store."""


class StoreSettings(Section):
    """The Redis or Valkey servers that gateways share. Without URLs `chorus up` starts one of its own."""

    ledger: SecretStr | None = None
    """URL of the server that must not forget: limits, idempotency keys. `redis://`, `rediss://` or `unix://`."""
    cache: SecretStr | None = None
    """URL of the server that may forget: results. Default: the ledger."""
    budget: PositiveSeconds = 0.02
    """Seconds that a call waits for an answer; then it goes on without."""
    folder: Path | None = None
    """Where what must not be lost lies on disk, if there is no other place. Default: `chorus` in the user's state."""
    objects: str | None = None
    """URL of the place for what is large: `file:///folder`, `s3://bucket/prefix`. Default: in `store.folder`."""
    tls_ca: Path | None = None
    """For `rediss://`: who signs the server's certificate. Default: the system's authorities."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    """What we show to a server that wants to know its clients."""

    @property
    def state(self) -> Path:
        """The folder in effect."""
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return self.folder or home / "chorus"

    @property
    def objects_url(self) -> str:
        """The place in effect."""
        return self.objects or (self.state.absolute() / "objects").as_uri()


class BatcherSettings(Section):
    """How requests wait, join and are delivered."""

    mode: Literal["continuous", "static"] = "continuous"
    """`static`: rows of similar length start together and nobody joins until all have ended, for comparison."""
    static_wait: Seconds = 0.05
    """How long a static batch waits until it is full."""
    max_waiting: Count = 1000
    """Requests that wait for a slot; more are refused."""
    max_delay: PositiveSeconds = 2.0
    """Seconds of work that may lie before the engine; a request that would make it more is refused."""
    max_parked: Count = 1024
    """Rows that have ended and whose readers are slow; with more of them nobody is admitted."""
    first_audio_limit: PositiveSeconds = 10.0
    """Seconds that a stream may wait for its first audio; one that would wait longer is refused."""
    interactive_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """The share of the rows that batch work leaves to interactive calls."""
    patience: PositiveSeconds = 2.0
    """After so many seconds a waiting call comes before streams that arrive later."""
    first_audio_patience: PositiveSeconds = 0.1
    """The same for streams, among themselves and before all others."""
    batch_patience: PositiveSeconds = 30.0
    """So many seconds later than interactive calls is batch work due."""
    reserve: PositiveSeconds = 1.0
    """Seconds of audio that a listener should have before the next is made."""
    first_block_steps: Count = 8
    """A row's first samples are made when so many steps are done; later blocks are longer …"""
    block_steps: Count = 24
    """… up to this."""
    max_attempts: Count = 3
    """How often a row is tried when the engine fails."""
    recovery_seconds: PositiveSeconds = 5.0
    """Seconds to each step back towards full width after the engine ran out of memory."""
    tick_seconds: PositiveSeconds = 0.008
    """How long the steps of one tick should take."""
    max_steps_per_tick: Count = 32
    stream_rows: Count = 2
    """Rows of one stream that may run at once: the current and the next."""
    unary_rows: Count = 8
    """Rows of one unary call or job that may run at once."""
    outbox_seconds: PositiveSeconds = 4.0
    """Audio that may lie ready for a reader who does not read."""
    prefill_tokens: Count = 4096
    """Prompt tokens that may join in one tick."""
    prefill_seconds: PositiveSeconds = 0.1
    """How long their prefill may take while other rows run, whose audio waits meanwhile."""


class EspeakSettings(Section):
    """The engine that speaks without a model."""

    processes: Annotated[int, Field(ge=0)] = 0
    """Synthesisers that run at once; 0: one a core."""


class ChatTTSSettings(Section):
    """The model. Several cards: a service for each, with CUDA_VISIBLE_DEVICES."""

    folder: Path | None = None
    """Weights: the folder that has `asset/gpt/config.json`. Without it they are fetched once, 1.1 GB."""
    cache: Path | None = None
    """Where fetched weights are kept. Default: where the Hugging Face hub's tools keep theirs."""
    check_sums: bool = True
    """Refuse weights other than the published ones."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: a GPU where there is one."""
    dtype: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "auto"
    """What the transformer computes in. `auto`: bf16 where the hardware has it. `int8`: see docs/weights.md."""
    voices: Path | None = None
    """A file in the form of `service/engines/chattts/voices.toml`. Default: that one."""
    slots: Annotated[int, Field(ge=0)] = 0
    """Rows that run at once; 0: as many as there is memory for, up to 32 on a CPU and 256 on a GPU."""
    max_steps: Count = 2048
    """Steps after which a segment is cut, 46.875 a second; it is told (LENGTH)."""
    lookahead_steps: Count | None = None
    """Steps that the vocoder hears ahead. Default: all that matter, 52; fewer are sooner heard and less exact."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads that compute on a CPU; 0: one less than there are cores."""
    stall_seconds: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """An engine that says nothing for so long hangs: it is killed, and the service ends, to be started again."""
    graphs: bool = True
    """On a GPU, record each pass at the start and replay it. Without, passes of few rows take many times as long."""
    kernels: bool = True
    """On a GPU, use kernels of our own between products. Without, torch's operators."""
    deterministic: bool = False
    """A row's tokens never depend on other rows, not even by rounding. Slow: every step is as dear as a full one."""


class ToneSettings(Section):
    """The engine for tests, load and benchmarks: costs and faults by setting. Times are in milliseconds."""

    slots: Count = 64
    step_base_ms: Seconds = 0.0
    step_row_ms: Seconds = 0.0
    step_kv_ms: Seconds = 0.0
    """For each thousand tokens of KV, all rows together."""
    prefill_base_ms: Seconds = 0.0
    """For each group that joins."""
    prefill_token_ms: Seconds = 0.0
    """For each prompt token of a group, padding included."""
    vocode_base_ms: Seconds = 0.0
    """For each tick that vocodes."""
    vocode_step_ms: Seconds = 0.0
    """For each step vocoded."""
    typical_kv: Count = 250
    """Tokens of KV that a row is taken to have where the time of a step is foretold."""
    steps_per_character: Annotated[float, Field(gt=0)] = 10.0
    length_sigma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """How far lengths scatter about what their texts let expect: sigma of a log-normal factor, drawn from the text."""
    lookahead_steps: Annotated[int, Field(ge=0)] = 0
    max_steps: Count = 2048
    trace: Path | None = None
    """A file with a number of steps on each line: the lengths of the rows, in the order in which they join."""
    faults: str = ""
    """Faults to inject, see `service/engines/tone_faults.py`."""
    card: str = "0"
    """Processes that name the same card share its time."""


class Settings(BaseSettings):
    """All settings. Sections are `[name]` in the file and `CHORUS_NAME_…` in the environment."""

    model_config = SettingsConfigDict(
        env_prefix="CHORUS_",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        extra="forbid",
        frozen=True,
    )

    engine: Literal["espeak", "chattts", "tone"] = "espeak"
    debug: bool = False
    """Tell callers what went wrong inside (google.rpc.DebugInfo). Never in production."""
    secret: Annotated[SecretStr, Field(min_length=1)] | None = None
    """What gateways and services share, so that a service knows its gateways. Without it only loopback is trusted."""
    log: LogSettings = LogSettings()
    limits: LimitSettings = LimitSettings()
    tls: TlsSettings = TlsSettings()
    service: ServiceSettings = ServiceSettings()
    gateway: GatewaySettings = GatewaySettings()
    cache: CacheSettings = CacheSettings()
    flights: FlightSettings = FlightSettings()
    limiter: LimiterSettings = LimiterSettings()
    store: StoreSettings = StoreSettings()
    batcher: BatcherSettings = BatcherSettings()
    espeak: EspeakSettings = EspeakSettings()
    chattts: ChatTTSSettings = ChatTTSSettings()
    tone: ToneSettings = ToneSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, then environment, then file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=settings_file())


def settings_file() -> Path:
    """The file that settings are read from; it need not exist."""
    return Path(os.environ.get("CHORUS_CONFIG", "chorus.toml"))


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["service.listen=:1", "debug=true"]` as nested values, in the shape of `Settings`.

    Raises:
        StartupError: an assignment has no `=`, or contradicts one before it.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise StartupError(
                f"--set {assignment}: write it as NAME=VALUE, for example --set service.listen=0.0.0.0:50061"
            )
        *sections, leaf = name.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise StartupError(f"--set {assignment}: {section} has a value already, so it cannot have parts")
        target[leaf] = value
    return values


def load_settings(assignments: Sequence[str] = ()) -> Settings:
    """Reads and checks the settings.

    Raises:
        StartupError: names every setting that is unknown or wrong.
    """
    try:
        return Settings(**parse_assignments(assignments))
    except ValidationError as error:
        faults = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise StartupError(f"these settings are wrong:\n{faults}\n`chorus config` shows all there are") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"{settings_file()} is not TOML: {error}") from None
    except SettingsError as error:
        raise StartupError(f"these settings cannot be read: {error}") from None


def environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, for a process that is to have the same ones."""
    values = json.loads(settings.model_dump_json(exclude={"secret": True, "store": {"ledger", "cache"}}))
    variables: dict[str, str] = {}
    for name, value in values.items():
        leaves = {f"{name}_{leaf}": v for leaf, v in value.items()} if isinstance(value, dict) else {name: value}
        variables |= {f"CHORUS_{leaf.upper()}": str(v) for leaf, v in leaves.items() if v is not None}
    secrets = {"SECRET": settings.secret, "STORE_LEDGER": settings.store.ledger, "STORE_CACHE": settings.store.cache}
    return variables | {f"CHORUS_{name}": value.get_secret_value() for name, value in secrets.items() if value}
