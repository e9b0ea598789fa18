"""The SDK's client, as far as the broker uses it, in front of the simulated EC2.

It keeps the SDK's manners: how often it tries, how long it waits, which errors it raises. A request that is
under way arrives whatever becomes of its sender: a caller that is cancelled, or killed, has still asked.
(botocore, `retries/standard.py`: which failures are tried again, and after how long.)
"""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

from botocore import exceptions as sdk

from broker.providers.ec2_api import CONNECT_SECONDS_MAX, Manners
from broker.providers.sim_calls import LAUNCHES, Answer, Call, Parameters
from broker.providers.sim_roads import Ending, Roads, Trip
from broker.providers.sim_server import Server
from broker.providers.sim_sky import Sky

ENDPOINT_URL = "https://ec2.simulated.invalid/"
PAUSE_SECONDS_MAX = 20.0
TRANSIENT_STATUSES = (500, 502, 503, 504)
TRANSIENT_CODES = ("RequestLimitExceeded", "RequestTimeout", "Throttling")


class SimClient:
    """See the module: an ec2_api.Ec2Client."""

    def __init__(self, sky: Sky, roads: Roads, server: Server, manners: Manners, caller: str) -> None:
        self._sky, self._roads, self._server = sky, roads, server
        self._manners, self._caller = manners, caller

    async def create_fleet(self, **parameters: Any) -> Answer:
        return await self._call("CreateFleet", parameters)

    async def create_launch_template(self, **parameters: Any) -> Answer:
        return await self._call("CreateLaunchTemplate", parameters)

    async def create_tags(self, **parameters: Any) -> Answer:
        return await self._call("CreateTags", parameters)

    async def describe_instance_types(self, **parameters: Any) -> Answer:
        return await self._call("DescribeInstanceTypes", parameters)

    async def describe_instances(self, **parameters: Any) -> Answer:
        return await self._call("DescribeInstances", parameters)

    async def describe_security_groups(self, **parameters: Any) -> Answer:
        return await self._call("DescribeSecurityGroups", parameters)

    async def describe_spot_price_history(self, **parameters: Any) -> Answer:
        return await self._call("DescribeSpotPriceHistory", parameters)

    async def describe_subnets(self, **parameters: Any) -> Answer:
        return await self._call("DescribeSubnets", parameters)

    async def describe_vpcs(self, **parameters: Any) -> Answer:
        return await self._call("DescribeVpcs", parameters)

    async def run_instances(self, **parameters: Any) -> Answer:
        return await self._call("RunInstances", parameters)

    async def start_instances(self, **parameters: Any) -> Answer:
        return await self._call("StartInstances", parameters)

    async def stop_instances(self, **parameters: Any) -> Answer:
        return await self._call("StopInstances", parameters)

    async def terminate_instances(self, **parameters: Any) -> Answer:
        return await self._call("TerminateInstances", parameters)

    async def _call(self, api: str, parameters: dict[str, Any]) -> Answer:
        if api in LAUNCHES and not parameters.get("ClientToken"):
            # The SDK fills one in, once a call: its own attempts launch one machine, a crash's do not.
            parameters["ClientToken"] = f"sdk-{next(self._sky.numbers)}"
        for attempt in itertools.count(1):
            try:
                return await self._attempt(api, parameters)
            except Exception as error:
                if attempt >= self._manners.attempts_max or not _is_transient(error):
                    raise
            pause_seconds = min(2.0 ** (attempt - 1), PAUSE_SECONDS_MAX)
            await asyncio.sleep(self._sky.roads.within((0.0, pause_seconds)))
        raise AssertionError("attempts are counted")

    async def _attempt(self, api: str, parameters: Parameters) -> Answer:
        agenda = self._sky.agenda
        started_at = agenda.catch_up()
        trip = self._roads.set_out(api, parameters)
        call = Call(api, parameters, self._caller, trip.mishap, trip.code, trip.status)
        agenda.plan(started_at + trip.arrives_seconds, self._server.receive, call)
        await self._await_end(trip)
        agenda.catch_up(started_at + trip.returns_seconds)
        if call.error is not None:
            raise call.error
        assert call.answer is not None, "a call that has arrived ends one way or the other"
        return call.answer

    async def _await_end(self, trip: Trip) -> None:
        """Until the answer is here. Raises what the SDK raises when none comes."""
        patience_seconds = self._manners.answer_seconds_max
        match trip.ending:
            case Ending.UNREACHABLE:
                await asyncio.sleep(trip.returns_seconds)
                raise sdk.EndpointConnectionError(endpoint_url=ENDPOINT_URL)
            case Ending.CONNECT_TIMEOUT:
                await asyncio.sleep(CONNECT_SECONDS_MAX)
                raise sdk.ConnectTimeoutError(endpoint_url=ENDPOINT_URL)
            case Ending.RESET:
                await asyncio.sleep(trip.returns_seconds)
                raise sdk.ConnectionClosedError(endpoint_url=ENDPOINT_URL)
        seconds = math.inf if trip.ending is Ending.SILENCE else trip.returns_seconds
        await asyncio.sleep(min(seconds, patience_seconds))
        if seconds > patience_seconds:
            raise sdk.ReadTimeoutError(endpoint_url=ENDPOINT_URL)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, sdk.ClientError):
        response: Any = error.response
        status = response["ResponseMetadata"]["HTTPStatusCode"]
        return status in TRANSIENT_STATUSES or response["Error"]["Code"] in TRANSIENT_CODES
    return isinstance(error, sdk.ConnectionError | sdk.HTTPClientError)
