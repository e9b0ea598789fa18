"""What is written down: one event a line, ids and reasons on every action, no secrets, at no price."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import structlog

from broker.core.model import InstanceState
from broker.logs import EventLog, Log
from broker.testing import RunningBroker
from tests.support.brokers import live, settings

ROOT = Path(__file__).resolve().parents[1]
SECRET = "AKIA-this-is-nobodys-business"
SECONDS_MAX = 20.0


def said(script: str, *, redirect: str = "", level: str = "info", form: str = "json") -> str:
    """What a process that configures logging and runs the script has written to stderr."""
    setup = f"from broker.logs import configure, get_logger\nconfigure({level!r}, {form!r})\n"
    setup += "log = get_logger(broker='lab')\n"
    run = subprocess.run(
        [sys.executable, "-c", redirect + setup + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stderr


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- a line ----------------------------------------------------------------------------------------------


def test_an_event_is_one_line_of_json_with_its_time_and_level() -> None:
    (line,) = lines(said("log.info('worker ready', worker='cb-1', reason='two\\nlines')"))
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "worker ready",
        "level": "info",
        "broker": "lab",
        "worker": "cb-1",
        "reason": "two\nlines",
    }


def test_whatever_is_logged_stays_on_one_line_and_is_json() -> None:
    text = said(
        """
        import logging
        log.error("loop failed", exc_info=ZeroDivisionError("a\\nbug"), odd=object(), raw=b"\\xff")
        log.info("\\x1b[31m\\u2028\\u00e4")
        try:
            1 / 0
        except ZeroDivisionError as error:
            log.error("caught", exc_info=error)
        logging.getLogger("aiohttp.server").error("a library's\\n%s", "error")
        """
    )
    loop_failed, odd, caught, library = lines(text)
    assert "a\nbug" in loop_failed["exception"]
    assert odd["event"] == "\x1b[31m\u2028\u00e4"
    assert "ZeroDivisionError: division by zero" in caught["exception"]
    assert (library["event"], library["level"]) == ("a library's\nerror", "error")


def test_auto_is_json_when_nobody_is_looking() -> None:
    assert len(lines(said("log.info('x')", form="auto"))) == 1


def test_the_console_form_has_no_colours_when_it_is_not_a_terminal() -> None:
    text = said("log.warning('worker suspect', ip='10.0.0.1')", form="console")
    assert "worker suspect" in text
    assert "ip=10.0.0.1" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("level", "heard"),
    [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")],
)
def test_the_level_decides_what_is_written(level: str, heard: str) -> None:
    script = "log.debug('d'); log.info('i'); log.warning('w'); log.error('e')"
    assert "".join(line["event"] for line in lines(said(script, level=level))) == heard


def test_libraries_are_heard_when_they_warn_and_not_when_they_chat() -> None:
    script = """
        import logging
        for name in ("botocore.endpoint", "aiohttp.access", "asyncio", "urllib3.connectionpool"):
            logging.getLogger(name).info("chat")
            logging.getLogger(name).warning("beware")
        """
    assert [line["event"] for line in lines(said(script))] == ["beware"] * 4
    assert "chat" not in said(script, level="debug")


# --- not at any price ---

TO_NOWHERE = "import os\nr, w = os.pipe(); os.dup2(w, 2); os.close(w); os.close(r)\n"
TO_A_FULL_DISK = "import os\nfull = os.open('/dev/full', os.O_WRONLY); os.dup2(full, 2)\n"


@pytest.mark.parametrize("redirect", [TO_NOWHERE, TO_A_FULL_DISK], ids=["closed-pipe", "full-disk"])
@pytest.mark.parametrize("form", ["json", "console"])
def test_a_line_that_cannot_be_written_is_lost_and_nothing_else_is(redirect: str, form: str) -> None:
    said("for n in range(1000): log.info('worker ready', n=n)", redirect=redirect, form=form)


def test_a_log_that_was_closed_is_no_reason_to_stop() -> None:
    said("import sys\nsys.stderr.close()\nlog.info('x')")


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_does_not_show_what_was_in_the_variables(form: str) -> None:
    script = f"""
        def call(credentials):
            raise ZeroDivisionError("a bug")
        try:
            call("".join({list(SECRET)!r}))
        except ZeroDivisionError as error:
            log.error("loop failed", exc_info=error)
        """
    text = said(script, form=form)
    assert "a bug" in text
    assert SECRET not in text


# --- what happens to workers and leases --------------------------------------------------------------------


def collector(into: list[dict[str, Any]]) -> Log:
    def collect(logger: object, method: str, event: Any) -> Any:
        into.append({"level": method, **event})
        raise structlog.DropEvent

    wrapper = structlog.make_filtering_bound_logger(logging.DEBUG)
    return cast(Log, structlog.wrap_logger(None, processors=[collect], wrapper_class=wrapper))


def told(tmp_path: Path, story: Callable[[RunningBroker], Any], **pool: Any) -> list[dict[str, Any]]:
    """What the event log of a broker says while a story is told."""
    heard: list[dict[str, Any]] = []

    async def main(broker: RunningBroker) -> None:
        broker.daemon._observers.insert(0, EventLog(collector(heard)).heard)
        await story(broker)

    live(tmp_path, main, chosen=settings(**pool))
    return heard


def events(heard: list[dict[str, Any]]) -> list[str]:
    return [line["event"] for line in heard if line["level"] != "debug"]


def test_the_life_of_a_worker_can_be_read_from_the_log(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=anna")
        await broker.ask(f"RELEASE {address} client=anna")
        await broker.until(lambda: not len(broker.registry))

    heard = told(tmp_path, story)
    assert events(heard) == [
        "worker ordered",
        "worker booting",
        "worker ready",
        "lease granted",
        "lease ended",
        "worker draining",
        "worker terminating",
        "worker gone",
    ]
    for line in heard:
        assert line["worker"]
        assert line["pool"] == "default"
    by_event = {line["event"]: line for line in heard}
    assert by_event["worker draining"]["reason"] == "released"
    assert by_event["worker draining"]["before"] == "ready"
    assert by_event["worker ready"]["ip"]
    assert by_event["lease granted"]["client"] == by_event["lease ended"]["client"] == "anna"
    assert by_event["lease ended"]["why"] == "released"
    assert len({line["worker"] for line in heard}) == 1, "one id to look for"


def test_pings_and_warm_hand_outs_are_not_logged(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        address = await broker.ask("GET_WORKER client=anna")
        for _ in range(100):
            await broker.ask(f"PING {address} client=anna")
            await broker.ask("GET_WORKER client=anna")

    assert len(events(told(tmp_path, story))) == 4


def test_a_worker_that_is_doubted_or_lost_stands_out(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        await broker.ask("GET_WORKER client=anna")
        machine = next(iter(broker.cloud.machines.values()))
        machine.answers = False
        await asyncio.sleep(40)
        broker.cloud.set_state(
            machine.instance.id, InstanceState.TERMINATED, "Server.SpotInstanceTermination"
        )
        await broker.until(lambda: not len(broker.registry))

    heard = told(tmp_path, story)
    suspect = next(line for line in heard if line["event"] == "worker suspect")
    assert suspect["level"] == "warning"
    assert suspect["reason"] == "the worker port does not answer"
    gone = next(line for line in heard if line["event"] == "worker gone")
    assert gone["reason"] == "Server.SpotInstanceTermination"


def test_the_parameters_of_a_launch_are_not_in_the_log(tmp_path: Path) -> None:
    async def story(broker: RunningBroker) -> None:
        prepare = broker.cloud.prepare

        def with_user_data(*arguments: Any) -> Any:
            return replace(prepare(*arguments), parameters=json.dumps({"UserData": SECRET}))

        broker.cloud.prepare = with_user_data  # type: ignore[assignment]
        await broker.ask("GET_WORKER client=anna")
        assert SECRET in str(broker.cloud.calls)

    assert SECRET not in str(told(tmp_path, story))
