"""A scripted EC2 client and the pools of these tests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from broker.core.settings import PoolSettings
from broker.providers.ec2 import Ec2Provider
from broker.providers.ec2_api import METHODS, Manners

NOW_UNIX = 1_767_225_600.0  # 2026-01-01T00:00:00Z
ONE_TYPE = b"""<DescribeInstanceTypesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><instanceTypeSet><item>
<instanceType>c7i.large</instanceType><vCpuInfo><defaultVCpus>2</defaultVCpus></vCpuInfo>
</item></instanceTypeSet></DescribeInstanceTypesResponse>"""

Step = dict[str, Any] | Exception | Callable[..., dict[str, Any]]


def pool(**settings: Any) -> PoolSettings:
    recipe = {"provider": "ec2", "image": "ami-12c6146b", "instance_types": ["c7i.large"], **settings}
    return PoolSettings.model_validate(recipe)


def shape(instance_id: str = "i-00000001", state: str = "pending", **more: Any) -> dict[str, Any]:
    """An instance as the SDK returns it; `tags=` is a plain dict."""
    tags = [{"Key": key, "Value": value} for key, value in more.pop("tags", {}).items()]
    launched = datetime.fromtimestamp(NOW_UNIX, UTC)
    return {"InstanceId": instance_id, "State": {"Name": state}, "LaunchTime": launched, "Tags": tags, **more}


def page(*shapes: dict[str, Any], token: str = "") -> dict[str, Any]:
    return {
        "Reservations": [{"Instances": [one]} for one in shapes],
        **({"NextToken": token} if token else {}),
    }


class ScriptedClient:
    """Answers each API from its script, in order (the last step repeats), and remembers every call."""

    def __init__(self, **scripts: Step | list[Step]) -> None:
        described = {"InstanceTypes": [{"InstanceType": "c7i.large", "VCpuInfo": {"DefaultVCpus": 2}}]}
        self.scripts = {"DescribeInstanceTypes": described, **scripts}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.in_flight = self.in_flight_max = 0
        self.hold: asyncio.Event | None = None  # while set and not fired, every call stays in flight

    def __getattr__(self, method: str) -> Any:
        apis = {name: api for api, name in METHODS.items()}
        if method not in apis:
            raise AttributeError(method)
        return partial(self._call, apis[method])

    async def _call(self, api: str, **parameters: Any) -> dict[str, Any]:
        self.calls.append((api, parameters))
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            if self.hold is not None:
                await self.hold.wait()
            return self._answer(api, parameters)
        finally:
            self.in_flight -= 1

    def _answer(self, api: str, parameters: dict[str, Any]) -> dict[str, Any]:
        script = self.scripts.get(api, {})
        step = script if not isinstance(script, list) else script.pop(0) if len(script) > 1 else script[0]
        if isinstance(step, Exception):
            raise step
        return step(**parameters) if callable(step) else step

    def sent(self, api: str) -> list[dict[str, Any]]:
        return [parameters for name, parameters in self.calls if name == api]

    @asynccontextmanager
    async def factory(self, manners: Manners) -> AsyncIterator[Any]:
        yield self


@asynccontextmanager
async def opened(
    client: ScriptedClient, pools: dict[str, PoolSettings] | None = None, **more: Any
) -> AsyncIterator[Ec2Provider]:
    """A provider on a scripted client."""
    provider = Ec2Provider(
        "lab",
        pools if pools is not None else {"default": pool()},
        region="us-east-1",
        profile=None,
        clock_wall=lambda: NOW_UNIX,
        client_factory=client.factory,
        **more,
    )
    await provider.open()
    try:
        yield provider
    finally:
        await provider.close()


def forget_aws(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """An environment without AWS: no variable, no file but those in the folder, no metadata service."""
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    for variable in [name for name in os.environ if name.startswith("AWS_") or name.upper() in proxies]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@asynccontextmanager
async def endpoint(respond: Callable[[bytes], tuple[str, bytes]]) -> AsyncIterator[str]:
    """The URL of an HTTP server that makes a status and a body of each request's body."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        status, body = respond(await reader.readexactly(length))
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
