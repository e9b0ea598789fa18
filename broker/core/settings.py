"""The settings: one frozen object, parsed once, every problem reported at once with its key.

Pure: whoever calls `parse` has read the TOML file and hands over the environment. An environment variable
`COMPUTE_BROKER__POOL__DEFAULT__MAX_WORKERS=3` overrides `pool.default.max_workers`; in a variable's name a
pool's dashes are written as underscores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from broker.core import schedule
from broker.core.errors import SettingsError
from broker.core.schedule import Schedule

ENV_PREFIX = "COMPUTE_BROKER__"
DURATION = re.compile(r"(?P<amount>\d+(\.\d+)?(e[+-]?\d+)?)(?P<unit>ms|s|m|h|d)?")
DURATION_SECONDS_MAX = 10 * 365 * 86_400  # no timeout means longer, and tags cannot tell a date after 9999
UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}
LOOPBACK = re.compile(r"127(\.\d{1,3}){3}|localhost|::1")
WARM_MAX = 1000  # nobody keeps more machines idle on purpose
STOCK_LIFETIME_SECONDS_MIN = 3600.0  # three quarters of it for a boot and the wait before a Stop
TAGS_MAX = 40  # EC2 allows 50 on a resource (EC2 user guide, Tag restrictions); ours are seven
TAG_KEY_RESERVED = re.compile(r"compute-broker:.*|aws:.*|Name", re.IGNORECASE)
IMAGES = ("image", "image_arm64")
# What of these a region's table says replaces all that the pool itself says of the group there.
TOGETHER = (
    frozenset({"subnet", "subnets", "zones"}),
    frozenset({"security_group_ids", "security_groups"}),
    frozenset({"user_data", "user_data_file"}),
)


def duration_seconds(value: object) -> float:
    """`"15m"`, `"8h"`, `"500ms"`, `"90"` or a number of seconds → seconds. Raises ValueError."""
    match = DURATION.fullmatch(str(value).strip()) if isinstance(value, str | int | float) else None
    if match is None or isinstance(value, bool):
        raise ValueError('is no duration: write "30s", "15m", "8h" or a number of seconds')
    return float(match["amount"]) * UNIT_SECONDS[match["unit"]]


def _socket_address(value: object) -> str:
    """`"127.0.0.1:9000"`, `"[::1]:9000"`, `":9000"` is refused: say which address is meant."""
    host, separator, port = str(value).rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError('is no address: write "127.0.0.1:9000"')
    return str(value)


def _names(value: object) -> object:
    """One name, or a comma-separated list from an environment variable, stands for a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _words(value: object) -> object:
    return value.split() if isinstance(value, str) else value


def _schedule_table(value: object) -> object:
    """An environment variable holds the table as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError(
            'is no table: write { "Mon-Fri 08:00-19:00 Europe/Berlin" = 2 }, and in an environment variable '
            '{"Mon-Fri 08:00-19:00 Europe/Berlin": 2}'
        ) from None


def _window_text(text: str) -> str:
    schedule.window(text)
    return text


Seconds = Annotated[
    float,
    BeforeValidator(duration_seconds),
    Field(ge=0, le=DURATION_SECONDS_MAX, json_schema_extra={"type": ["string", "number"]}),
]
PositiveSeconds = Annotated[Seconds, Field(gt=0)]
SocketAddress = Annotated[str, BeforeValidator(_socket_address)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
WarmNumber = Annotated[int, Field(ge=0, le=WARM_MAX)]
WarmSchedule = Annotated[
    dict[Annotated[str, AfterValidator(_window_text)], WarmNumber], BeforeValidator(_schedule_table)
]
Budget = Annotated[float | None, Field(ge=0, allow_inf_nan=False)]  # dollars; None: no limit
PoolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]


def require_private(what: str, host: str, insecure_listen: bool) -> None:
    """Refuse to listen beyond loopback by accident. Raises SettingsError, a ValueError to pydantic's eyes."""
    if not insecure_listen and not LOOPBACK.fullmatch(host):
        raise ExposedError(
            [
                f"{what} is reachable from other machines; whoever reaches it can spend your money: "
                "listen on 127.0.0.1 and use an SSH tunnel or a VPN, or say insecure_listen = true when a "
                "firewall decides who may connect"
            ]
        )


class ExposedError(SettingsError, ValueError):
    """the broker would be reachable without authentication"""


class Section(BaseModel):
    """A table of the file: frozen, and a key it does not know is a problem, not a wish ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def split_address(address: str) -> tuple[str, int]:
    """`"[::1]:9000"` → `("::1", 9000)`."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class BrokerSettings(Section):
    """The daemon itself."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,31}$")] = Field(
        "local", description="Names this broker in its machines' tags: one running broker per id."
    )
    state_dir: str = Field(
        "~/.local/state/compute-broker", description="Open orders, leases and local workers are kept here."
    )
    insecure_listen: bool = Field(
        False, description="Allow listening beyond loopback although the protocol has no authentication."
    )
    listen: SocketAddress = Field("127.0.0.1:9000", description="Where clients connect.")
    http: SocketAddress = Field(
        "127.0.0.1:9100", description="Where /metrics, /healthz and /readyz are served."
    )
    connections_max: int = Field(12_000, ge=1, description="More clients than this are told so and closed.")
    line_timeout: PositiveSeconds = Field(
        30.0, description="A command that was begun must be finished within this time."
    )
    silence_timeout: PositiveSeconds = Field(
        3600.0, description="A connection on which nothing happens is closed after this time."
    )
    reconcile_interval: PositiveSeconds = Field(
        30.0, le=300.0, description="How often the cloud is scanned; five minutes at most."
    )
    max_workers: int | None = Field(
        None, ge=0, description="At most this many machines in all pools together, those on order included."
    )
    budget_usd_per_day: Budget = Field(
        None, description="Launches stop when all pools together have spent so much on one day (UTC)."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: JSON unless stderr is a terminal."
    )

    @field_validator("listen", "http")
    @classmethod
    def _no_accidental_exposure(cls, address: str, info: ValidationInfo) -> str:
        host, _ = split_address(address)
        require_private(f'"{address}"', host, bool(info.data.get("insecure_listen")))
        return address


class RegionSettings(Section):
    """What a pool says otherwise in one of its regions; what is not given is as in the pool."""

    image: Annotated[str, Field(min_length=1)] | None = Field(None, description="An AMI id of the region.")
    image_arm64: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="An AMI id of the region, for Arm processors."
    )
    instance_types: Names | None = Field(None, min_length=1, description="What may be bought there.")
    price_usd_per_hour: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="What a running worker costs there."
    )
    security_group_ids: Names | None = Field(None, description="Instead of all security groups of the pool.")
    security_groups: Names | None = Field(None, description="Instead of all security groups of the pool.")
    key_name: str | None = Field(None, description="The SSH key pair there.")
    subnet: str | None = Field(None, description="Instead of the pool's subnet, subnets and zones.")
    subnets: Names | None = Field(None, description="Instead of the pool's subnet, subnets and zones.")
    zones: Names | None = Field(None, description="Instead of the pool's subnet, subnets and zones.")
    instance_profile: str | None = Field(None, description="The instance profile there.")
    user_data: str | None = Field(None, description="The script a machine runs at boot there.")
    user_data_file: str | None = Field(None, description="A file with that script.")

    @field_validator("subnets", "zones")
    @classmethod
    def _one_way_to_say_where(
        cls, names: tuple[str, ...] | None, info: ValidationInfo
    ) -> tuple[str, ...] | None:
        return _one_way(names, info) if names is not None else None

    @field_validator("user_data_file")
    @classmethod
    def _one_script(cls, path: str | None, info: ValidationInfo) -> str | None:
        return _one_script(path, info)

    @property
    def said(self) -> dict[str, Any]:
        """What the table gives."""
        return {key: value for key, value in self if value is not None}

    def replaces(self, key: str) -> bool:
        """Whether what the pool itself says under this key does not count in the region."""
        said = self.said
        return key in said or any(key in group and not group.isdisjoint(said) for group in TOGETHER)


def _one_way(names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    if names and info.data.get("subnet") is not None:
        raise ValueError("subnet lies in one zone and excludes it; name subnets = [...] instead")
    return tuple(dict.fromkeys(names))


def _one_script(path: str | None, info: ValidationInfo) -> str | None:
    if path is not None and info.data.get("user_data") is not None:
        raise ValueError("user_data and user_data_file exclude each other")
    return path


class PoolSettings(Section):
    """A named recipe for workers."""

    model_config = ConfigDict(serialize_by_alias=True)  # `in` is no name in Python

    provider: Literal["local", "ec2"] = Field("local", description="Who makes the workers.")
    worker_port: int = Field(2560, ge=1, le=65535, description="The port clients use on a worker.")
    readiness: Literal["tcp", "running"] = Field(
        "tcp",
        description="tcp: the worker port must accept a connection. running: the cloud's word and an address "
        "are enough (for brokers that cannot reach the workers themselves).",
    )
    readiness_max_age: Seconds = Field(
        1.0,
        description="A hand-out trusts a shown readiness for this long, then the worker port is tried again.",
    )
    sharing: Literal["shared", "exclusive"] = Field(
        "shared", description="shared: everyone gets the same worker. exclusive: one client a worker."
    )
    leases_per_worker_max: int | None = Field(
        None,
        ge=1,
        description="shared: a worker with so many leases is not handed out further, and another is launched "
        "for who waits. Without it one worker serves everybody.",
    )
    idle_timeout: PositiveSeconds = Field(
        900.0, description="A worker that nobody used this long is terminated."
    )
    max_lifetime: PositiveSeconds = Field(
        28800.0, description="A worker this old gets no new clients and is terminated once nobody holds it."
    )
    hard_lifetime: PositiveSeconds | None = Field(
        None,
        description="A worker this old is terminated even while clients hold it; max_lifetime or longer. "
        "Without it no age ends a worker that somebody holds.",
    )
    uses_max: int | None = Field(
        None,
        ge=1,
        description="A worker that was given to so many clients gets no new ones and ends with its last.",
    )
    boot_deadline: PositiveSeconds = Field(
        600.0, description="A machine that is not ready this long after its launch is terminated."
    )
    wait: Seconds = Field(900.0, description="How long GET_WORKER waits when the client does not say.")
    max_workers: int = Field(4, ge=0, description="At most this many machines, the ones on order included.")
    workers_per_client_max: int | None = Field(
        None, ge=1, description="A client that holds so many workers of the pool is refused another one."
    )
    launches_per_hour: int = Field(
        20, ge=0, description="At most this many launch attempts an hour, failed ones too."
    )
    warm: WarmNumber = Field(
        0, description="So many workers are kept ready beyond the ones that are held, within the caps."
    )
    warm_schedule: WarmSchedule = Field(
        {}, description="Numbers that count instead of `warm` at their times; the largest of several."
    )
    warm_stopped: WarmNumber = Field(
        0,
        description='ec2: with market = "on-demand", so many further workers are kept stopped, and started '
        "for who waits. Each costs its disk while it is stopped, and does not count against max_workers.",
    )
    boot_failures_max: int = Field(
        3,
        ge=1,
        description="After so many failed boots in a row launches pause (the image is probably broken).",
    )
    price_usd_per_hour: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="What a running worker of this pool costs. 0: not known, and for ec2 the on-demand list "
        "price is assumed.",
    )
    budget_usd_per_day: Budget = Field(
        None, description="Launches stop when the pool has spent so much on one day (UTC)."
    )

    command: Words = Field(
        (),
        description="local: the program that is a worker; it stays in the foreground. {address}, {port} and "
        "{leash_file} are filled in. Empty: a Tcl evaluator with dserv's framing.",
    )

    region: str | None = Field(None, description="ec2: the region; otherwise the AWS configuration decides.")
    profile: str | None = Field(None, description="ec2: the profile in the AWS configuration files.")
    regions: Names = Field(
        (), description="ec2: several regions instead of `region`, in order of preference."
    )
    region_order: Literal["listed", "latency"] = Field(
        "listed",
        description="ec2: with several regions. listed: the first that has machines. latency: those whose "
        "EC2 endpoint answers the fastest come first.",
    )
    in_: dict[str, RegionSettings] = Field(
        {}, alias="in", description="ec2: what is otherwise in one of the regions, by its name."
    )
    image: str | None = Field(
        None,
        validate_default=True,
        description="ec2: an AMI id, or the name of an SSM parameter that holds one.",
    )
    image_arm64: str | None = Field(
        None,
        description="ec2: the same for those of the instance_types that have Arm processors, such as c7g; "
        "without it `image` is for all.",
    )
    instance_types: Names = Field(
        (), validate_default=True, description="ec2: what may be bought; on demand in this order."
    )
    market: Literal["spot", "on-demand", "spot-then-on-demand"] = Field(
        "spot",
        validate_default=True,
        description="ec2: how machines are bought; with the last, on-demand where spot has none.",
    )
    on_demand_after: Seconds = Field(
        120.0, description="ec2: with spot-then-on-demand, how long spot must be refused before that."
    )
    on_demand_max: int | None = Field(
        None, ge=0, description="ec2: with spot-then-on-demand, at most this many on-demand machines."
    )
    address: Literal["public", "private", "dns"] = Field(
        "public", description="ec2: which address clients get."
    )
    security_group_ids: Names = Field((), description="ec2: security groups by id.")
    security_groups: Names = Field((), description="ec2: security groups by name, within the subnet's VPC.")
    key_name: str | None = Field(None, description="ec2: the SSH key pair.")
    subnet: str | None = Field(None, description="ec2: the subnet; without it the default VPC is used.")
    subnets: Names = Field(
        (), description="ec2: several subnets of one VPC, one a zone, in order of preference."
    )
    zones: Names = Field(
        (),
        description="ec2: availability zones in order of preference; without them the subnets decide, or all "
        "zones of the default VPC will do. Every machine type is asked for in each zone.",
    )
    instance_profile: str | None = Field(None, description="ec2: name or ARN of the instance profile.")
    user_data: str | None = Field(
        None, description="ec2: the script a machine runs at boot. No secrets in it."
    )
    user_data_file: str | None = Field(None, description="ec2: a file with that script.")
    name_tag: str = Field("dserv-worker", min_length=1, max_length=255, description="ec2: the Name tag.")
    tags: dict[str, str] = Field({}, description="ec2: further tags.")
    adopt_name_tag: bool = Field(
        False, description="ec2: take over machines with this Name tag that no broker has tagged as its own."
    )

    # Rules about two keys belong to the later one, so that they are said beside every other problem.

    @field_validator("hard_lifetime")
    @classmethod
    def _hard_is_no_shorter(cls, seconds: float | None, info: ValidationInfo) -> float | None:
        max_lifetime = info.data.get("max_lifetime")
        if seconds is not None and max_lifetime is not None and seconds < max_lifetime:
            raise ValueError(f"is shorter than max_lifetime ({max_lifetime:g} s): make it as long or longer")
        return seconds

    @field_validator("regions")
    @classmethod
    def _one_way_to_say_which_region(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if names and info.data.get("provider") != "ec2":
            raise ValueError('only a pool with provider = "ec2" has regions')
        if names and info.data.get("region") is not None:
            raise ValueError("region and regions exclude each other")
        return tuple(dict.fromkeys(names))

    @field_validator("in_")
    @classmethod
    def _of_its_regions(
        cls, tables: dict[str, RegionSettings], info: ValidationInfo
    ) -> dict[str, RegionSettings]:
        regions = info.data.get("regions")
        strange = [name for name in tables if regions is not None and name not in regions]
        if strange:
            raise ValueError(
                f"{', '.join(strange)}: is none of the pool's regions ({', '.join(regions or ()) or 'none'})"
                + _did_you_mean(strange[0], regions or ())
            )
        return tables

    @field_validator("image", "image_arm64", "security_group_ids", "subnet", "subnets", "zones")
    @classmethod
    def _lies_in_one_region(cls, value: Any, info: ValidationInfo) -> Any:
        regions, tables, key = info.data.get("regions", ()), info.data.get("in_"), str(info.field_name)
        is_image = key in IMAGES
        if not value or tables is None or (is_image and not value.startswith("ami-")):
            return value
        where = [one for one in regions if one not in tables or not tables[one].replaces(key)]
        if len(where) > 1:
            ways = "name an SSM parameter" if is_image else "leave it out"
            raise ValueError(
                f"{'an AMI id' if is_image else 'what it names'} lies in one region and would count in "
                f"{' and '.join(where)}: {ways}, or give each its own in [pool.NAME.in.{where[-1]}]"
            )
        return value

    @field_validator("image", "instance_types")
    @classmethod
    def _ec2_cannot_buy_without(cls, value: Any, info: ValidationInfo) -> Any:
        regions, tables = info.data.get("regions"), info.data.get("in_") or {}
        everywhere = regions and all(
            one in tables and tables[one].replaces(str(info.field_name)) for one in regions
        )
        if info.data.get("provider") == "ec2" and not value and not everywhere:
            raise ValueError('provider = "ec2" needs it')
        return value

    @field_validator("subnets", "zones")
    @classmethod
    def _one_way_to_say_where(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        return _one_way(names, info)

    @field_validator("user_data_file")
    @classmethod
    def _one_script(cls, path: str | None, info: ValidationInfo) -> str | None:
        return _one_script(path, info)

    @field_validator("warm_stopped")
    @classmethod
    def _old_enough_to_be_stopped(cls, number: int, info: ValidationInfo) -> int:
        max_lifetime = info.data.get("max_lifetime")
        if number and max_lifetime is not None and max_lifetime < STOCK_LIFETIME_SECONDS_MIN:
            raise ValueError(
                f"needs max_lifetime = {STOCK_LIFETIME_SECONDS_MIN / 60:.0f}m or longer: workers would be "
                "too old before they are stopped"
            )
        return number

    @field_validator("market")
    @classmethod
    def _spot_cannot_be_stopped(cls, market: str, info: ValidationInfo) -> str:
        stopped, provider = info.data.get("warm_stopped"), info.data.get("provider")
        if stopped and (market != "on-demand" or provider != "ec2"):
            raise ValueError(
                f'warm_stopped = {stopped} needs provider = "ec2" and market = "on-demand": nothing else '
                "can be stopped and started again"
            )
        return market

    @field_validator("warm", "warm_schedule")
    @classmethod
    def _warm_ones_within_the_cap(cls, value: Any, info: ValidationInfo) -> Any:
        cap, numbers = info.data.get("max_workers"), value.values() if isinstance(value, dict) else [value]
        if cap is not None and max(numbers, default=0) > cap:
            raise ValueError(
                f"asks for {max(numbers)} warm workers, and max_workers = {cap}: raise that, or ask for fewer"
            )
        return value

    @field_validator("tags")
    @classmethod
    def _tags_of_ones_own(cls, tags: dict[str, str]) -> dict[str, str]:
        reserved = [key for key in tags if TAG_KEY_RESERVED.fullmatch(key)]
        if reserved:
            raise ValueError(f"may not contain {', '.join(reserved)}: the broker or AWS keeps these")
        if len(tags) > TAGS_MAX:
            raise ValueError(f"holds more than {TAGS_MAX} entries")
        return tags

    @property
    def exclusive(self) -> bool:
        return self.sharing == "exclusive"

    def at(self, region: str) -> PoolSettings:
        """The pool as it is in a region: itself, unless that is one of several."""
        if region not in self.regions:
            return self
        table = self.in_.get(region, RegionSettings())  # type: ignore[call-arg]  # pydantic fills the defaults
        own = {key: field.default for key, field in PoolSettings.model_fields.items() if table.replaces(key)}
        only = {"region": region, "regions": (), "in_": {}, "region_order": "listed"}
        return self.model_copy(update={**own, **table.said, **only})

    @property
    def by_region(self) -> tuple[PoolSettings, ...]:
        """The pool as it is in each of its regions, in the order in which they are listed."""
        return tuple(self.at(region) for region in self.regions) or (self,)

    @property
    def seats(self) -> int | None:
        """How many leases those who share can get on one new worker, None for any number."""
        limits = [most for most in (self.leases_per_worker_max, self.uses_max) if most is not None]
        return min(limits, default=None)

    @property
    def own_subnets(self) -> tuple[str, ...]:
        """Where its machines are plugged in; none: in the default VPC."""
        return (self.subnet,) if self.subnet else self.subnets

    @property
    def markets(self) -> tuple[Literal["spot", "on-demand"], ...]:
        """Where the pool may buy, the preferred one first."""
        return ("spot", "on-demand") if self.market == "spot-then-on-demand" else (self.market,)

    @property
    def keeps_warm(self) -> bool:
        """Whether workers are ever kept that nobody has asked for."""
        return self.warm > 0 or any(self.warm_schedule.values()) or self.warm_stopped > 0

    @property
    def warm_targets(self) -> Schedule:
        """When how many are kept."""
        windows = ((schedule.window(text), number) for text, number in self.warm_schedule.items())
        return Schedule(tuple(windows), self.warm)

    @property
    def price_usd_micros_per_hour(self) -> int:
        return round(self.price_usd_per_hour * 1_000_000)


class Settings(Section):
    """The whole file."""

    broker: BrokerSettings = BrokerSettings()  # type: ignore[call-arg]  # pydantic fills the defaults
    pool: dict[PoolName, PoolSettings] = {"default": PoolSettings()}  # type: ignore[call-arg]

    @model_validator(mode="before")
    @classmethod
    def _default_pool_exists(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("pool", {}), dict):
            return {**data, "pool": {"default": {}, **data.get("pool", {})}}
        return data


def parse(document: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """TOML tables and the environment → Settings. Raises SettingsError with every problem and its key."""
    problems: list[str] = []
    merged = _overlay(document, environ, problems)
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        problems += [
            _problem(detail["loc"], detail["type"], detail["msg"], Settings) for detail in error.errors()
        ]
    if problems:
        raise SettingsError(problems)
    return settings


def schema() -> dict[str, Any]:
    """The JSON schema of the file."""
    return Settings.model_json_schema()


def _overlay(document: Mapping[str, Any], environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    merged: dict[str, Any] = json.loads(json.dumps(document, default=str))
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX):
            continue
        path = [part.lower() for part in variable.removeprefix(ENV_PREFIX).split("__")]
        if (path[0], len(path)) not in {("broker", 2), ("pool", 3)}:
            problems.append(
                f"{variable}: names no setting; write {ENV_PREFIX}POOL__DEFAULT__MAX_WORKERS for instance"
            )
            continue
        table = merged.setdefault(path[0], {})
        if path[0] == "pool" and isinstance(table, dict):
            dashed = path[1].replace("_", "-")
            table = table.setdefault(path[1] if path[1] in table else dashed, {})
        if isinstance(table, dict):
            table[path[-1]] = environ[variable]
    return merged


def _problem(loc: tuple[int | str, ...], kind: str, message: str, model: type[BaseModel]) -> str:
    path = [str(part) for part in loc if part != "[key]"]
    key = ".".join(path)
    if kind == "extra_forbidden":
        return f"{key}: there is no such setting{_did_you_mean(path[-1], _siblings(path, model))}"
    message = message.removeprefix("Value error, ")
    return f"{key}: {message[0].lower() + message[1:] if message[:1].isupper() else message}"


def _siblings(path: list[str], model: type[BaseModel]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {"broker": BrokerSettings, "pool": PoolSettings}
    section = sections.get(path[0]) if len(path) > 1 else model
    if path[0] == "pool" and path[2:3] == ["in"]:
        section = RegionSettings
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    close = get_close_matches(word, words, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
