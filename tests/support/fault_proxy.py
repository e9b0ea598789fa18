"""A reverse proxy in front of moto that behaves, and misbehaves, as EC2 does.

A test programs it through one thread-safe object, per action and with counts, so every run is the same
run. It serves from a thread and a loop of its own. What goes wrong is decided here (refusals, resets,
lost answers, stalls); what EC2 shows of an instance is `ec2_front`'s and `instance_views`'.

    with MotoServer() as moto, FaultProxy(moto) as proxy:
        proxy.after_launch(hidden=2, pending=3)               # Describe calls, or Seconds(…), or FOREVER
        proxy.refuse("RunInstances", "InsufficientInstanceCapacity", times=2)
        proxy.lose_answer("RunInstances")                     # the third launches; its answer is lost
        …
        assert len(proxy.running_ours("lab")) == 1            # the cloud's truth, not the broker's opinion

Modelled: RunInstances, DescribeInstances, TerminateInstances. Every other call goes to moto as it is and
comes back with its addresses made harmless; so DescribeInstanceStatus and fleets show moto's own states.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self
from urllib.parse import urlencode

import aiohttp
from aiohttp import web

from tests.support import ec2_wire
from tests.support.cloud import BROKER_TAG, CloudInstance, MotoServer
from tests.support.ec2_front import Carried, Ec2Error, Ec2Front, UpstreamError, parse_page_token
from tests.support.ec2_wire import loopback_address
from tests.support.faults import (
    EVERY_ACTION,
    WAIT_SECONDS_DEFAULT,
    Aim,
    Call,
    CallRecord,
    Fault,
    FaultPlan,
    Journal,
    Kind,
    Match,
    Refusal,
)
from tests.support.instance_views import FOREVER, Delay, Programme, Seconds
from tests.support.loop_thread import LoopThread

__all__ = [
    "EVERY_ACTION",
    "FOREVER",
    "Call",
    "CallRecord",
    "Fault",
    "FaultProxy",
    "Seconds",
    "loopback_address",
]

# What belongs to one connection or one encoding of the body, not to the message.
HOP_HEADERS = {"connection", "content-encoding", "content-length", "host", "keep-alive", "transfer-encoding"}
DECIDING_KINDS = (Kind.REFUSE, Kind.RESET, Kind.LOSE_ANSWER, Kind.LOSE_ANSWER_BY_RESET)
FORM = "application/x-www-form-urlencoded; charset=utf-8"


XML = {"Content-Type": "text/xml;charset=UTF-8"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back. `hang_up` says how the connection ends instead of an answer, "" when it does not."""

    status: int
    body: bytes
    outcome: str
    headers: Mapping[str, str] = field(default_factory=lambda: XML)
    hang_up: str = ""


class FaultProxy:
    """The cloud as a test wants it today. Use as a context manager, or `start` and `stop`."""

    def __init__(self, moto: MotoServer) -> None:
        self._moto = moto
        self._loop = LoopThread("fault-proxy")
        self._front = Ec2Front(self._upstream)
        self._plan = FaultPlan()
        self._journal = Journal()
        self._regions = {ec2_wire.REGION_DEFAULT}
        self._port = 0
        self._cleanup = contextlib.AsyncExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        self._loop.start()
        self._loop.call(self._listen())

    def stop(self) -> None:
        """Ends every connection. A call that is stalled now is never carried out."""
        if self._loop.is_running:
            self._loop.call(self._cleanup.aclose())
            self._loop.stop()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    # ------------------------------------------------------------ programming: what EC2 shows

    def after_launch(
        self,
        *,
        hidden: Delay = 0,
        pending: Delay = 0,
        unaddressed: Delay = 0,
        hidden_from_terminate: bool = False,
    ) -> None:
        """For instances launched from now on: how long a Describe misses them, then calls them pending,
        then (counted together with pending) shows no public address. Terminate finds a hidden instance
        unless told otherwise. Delays are Describe calls that would have listed the instance, or Seconds."""
        with self._front.lock:
            self._front.views.programme = replace(
                self._front.views.programme,
                hidden=hidden,
                pending=pending,
                unaddressed=unaddressed,
                hidden_from_terminate=hidden_from_terminate,
            )

    def after_terminate(self, *, shutting_down: Delay) -> None:
        """For terminations (and reclaims) from now on: how long shutting-down comes before terminated."""
        with self._front.lock:
            self._front.views.programme = replace(self._front.views.programme, shutting_down=shutting_down)

    def settle(self, instance_id: str | None = None) -> None:
        """Ends the delays that run now, of this instance or of every one: they show the plain truth."""
        with self._front.lock:
            if instance_id is None:
                self._front.views.settle_all(time.monotonic())
            else:
                self._front.views.of(instance_id, time.monotonic()).settle(time.monotonic())

    def omit(self, instance_id: str, times: int = 1) -> None:
        """The next `times` listings miss the instance; a Describe by its id still finds it."""
        with self._front.lock:
            self._front.views.of(instance_id, time.monotonic()).omissions_left = times

    def forget(self, instance_id: str) -> None:
        """From now on the cloud knows no such instance, as EC2 does about an hour after a termination."""
        with self._front.lock:
            self._front.views.of(instance_id, time.monotonic()).forgotten = True

    def reclaim(self, instance_id: str) -> None:
        """The cloud takes a spot instance away: terminated in moto, and the answers say why."""
        instance = next(one for one in self.truth() if one.instance_id == instance_id)
        with self._front.lock:
            view = self._front.views.of(instance_id, time.monotonic())
            view.reclaimed = True
            view.terminated(self._front.views.programme.shutting_down, time.monotonic())
        self._moto.call("TerminateInstances", {"InstanceId.1": instance_id}, instance.region)
        self._front.tell(self._front.on_terminated, instance_id)

    def limit_page_size(self, instances: int) -> None:
        """Listings come in pages of at most so many, whatever MaxResults says (AWS allows fewer)."""
        self._front.page_size_max = instances

    def answer_dead_tokens_with_the_dead(self) -> None:
        """The token of a terminated instance replays its launch instead of IdempotentInstanceTerminated."""
        self._front.token_answers_with_the_dead = True

    # ------------------------------------------------------------ programming: what goes wrong

    def refuse(
        self,
        action: str,
        code: str,
        times: int = 1,
        *,
        message: str | None = None,
        status: int | None = None,
        skip: int = 0,
        match: Match | None = None,
    ) -> Fault:
        """The next `times` calls of the action (`EVERY_ACTION` for any) get an EC2 error; nothing is done.
        `match` narrows it: parameters that must be there, or a predicate on the Call. `skip` lets the
        first matching calls pass."""
        refusal = Refusal(
            code,
            message
            if message is not None
            else ec2_wire.ERROR_MESSAGE.get(code, f"The request failed: {code}"),
            status if status is not None else ec2_wire.ERROR_STATUS.get(code, ec2_wire.ERROR_STATUS_DEFAULT),
        )
        return self._plan.add(Fault(Kind.REFUSE, Aim(action, times, skip, match), refusal=refusal))

    def fail_page(self, page: int, code: str = "InternalError", times: int = 1) -> Fault:
        """Page N of a DescribeInstances listing is refused; set the page size with `limit_page_size`."""
        return self.refuse("DescribeInstances", code, times, match=lambda call: call.page == page)

    def reset(self, action: str, times: int = 1, *, skip: int = 0, match: Match | None = None) -> Fault:
        """The connection is reset before anything is carried out."""
        return self._plan.add(Fault(Kind.RESET, Aim(action, times, skip, match)))

    def lose_answer(
        self,
        action: str,
        times: int = 1,
        *,
        by_reset: bool = False,
        skip: int = 0,
        match: Match | None = None,
    ) -> Fault:
        """The call is carried out, its token recorded; then the connection closes without an answer, or
        is reset: aiobotocore reports a reset as EndpointConnectionError, as if nothing had been sent."""
        kind = Kind.LOSE_ANSWER_BY_RESET if by_reset else Kind.LOSE_ANSWER
        return self._plan.add(Fault(kind, Aim(action, times, skip, match)))

    def stall(
        self,
        action: str,
        seconds: float | None = None,
        times: int = 1,
        *,
        after_carrying_out: bool = False,
        skip: int = 0,
        match: Match | None = None,
    ) -> Fault:
        """Calls wait for `seconds`, or until `.release()`, before they are carried out (or, if told so,
        before the answer is sent). A client that gives up meanwhile does not take its call back."""
        kind = Kind.STALL_ANSWER if after_carrying_out else Kind.STALL
        return self._plan.add(Fault(kind, Aim(action, times, skip, match), seconds=seconds))

    def heal(self) -> None:
        """Ends every fault and every delay; stalled calls go on. The journal and the tokens stay."""
        self._plan.clear()
        with self._front.lock:
            self._front.views.programme = Programme()
            self._front.views.settle_all(time.monotonic())

    # ------------------------------------------------------------ looking

    @property
    def calls(self) -> list[CallRecord]:
        """Every call in the order of arrival."""
        return list(self._journal.records())

    def calls_of(self, action: str) -> list[CallRecord]:
        return list(self._journal.records(action))

    def wait_for_calls(
        self, action: str, count: int = 1, timeout_seconds: float = WAIT_SECONDS_DEFAULT
    ) -> list[CallRecord]:
        """The action's calls, once `count` of them since the start are decided. Raises TimeoutError."""
        return list(self._journal.wait(action, count, timeout_seconds))

    def truth(self) -> list[CloudInstance]:
        """Every instance ever launched, straight from moto, in every region a client has spoken to."""
        return [one for region in sorted(self._regions) for one in self._moto.instances(region)]

    def running_ours(self, broker_id: str) -> list[CloudInstance]:
        """What this broker's owner is paying for right now."""
        return [i for i in self.truth() if i.state == "running" and i.tags.get(BROKER_TAG) == broker_id]

    def on_shown_running(self, listener: Callable[[str], None]) -> tuple[str, ...]:
        """Calls back with an instance's id before the first answer that shows it running is sent.
        Returns those shown running already. The listener runs in the proxy's thread: it must be quick."""
        with self._front.lock:
            self._front.on_shown_running.append(listener)
            return self._front.views.ids_shown_running()

    def on_terminated(self, listener: Callable[[str], None]) -> None:
        """Calls back with an instance's id when it was terminated or reclaimed."""
        with self._front.lock:
            self._front.on_terminated.append(listener)

    def unlisten(self, *listeners: Callable[[str], None]) -> None:
        with self._front.lock:
            for one in listeners:
                for registered in (self._front.on_shown_running, self._front.on_terminated):
                    if one in registered:
                        registered.remove(one)

    # ------------------------------------------------------------ serving, on the loop's thread

    async def _listen(self) -> None:
        self._session = await self._cleanup.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        )
        runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        self._cleanup.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        self._port = runner.addresses[0][1]

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        call, is_ec2 = _read_call(request, body)
        ticket = self._journal.begin(call)
        outcome = "broken"
        try:
            answer = await self._answer(call, is_ec2, request, body)
            outcome = answer.outcome
        finally:
            # Before the answer goes out: whoever has the answer finds it in the journal.
            self._journal.finish(ticket, outcome)
        if answer.hang_up:
            _hang_up(request, answer.hang_up)
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)

    async def _answer(self, call: Call, is_ec2: bool, request: web.BaseRequest, body: bytes) -> Answer:
        if stall := self._plan.take(call, Kind.STALL):
            await stall.held()
        fault = self._plan.take(call, *DECIDING_KINDS)
        if fault is not None and fault.kind is Kind.RESET:
            return Answer(500, b"", "reset", hang_up="reset")
        if fault is not None and fault.refusal is not None:
            return _refused(fault.refusal)
        answer = await (self._carry_out(call) if is_ec2 else self._pass_through(request, body, scrub=False))
        if answer is None:
            answer = await self._pass_through(request, body, scrub=True)
        if stall := self._plan.take(call, Kind.STALL_ANSWER):
            await stall.held()
        if fault is not None:
            how = "reset" if fault.kind is Kind.LOSE_ANSWER_BY_RESET else "close"
            return replace(answer, outcome=f"answer lost ({answer.outcome})", hang_up=how)
        return answer

    async def _carry_out(self, call: Call) -> Answer | None:
        """The answer to a call this proxy models; None for any other."""
        modelled = {
            "RunInstances": self._front.run_instances,
            "DescribeInstances": self._front.describe_instances,
            "TerminateInstances": self._front.terminate_instances,
        }.get(call.action)
        if modelled is None:
            return None
        self._regions.add(call.region)
        try:
            carried: Carried = await modelled(call.params, call.region)
        except (Ec2Error, UpstreamError) as e:
            return Answer(e.status, e.body, f"error {e.code}")
        return Answer(200, carried.body, carried.outcome)

    async def _upstream(self, action: str, params: Mapping[str, str], region: str) -> tuple[int, bytes]:
        form = urlencode({"Action": action, "Version": "2016-11-15", **params}).encode()
        headers = {"Authorization": ec2_wire.signed_for(region), "Content-Type": FORM}
        async with self._session.post(self._moto.endpoint_url, data=form, headers=headers) as response:
            return response.status, await response.read()

    async def _pass_through(self, request: web.BaseRequest, body: bytes, *, scrub: bool) -> Answer:
        url = self._moto.endpoint_url + request.raw_path
        sent = _end_to_end(request.headers)
        async with self._session.request(request.method, url, data=body, headers=sent) as response:
            returned = await response.read()
        outcome = "ok" if response.status < 400 else f"error {ec2_wire.error_code_of(returned)}"
        shown = ec2_wire.scrub_addresses(returned) if scrub else returned
        return Answer(response.status, shown, outcome, headers=_end_to_end(response.headers))


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in headers.items() if k.lower() not in HOP_HEADERS}


def _read_call(request: web.BaseRequest, body: bytes) -> tuple[Call, bool]:
    """(the call, is it EC2's). Query protocols name the action in the form, JSON ones in a header."""
    region, service = ec2_wire.scope_of(request.headers.get("Authorization", ""))
    is_form = request.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
    params = ec2_wire.parse_form(body) if is_form else {}
    action = (
        params.get("Action") or request.headers.get("X-Amz-Target", "").rpartition(".")[2] or request.path
    )
    page = parse_page_token(params["NextToken"])[1] if "NextToken" in params else 1
    return Call(action, params, region, page), service == "ec2"


def _refused(refusal: Refusal) -> Answer:
    body = ec2_wire.error_xml(refusal.code, refusal.message)
    return Answer(refusal.status, body, f"refused {refusal.code}")


def _hang_up(request: web.BaseRequest, how: str) -> None:
    """Ends the connection with nothing said: "reset" as a crashed peer would, "close" as a lost one."""
    transport = request.transport
    if transport is None:
        return
    if how == "reset":
        # Linger for 0 s: the kernel answers with RST instead of an orderly end.
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    transport.abort()
