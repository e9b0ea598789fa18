"""moto as a server in a process of its own, and the truth it holds.

A process apart, so that neither a killed broker nor a blocked loop touches it. It ends when its standard
input closes, which the kernel sees to however the test ends: it never outlives it. `instances` asks moto
directly, behind the fault proxy's back: what really was launched, not what anybody was told.
"""

from __future__ import annotations

import http.client
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlencode, urlsplit
from xml.etree import ElementTree

from tests.support import ec2_wire

CHILD_SCRIPT = Path(__file__).with_name("moto_child.py")

START_SECONDS_MAX = 60.0  # importing moto takes about a second; a loaded machine may take many
STOP_SECONDS_MAX = 10.0
CALL_SECONDS_MAX = 30.0
PAGES_MAX = 1_000

BROKER_TAG = "compute-broker:broker"


@dataclass(frozen=True, slots=True)
class CloudInstance:
    """One instance as moto has it. `state` is moto's: running, terminated, stopped; never pending."""

    instance_id: str
    state: str
    tags: Mapping[str, str]
    client_token: str
    instance_type: str
    lifecycle: str  # "spot", or "" for on-demand
    zone: str
    region: str


class CloudError(Exception):
    """moto answered a direct call with an error; carries EC2's code."""

    def __init__(self, code: str, body: str) -> None:
        super().__init__(f"{code}: {body}")
        self.code = code


class MotoServer:
    """`with MotoServer() as moto:` runs moto on a loopback port of its own choosing.

    `images=False` leaves out moto's canned AMIs: launches take any image id all the same, DescribeImages
    finds none, and a reset takes 10 ms instead of 50 to 150.
    """

    def __init__(self, *, images: bool = True) -> None:
        self._images = images
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def start(self) -> None:
        # -P: the folder of this script must not become the place where the child looks for modules.
        # A session of its own: Ctrl-C on a terminal ends the test, and the test ends the child.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "MOTO_EC2_LOAD_DEFAULT_AMIS": str(self._images).lower()},
        )
        try:
            self._port = self._announced_port()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def reset(self) -> None:
        """Forgets every resource of every account and region."""
        self._post("/moto-api/reset", b"", {})

    def call(
        self, action: str, params: Mapping[str, str], region: str = ec2_wire.REGION_DEFAULT
    ) -> ElementTree.Element:
        """One EC2 call straight to moto; its parsed answer. Raises CloudError."""
        form = {"Action": action, "Version": "2016-11-15", **params}
        headers = {
            "Authorization": ec2_wire.signed_for(region),
            "Content-Type": "application/x-www-form-urlencoded; charset=utf-8",
        }
        status, body = self._post("/", urlencode(form).encode(), headers)
        if status != 200:
            raise CloudError(ec2_wire.error_code_of(body), body.decode("utf-8", "replace"))
        return ElementTree.fromstring(body)

    def instances(self, region: str = ec2_wire.REGION_DEFAULT) -> tuple[CloudInstance, ...]:
        """Every instance ever launched in the region, terminated ones too, oldest first."""
        found: list[CloudInstance] = []
        params = {"MaxResults": "1000"}
        for _ in range(PAGES_MAX):
            root = self.call("DescribeInstances", params, region)
            items = root.iterfind(ec2_wire.path("reservationSet", "item", "instancesSet", "item"))
            found += [_instance(item, region) for item in items]
            token = ec2_wire.text_of(root, "nextToken")
            if not token:
                return tuple(found)
            params["NextToken"] = token
        raise CloudError("TooManyPages", f"more than {PAGES_MAX} pages")

    def _announced_port(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_SECONDS_MAX)
        line = self._process.stdout.readline() if readable else b""
        if not line.strip().isdigit():
            raise RuntimeError(f"moto did not announce a port within {START_SECONDS_MAX} s: {line!r}")
        return int(line)

    def _post(self, target: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.endpoint_url).netloc, timeout=CALL_SECONDS_MAX)
        try:
            connection.request("POST", target, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def _instance(item: ElementTree.Element, region: str) -> CloudInstance:
    tags = item.iterfind(ec2_wire.path("tagSet", "item"))
    return CloudInstance(
        instance_id=ec2_wire.text_of(item, "instanceId"),
        state=ec2_wire.text_of(item, "instanceState", "name"),
        tags={ec2_wire.text_of(t, "key"): ec2_wire.text_of(t, "value") for t in tags},
        client_token=ec2_wire.text_of(item, "clientToken"),
        instance_type=ec2_wire.text_of(item, "instanceType"),
        lifecycle=ec2_wire.text_of(item, "instanceLifecycle"),
        zone=ec2_wire.text_of(item, "placement", "availabilityZone"),
        region=region,
    )
