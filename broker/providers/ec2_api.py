"""The way to EC2: the SDK's session and its clients, and one door for every call.

Two clients. What must not be repeated unasked, launches and Stop, gets one attempt, because only the broker
knows what a lost answer means; all other calls are repeatable and get two. Each has its own bound on calls in
flight, so that launches that hang never keep a Terminate waiting; and each sort of call leaves at a pace of
its own (ec2_pace). The SDK stays behind this door: out come EC2's answers or our errors.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache, cached_property, lru_cache
from typing import Any, Protocol

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore import exceptions as sdk
from botocore.loaders import Loader, create_loader

from broker.core.cloudtime import CloudClock, Span, hear
from broker.core.errors import CloudUnreachable, CredentialsRefused, SettingsError, Throttled
from broker.core.latency import RoundTrip
from broker.providers.ec2_errors import CANCELLED, LAUNCHES, OK, outcome_of, translate
from broker.providers.ec2_pace import Pace

CONNECT_SECONDS_MAX = 5.0
PAGES_MAX = 1_000  # a listing that does not end is no listing


@dataclass(frozen=True, slots=True)
class Manners:
    """How a client may call."""

    attempts_max: int
    answer_seconds_max: float
    in_flight_max: int


LAUNCHING = Manners(
    attempts_max=1,
    answer_seconds_max=60.0,  # a late answer beats a lost one: it names the machine
    in_flight_max=5,  # as many as RunInstances' token bucket lets through in a burst
)
OTHERWISE = Manners(
    attempts_max=2,  # one bad moment does not cost a listing of twenty pages, an outage not many minutes
    answer_seconds_max=20.0,  # a page of 1,000 instances takes EC2 a few seconds
    in_flight_max=16,
)

METHODS = {
    "CreateFleet": "create_fleet",
    "CreateLaunchTemplate": "create_launch_template",
    "CreateTags": "create_tags",
    "DescribeInstanceTypes": "describe_instance_types",
    "DescribeInstances": "describe_instances",
    "DescribeSecurityGroups": "describe_security_groups",
    "DescribeSpotPriceHistory": "describe_spot_price_history",
    "DescribeSubnets": "describe_subnets",
    "DescribeVpcs": "describe_vpcs",
    "RunInstances": "run_instances",
    "StartInstances": "start_instances",
    "StopInstances": "stop_instances",
    "TerminateInstances": "terminate_instances",
}  # every API the broker calls: the labels of the metric, and what the IAM policy must allow

NO_REGION = (
    '{key}.region: no AWS region is set; write region = "us-east-1" there, or set AWS_DEFAULT_REGION '
    "or a region in the AWS profile"
)
NO_CREDENTIALS = (
    "{key}.profile: no AWS credentials were found; run `aws configure`, or set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or give this machine an instance role"
)

Answer = dict[str, Any]
OnCall = Callable[[str, str], None]  # (api, outcome): one of METHODS, one of ec2_errors' outcomes


class Ec2Client(Protocol):
    """What is used of the SDK's client: METHODS. It raises the SDK's errors (`ec2_errors.client_error`)."""

    async def create_fleet(self, **parameters: Any) -> Answer: ...
    async def create_launch_template(self, **parameters: Any) -> Answer: ...
    async def create_tags(self, **parameters: Any) -> Answer: ...
    async def describe_instance_types(self, **parameters: Any) -> Answer: ...
    async def describe_instances(self, **parameters: Any) -> Answer: ...
    async def describe_security_groups(self, **parameters: Any) -> Answer: ...
    async def describe_spot_price_history(self, **parameters: Any) -> Answer: ...
    async def describe_subnets(self, **parameters: Any) -> Answer: ...
    async def describe_vpcs(self, **parameters: Any) -> Answer: ...
    async def run_instances(self, **parameters: Any) -> Answer: ...
    async def start_instances(self, **parameters: Any) -> Answer: ...
    async def stop_instances(self, **parameters: Any) -> Answer: ...
    async def terminate_instances(self, **parameters: Any) -> Answer: ...


ClientFactory = Callable[[Manners], AbstractAsyncContextManager[Ec2Client]]


@cache
def _description_of_aws() -> Loader:
    """The SDK's own data, read once for all regions: EC2's alone takes a tenth of a second and 15 MB."""
    return create_loader(os.environ.get("AWS_DATA_PATH"))


class Account:
    """The SDK's session: who we are and where, by the ordinary chain of files, environment and roles."""

    def __init__(self, region: str | None, profile: str | None) -> None:
        self._region, self._profile = region, profile

    @cached_property
    def _session(self) -> AioSession:
        """Made when it is first asked for: it takes the SDK a while, and a simulation never asks."""
        session = AioSession(profile=self._profile)
        session.register_component("data_loader", _description_of_aws())
        return session

    async def check(self, key: str, now_unix: float, problems: list[str]) -> str:
        """The region. What is missing is added to the problems, each naming its setting (`key`: the pool's).

        Raises CredentialsRefused, CloudUnreachable when a source of credentials does not answer.
        """
        try:
            region = self._find_region()
            problems += [*self._region_problems(key, region), *await self._credential_problems(key, now_unix)]
            return region
        except sdk.ProfileNotFound as error:
            setting = f"{key}.profile" if self._profile else "AWS_PROFILE"
            there = ", ".join(self._session.available_profiles) or "none"
            name = error.kwargs.get("profile")
            problems.append(f'{setting}: there is no AWS profile "{name}" (profiles there are: {there})')
        except (sdk.ConfigParseError, sdk.ConfigNotFound) as error:
            problems.append(
                f"{key}.profile: the AWS configuration file {error.kwargs.get('path')} cannot be read"
            )
        return ""

    def client(self, manners: Manners) -> AbstractAsyncContextManager[Ec2Client]:
        """A client of the SDK. Raises its errors and ValueError for a configuration that cannot be used."""
        config = AioConfig(
            connect_timeout=CONNECT_SECONDS_MAX,
            read_timeout=manners.answer_seconds_max,
            max_pool_connections=manners.in_flight_max,
            retries={"mode": "standard", "total_max_attempts": manners.attempts_max},
            user_agent_extra="compute-broker",
        )
        client: AbstractAsyncContextManager[Ec2Client] = self._session.create_client(
            "ec2", region_name=self._find_region(), config=config
        )
        return client

    def _find_region(self) -> str:
        # Other SDKs read AWS_REGION, this one does not: whoever has set it means it.
        found = self._region or self._session.get_config_variable("region")
        return str(found or os.environ.get("AWS_REGION") or "")

    def _region_problems(self, key: str, region: str) -> list[str]:
        if not region:
            return [NO_REGION.format(key=key)]
        try:
            self._session.get_partition_for_region(region)
        except sdk.UnknownRegionError:
            return [f'{key}.region: "{region}" is no AWS region; write one such as "us-east-1"']
        return []

    async def _credential_problems(self, key: str, now_unix: float) -> list[str]:
        try:
            if await self._session.get_credentials() is not None:
                return []
        except (sdk.ProfileNotFound, sdk.ConfigParseError, sdk.ConfigNotFound):
            raise
        except sdk.PartialCredentialsError as error:
            return [f"{key}.profile: the AWS credentials lack {error.kwargs.get('cred_var')}"]
        except (sdk.InvalidConfigError, sdk.UnknownCredentialError) as error:
            return [f"{key}.profile: the AWS configuration cannot be used: {error}"]
        except Exception as error:  # a source of credentials may fail in any way
            raise translate(error, "GetCredentials", now_unix) from None
        return [NO_CREDENTIALS.format(key=key)]


class Ec2Api:
    """The door. `connect` before the first call; `close` lets go of every connection.

    Every answer, a refusal too, tells the time at EC2's end: see `clock_unix`.
    """

    def __init__(
        self, on_call: OnCall, clock_wall: Callable[[], float], clock_monotonic: Callable[[], float]
    ) -> None:
        self._on_call, self._clock_wall, self._clock_monotonic = on_call, clock_wall, clock_monotonic
        self._clock: CloudClock | None = None
        self.round_trip = RoundTrip()
        self._exits = AsyncExitStack()
        self._launcher: Ec2Client | None = None
        self._reader: Ec2Client | None = None
        launch_turns = asyncio.Semaphore(LAUNCHING.in_flight_max)
        self._turns = dict.fromkeys(LAUNCHES, launch_turns)
        self._turns["StopInstances"] = asyncio.Semaphore(LAUNCHING.in_flight_max)
        self._other_turns = asyncio.Semaphore(OTHERWISE.in_flight_max)
        self._pace = Pace(clock_monotonic)

    async def connect(self, factory: ClientFactory) -> None:
        """Makes the clients, once, because that takes the SDK a while. Raises SettingsError."""
        if self._reader is not None:
            return
        try:
            self._launcher = await self._exits.enter_async_context(factory(LAUNCHING))
            self._reader = await self._exits.enter_async_context(factory(OTHERWISE))
        except (sdk.BotoCoreError, ValueError) as error:  # an endpoint that is no URL, for instance
            raise SettingsError([f"the AWS configuration cannot be used: {error}"]) from error

    async def close(self) -> None:
        self._launcher = self._reader = None
        await self._exits.aclose()

    async def call(self, api: str, **parameters: Any) -> Answer:
        """EC2's answer. Raises the CloudError that base.Provider names for the call."""
        turns = self._turns.get(api, self._other_turns)
        client = self._reader if turns is self._other_turns else self._launcher
        if client is None:
            raise CloudUnreachable("EC2 has not been reached since the start")
        method = getattr(client, METHODS[api])
        await self._keep_pace(api)
        async with turns:
            sent_at = self._clock_monotonic()
            try:
                answer: Answer = await method(**parameters)
            except asyncio.CancelledError:
                self._on_call(api, CANCELLED)
                raise
            except Exception as error:  # translate says what is known of the call's fate
                self._hear(sent_at, getattr(error, "response", None))
                ours = translate(error, api, self._clock_wall())
                if isinstance(ours, Throttled):
                    self._pace.throttled(api)
                self._on_call(api, outcome_of(ours))
                # The SDK's text on refused credentials may quote the signed request: it ends here.
                raise ours from (None if isinstance(ours, CredentialsRefused) else error)
        self._hear(sent_at, answer)
        if api.startswith("Describe"):  # a change takes EC2 longer than it takes the way
            self.round_trip.took(self._clock_monotonic() - sent_at)
        self._on_call(api, OK)
        return answer

    async def _keep_pace(self, api: str) -> None:
        try:
            await self._pace.wait(api)
        except Throttled as error:  # it was not sent, but whoever counts calls shall see that one was wanted
            self._on_call(api, outcome_of(error))
            raise

    def clock_unix(self, at: float) -> Span:
        """EC2's clock at a monotonic moment; our wall clock until EC2 has answered for the first time."""
        if self._clock is not None:
            return self._clock.unix(at)
        wall_unix = self._clock_wall() - (self._clock_monotonic() - at)
        return Span(wall_unix, wall_unix)

    def _hear(self, sent_at: float, response: Any) -> None:
        """An answer's Date. Without one, or with one that is none, nothing has been said of the time."""
        metadata = response.get("ResponseMetadata") if isinstance(response, dict) else None
        date_unix = _unix_of((metadata or {}).get("HTTPHeaders", {}).get("date", ""))
        if date_unix is not None:
            self._clock = hear(self._clock, sent_at, self._clock_monotonic(), date_unix)

    async def every(self, api: str, key: str, **parameters: Any) -> list[dict[str, Any]]:
        """The items of all pages, or an error: never some of them."""
        items: list[dict[str, Any]] = []
        for _ in range(PAGES_MAX):
            answer = await self.call(api, **parameters)
            items += answer.get(key) or ()
            token = answer.get("NextToken")
            if not token:
                return items
            parameters["NextToken"] = token
        raise CloudUnreachable(f"EC2's answer to {api} does not end: {PAGES_MAX} pages and no last one")


def _unix_of(date: str) -> float | None:
    """`Thu, 01 Jan 2026 08:00:00 GMT`: the day, which hardly ever changes, and the time in it."""
    day, _, time = date.rpartition(" GMT")[0].rpartition(" ")
    try:
        hours, minutes, seconds = time.split(":")
        return _day_unix(day) + int(hours) * 3600 + int(minutes) * 60 + int(seconds)
    except (TypeError, ValueError):
        return None


@lru_cache(maxsize=8)
def _day_unix(day: str) -> float:
    return parsedate_to_datetime(f"{day} 00:00:00 GMT").timestamp()
