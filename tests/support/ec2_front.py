"""The EC2 that an emulator is not: tokens, eventual consistency, listings, all-or-nothing terminations.

Stands between a client and moto, answers the three calls the broker lives by (RunInstances,
DescribeInstances, TerminateInstances) and asks moto for what is true. It knows no faults: those are the
fault proxy's. Rules are AWS's: "Ensuring idempotency in Amazon EC2 API requests" (EC2 developer guide),
"Error codes", RunInstances, DescribeInstances, TerminateInstances (EC2 API reference).
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final
from xml.etree import ElementTree

from tests.support import ec2_wire, instance_views
from tests.support.ec2_wire import Element, Filter
from tests.support.instance_views import Views

TOKEN_CHARACTERS_MAX = 64  # (AWS: EC2 developer guide, "Ensuring idempotency")
PAGE_SIZE_MIN, PAGE_SIZE_MAX = 5, 1000  # what a client may ask for (AWS: DescribeInstances, MaxResults)
LISTINGS_KEPT_MAX = 64  # listings whose later pages can still be asked for
UPSTREAM_PAGES_MAX = 1_000

# Filters on what this front decides, or that moto lacks: judged on what is shown, never by moto.
_SHOWN_FILTERS: Final[Mapping[str, tuple[str, ...]]] = {
    "client-token": ("clientToken",),
    "dns-name": ("dnsName",),
    "instance-lifecycle": ("instanceLifecycle",),
    "instance-state-code": ("instanceState", "code"),
    "instance-state-name": ("instanceState", "name"),
    "ip-address": ("ipAddress",),
    "launch-time": ("launchTime",),
    "private-dns-name": ("privateDnsName",),
    "private-ip-address": ("privateIpAddress",),
    "spot-instance-request-id": ("spotInstanceRequestId",),
    "state-reason-code": ("stateReason", "code"),
}

Params = Mapping[str, str]
Upstream = Callable[
    [str, Params, str], Awaitable[tuple[int, bytes]]
]  # (action, params, region) → moto's answer
Listener = Callable[[str], None]


class Ec2Error(Exception):
    """An error answer in the making."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.status, self.code, self.body = status, code, ec2_wire.error_xml(code, message)


class UpstreamError(Exception):
    """moto refused: its answer goes to the client as it is."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"moto answered {status}")
        self.status, self.code, self.body = status, ec2_wire.error_code_of(body), body


@dataclass(slots=True)
class TokenEntry:
    """What a client token stands for. The lock makes simultaneous requests with one token take turns."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    params: dict[str, str] = field(default_factory=dict)
    instance_ids: tuple[str, ...] = ()
    answer: bytes = b""  # empty until a launch with this token has succeeded


@dataclass(frozen=True, slots=True)
class Carried:
    """A call carried out: the answer, and "ok" or "replayed"."""

    body: bytes
    outcome: str = "ok"


@dataclass(slots=True)
class Look:
    """One Describe looking at the instances, and what it came across."""

    now: float
    by_id: bool
    missing: list[str] = field(default_factory=list)
    newly_running: list[str] = field(default_factory=list)


class Ec2Front:
    """One EC2 with all its regions. Coroutines run on the proxy's loop; `lock` guards the views."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._tokens: dict[tuple[str, str, str], TokenEntry] = {}
        self._listings: OrderedDict[str, list[list[Element]]] = OrderedDict()
        self.lock = threading.RLock()
        self.views = Views()
        self.page_size_max = PAGE_SIZE_MAX
        self.token_answers_with_the_dead = False
        self.on_shown_running: list[Listener] = []
        self.on_terminated: list[Listener] = []

    # ------------------------------------------------------------ RunInstances

    async def run_instances(self, params: Params, region: str) -> Carried:
        token = params.get("ClientToken", "")
        if len(token) > TOKEN_CHARACTERS_MAX:
            raise Ec2Error(
                "InvalidParameterValue", f"clientToken has more than {TOKEN_CHARACTERS_MAX} characters"
            )
        if not token or params.get("DryRun") == "true":
            return Carried((await self._launch(params, region))[0])
        scope = (region, await self._zone_asked_for(params, region), token)
        entry = self._tokens.setdefault(scope, TokenEntry())
        async with entry.turn:
            if entry.answer:
                return await self._replay(entry, params, region)
            # A launch that fails leaves nothing behind: its token is as good as new.
            entry.answer, entry.instance_ids = await self._launch(params, region)
            entry.params = _launch_parameters(params)
            return Carried(entry.answer)

    async def _replay(self, entry: TokenEntry, params: Params, region: str) -> Carried:
        if _launch_parameters(params) != entry.params:
            raise Ec2Error(
                "IdempotentParameterMismatch",
                "The client token was used before with other parameters.",
            )
        states = await self._true_states(entry.instance_ids, region)
        if "terminated" in states and not self.token_answers_with_the_dead:
            raise Ec2Error(
                "IdempotentInstanceTerminated",
                f"The client token was used by a terminated instance: {', '.join(entry.instance_ids)}",
            )
        return Carried(entry.answer, "replayed")

    async def _launch(self, params: Params, region: str) -> tuple[bytes, tuple[str, ...]]:
        # moto launches MinCount instances, EC2 as many as it can up to MaxCount.
        root = await self._ask("RunInstances", {**params, "MinCount": params.get("MaxCount", "1")}, region)
        ids: list[str] = []
        with self.lock:
            for holder in root.iterfind(ec2_wire.tag("instancesSet")):
                for item in list(holder):
                    ids.append(ec2_wire.text_of(item, "instanceId"))
                    view = self.views.of(ids[-1], time.monotonic())
                    holder.remove(item)
                    holder.append(instance_views.as_launched(item, view))
        return ec2_wire.to_xml(root), tuple(ids)

    async def _zone_asked_for(self, params: Params, region: str) -> str:
        """The token's scope within the region: zonal when a zone or subnet is named, else regional."""
        if zone := params.get("Placement.AvailabilityZone"):
            return zone
        subnet_id = params.get("SubnetId") or params.get("NetworkInterface.1.SubnetId")
        if not subnet_id:
            return ""
        root = await self._ask("DescribeSubnets", {"SubnetId.1": subnet_id}, region)
        return ec2_wire.text_of(root, "subnetSet", "item", "availabilityZone")

    async def _true_states(self, instance_ids: Iterable[str], region: str) -> set[str]:
        root = await self._ask("DescribeInstances", _numbered("InstanceId", instance_ids), region)
        items = root.iterfind(ec2_wire.path("reservationSet", "item", "instancesSet", "item"))
        return {ec2_wire.text_of(item, "instanceState", "name") for item in items}

    # ------------------------------------------------------------ TerminateInstances

    async def terminate_instances(self, params: Params, region: str) -> Carried:
        ids = ec2_wire.numbered(params, "InstanceId")
        with self.lock:
            unknown = [one for one in ids if self._is_hidden_from_terminate(one)]
        if unknown:
            raise Ec2Error("InvalidInstanceID.NotFound", ec2_wire.not_found_message(unknown))
        root = await self._ask("TerminateInstances", _numbered("InstanceId", ids), region)
        now = time.monotonic()
        with self.lock:
            for item in root.iterfind(ec2_wire.path("instancesSet", "item")):
                self._show_termination(item, now)
        for instance_id in ids:
            self.tell(self.on_terminated, instance_id)
        return Carried(ec2_wire.to_xml(root))

    def _show_termination(self, item: Element, now: float) -> None:
        view = self.views.of(ec2_wire.text_of(item, "instanceId"), now)
        before = view.state(ec2_wire.text_of(item, "previousState", "name"), now)
        view.terminated(self.views.programme.shutting_down, now)
        ec2_wire.set_state(item, before, "previousState")
        ec2_wire.set_state(item, "terminated" if before == "terminated" else "shutting-down", "currentState")

    def _is_hidden_from_terminate(self, instance_id: str) -> bool:
        view = self.views.known(instance_id)
        return view is not None and view.is_hidden_from_terminate(time.monotonic())

    # ------------------------------------------------------------ DescribeInstances

    async def describe_instances(self, params: Params, region: str) -> Carried:
        if "NextToken" in params:
            return Carried(self._page(*parse_page_token(params["NextToken"])))
        ids = ec2_wire.numbered(params, "InstanceId")
        _check_page_size(params, ids)
        reservations = await self._true_listing(params, ids, region)
        shown, newly_running = self._show_listing(reservations, ids, ec2_wire.filters_of(params))
        for instance_id in newly_running:
            self.tell(self.on_shown_running, instance_id)
        size = min(int(params.get("MaxResults", self.page_size_max)), self.page_size_max)
        return Carried(self._page(self._keep_listing(shown, len(shown) if ids else size), 1))

    async def _true_listing(self, params: Params, ids: Iterable[str], region: str) -> list[Element]:
        passed_on = [one for one in ec2_wire.filters_of(params) if one.name not in _SHOWN_FILTERS]
        asked = ec2_wire.with_filters(_numbered("InstanceId", ids), passed_on)
        found: list[Element] = []
        for _ in range(UPSTREAM_PAGES_MAX):
            root = await self._ask("DescribeInstances", asked, region)
            found += root.iterfind(ec2_wire.path("reservationSet", "item"))
            token = ec2_wire.text_of(root, "nextToken")
            if not token:
                return found
            asked["NextToken"] = token
        raise Ec2Error("InternalError", "the emulator's listing does not end", 500)

    def _show_listing(
        self, reservations: Iterable[Element], ids: tuple[str, ...], filters: Iterable[Filter]
    ) -> tuple[list[Element], list[str]]:
        """(reservations as shown now, ids shown running for the first time). Counts one Describe."""
        wanted = [one for one in filters if one.name in _SHOWN_FILTERS]
        look = Look(time.monotonic(), by_id=bool(ids))
        with self.lock:
            shown = [one for one in reservations if self._show_reservation(one, wanted, look)]
        if ids and look.missing:
            raise Ec2Error("InvalidInstanceID.NotFound", ec2_wire.not_found_message(look.missing))
        return shown, look.newly_running

    def _show_reservation(self, reservation: Element, wanted: Iterable[Filter], look: Look) -> bool:
        """Leaves in the reservation what is visible and wanted; False when that is nothing."""
        holder = reservation.find(ec2_wire.tag("instancesSet"))
        assert holder is not None, "moto listed a reservation without an instance set"
        for item in list(holder):
            holder.remove(item)
            visible = self._show_instance(item, look)
            if visible is not None and all(_passes(visible, one) for one in wanted):
                holder.append(visible)
        return len(holder) > 0

    def _show_instance(self, item: Element, look: Look) -> Element | None:
        view = self.views.of(ec2_wire.text_of(item, "instanceId"), look.now)
        if view.omissions_left > 0 and not look.by_id:
            view.omissions_left -= 1
            return None
        if view.is_hidden(look.now):
            look.missing.append(view.instance_id)
            view.count_describe(look.now)
            return None
        visible = instance_views.as_described(item, view, look.now)
        view.count_describe(look.now)
        if ec2_wire.text_of(visible, "instanceState", "name") == "running" and not view.seen_running:
            view.seen_running = True
            look.newly_running.append(view.instance_id)
        return visible

    def _keep_listing(self, shown: list[Element], size: int) -> str:
        """One listing is one moment: its later pages are kept as they were when page 1 was asked for."""
        pages = [shown[at : at + size] for at in range(0, len(shown), max(1, size))] or [[]]
        listing_id = uuid.uuid4().hex
        self._listings[listing_id] = pages
        while len(self._listings) > LISTINGS_KEPT_MAX:
            self._listings.popitem(last=False)
        return listing_id

    def _page(self, listing_id: str, number: int) -> bytes:
        pages = self._listings.get(listing_id, [])
        if not 1 <= number <= len(pages):
            raise Ec2Error("InvalidNextToken", "The token is invalid or has expired.")
        root = ec2_wire.answer_root("DescribeInstances")
        ElementTree.SubElement(root, ec2_wire.tag("reservationSet")).extend(pages[number - 1])
        if number < len(pages):
            ec2_wire.set_text(root, "nextToken", page_token(listing_id, number + 1))
        return ec2_wire.to_xml(root)

    # ------------------------------------------------------------ both ways

    def tell(self, listeners: Iterable[Listener], instance_id: str) -> None:
        for listener in tuple(listeners):
            listener(instance_id)

    async def _ask(self, action: str, params: Params, region: str) -> Element:
        status, body = await self._upstream(action, params, region)
        if status != 200:
            raise UpstreamError(status, body)
        return ElementTree.fromstring(body)


def page_token(listing_id: str, number: int) -> str:
    return f"{listing_id}.{number}"


def parse_page_token(token: str) -> tuple[str, int]:
    """(listing, page number); a token that is none of ours belongs to no listing."""
    listing_id, _, number = token.rpartition(".")
    return (listing_id, int(number)) if number.isdecimal() else ("", 1)


def _numbered(prefix: str, values: Iterable[str]) -> dict[str, str]:
    return {f"{prefix}.{n}": one for n, one in enumerate(values, 1)}


def _launch_parameters(params: Params) -> dict[str, str]:
    return {k: v for k, v in params.items() if k not in ("Action", "Version", "ClientToken")}


def _passes(item: Element, one: Filter) -> bool:
    return one.accepts(ec2_wire.text_of(item, *_SHOWN_FILTERS[one.name]))


def _check_page_size(params: Params, ids: tuple[str, ...]) -> None:
    if "MaxResults" not in params:
        return
    if ids:
        raise Ec2Error(
            "InvalidParameterCombination",
            "The parameter instancesSet cannot be used with the parameter maxResults",
        )
    if not PAGE_SIZE_MIN <= int(params["MaxResults"]) <= PAGE_SIZE_MAX:
        raise Ec2Error("InvalidParameterValue", f"maxResults is not within {PAGE_SIZE_MIN}..{PAGE_SIZE_MAX}")
