"""broker/systemd.py against real sockets: what a service manager would receive and hand over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker import systemd
from broker.systemd import Notifier, listen_sockets, watchdog_seconds


class Manager:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.environ = {"NOTIFY_SOCKET": address}
        self._bound_to = address.replace("@", "\0", 1)
        self._socket: socket.socket
        self.start()

    def start(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._bound_to)
        self._socket.setblocking(False)

    def stop(self) -> None:
        self._socket.close()
        if not self._bound_to.startswith("\0"):
            Path(self._bound_to).unlink(missing_ok=True)

    def heard(self) -> list[str]:
        """The oldest datagram, as lines. A local datagram is there as soon as it was sent."""
        return self._socket.recv(4096).decode().split("\n")

    def heard_nothing(self) -> bool:
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.stop()


def test_without_a_service_manager_nothing_is_said_and_nothing_fails() -> None:
    problems: list[str] = []
    notifier = Notifier({}, problems.append)
    assert not notifier.enabled
    assert not any([notifier.ready("up"), notifier.status("x"), notifier.watchdog(), notifier.stopping()])
    assert problems == []


def test_ready_comes_with_its_status(manager: Manager) -> None:
    notifier = Notifier(manager.environ)
    assert notifier.enabled
    assert notifier.ready("3 workers taken in")
    assert manager.heard() == ["READY=1", "STATUS=3 workers taken in"]


def test_ready_needs_no_status(manager: Manager) -> None:
    assert Notifier(manager.environ).ready()
    assert manager.heard() == ["READY=1"]


def test_an_abstract_address_is_reached() -> None:
    manager = Manager(f"@compute-broker-test-{os.getpid()}")
    assert Notifier(manager.environ).ready()
    assert manager.heard() == ["READY=1"]
    manager.stop()


def test_a_status_cannot_smuggle_in_an_assignment(manager: Manager) -> None:
    assert Notifier(manager.environ).status("scan failed:\nREADY=1\r\nMAINPID=1")
    assert manager.heard() == ["STATUS=scan failed: READY=1 MAINPID=1"]


def test_an_empty_status_is_not_sent(manager: Manager) -> None:
    assert Notifier(manager.environ).status("  \n")
    assert manager.heard_nothing()


def test_a_long_status_is_cut_between_characters_and_stays_below_what_systemd_reads(manager: Manager) -> None:
    Notifier(manager.environ).status("€" * systemd.STATUS_BYTES_MAX)
    (line,) = manager.heard()
    assert set(line.removeprefix("STATUS=")) == {"€"}
    assert (
        systemd.STATUS_BYTES_MAX - 3 < len(line.removeprefix("STATUS=").encode()) <= systemd.STATUS_BYTES_MAX
    )


def test_a_status_that_is_no_valid_text_is_still_sent(manager: Manager) -> None:
    assert Notifier(manager.environ).status("worker \udcff gone")
    assert manager.heard() == ["STATUS=worker ? gone"]


def test_a_ready_broker_feeds_the_watchdog(manager: Manager) -> None:
    notifier = Notifier(manager.environ)
    notifier.ready()
    manager.heard()
    assert notifier.watchdog()
    assert manager.heard() == ["WATCHDOG=1"]


def test_a_starting_broker_asks_for_time_and_leaves_the_watchdog_unarmed(manager: Manager) -> None:
    assert Notifier(manager.environ).watchdog()
    assert manager.heard() == ["EXTEND_TIMEOUT_USEC=180000000"]


def test_the_time_asked_for_is_the_watchdogs(manager: Manager) -> None:
    assert Notifier({**manager.environ, "WATCHDOG_USEC": "90000000"}).watchdog()
    assert manager.heard() == ["EXTEND_TIMEOUT_USEC=90000000"]


def test_stopping_is_said_with_its_reason(manager: Manager) -> None:
    assert Notifier(manager.environ).stopping("4 workers stay")
    assert manager.heard() == ["STOPPING=1", "STATUS=4 workers stay"]


@pytest.mark.parametrize("address", ["/nowhere/notify", "vsock:2:1234", "relative", "/" + "x" * 200])
def test_a_manager_that_cannot_be_reached_is_reported_once_and_never_raised(address: str) -> None:
    problems: list[str] = []
    notifier = Notifier({"NOTIFY_SOCKET": address}, problems.append)
    assert not any([notifier.ready("up"), notifier.watchdog(), notifier.status("x"), notifier.stopping()])
    assert len(problems) == 1
    assert f"NOTIFY_SOCKET={address}" in problems[0]


def test_a_manager_that_cannot_be_reached_is_no_problem_without_a_listener_for_it() -> None:
    assert not Notifier({"NOTIFY_SOCKET": "/nowhere/notify"}).ready()


def test_a_full_queue_neither_blocks_nor_raises(manager: Manager) -> None:
    problems: list[str] = []
    notifier = Notifier(manager.environ, problems.append)
    queue_length = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    sent = [notifier.status(f"line {n}") for n in range(queue_length + 10)]
    assert sent.count(True) >= queue_length
    assert sent[-1] is False
    assert len(problems) == 1


def test_a_lost_ready_rides_with_the_next_message(manager: Manager) -> None:
    notifier = Notifier(manager.environ)
    manager.stop()
    assert not notifier.ready("up")
    assert not notifier.watchdog()
    manager.start()
    assert notifier.watchdog()
    assert manager.heard() == ["READY=1", "WATCHDOG=1"]
    assert notifier.watchdog()
    assert manager.heard() == ["WATCHDOG=1"]


def test_a_lost_ready_is_not_said_by_a_broker_that_stops(manager: Manager) -> None:
    notifier = Notifier(manager.environ)
    manager.stop()
    notifier.ready()
    manager.start()
    notifier.stopping()
    assert manager.heard() == ["STOPPING=1"]


def test_a_second_outage_is_reported_again(manager: Manager) -> None:
    problems: list[str] = []
    notifier = Notifier(manager.environ, problems.append)
    for _outage in range(2):
        manager.stop()
        notifier.status("lost")
        notifier.status("lost too")
        manager.start()
        notifier.status("heard")
    assert len(problems) == 2


def test_the_watchdog_period_is_in_seconds() -> None:
    assert watchdog_seconds({"WATCHDOG_USEC": "180000000", "WATCHDOG_PID": str(os.getpid())}) == 180.0
    assert watchdog_seconds({"WATCHDOG_USEC": "1500000"}) == 1.5


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_PID": str(os.getpid())},
        {"WATCHDOG_USEC": "180000000", "WATCHDOG_PID": str(os.getppid())},
        {"WATCHDOG_USEC": "180000000", "WATCHDOG_PID": "someone"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-5"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "9" * 5000},
    ],
)
def test_there_is_no_watchdog_unless_one_is_meant_for_this_process(environ: dict[str, str]) -> None:
    assert watchdog_seconds(environ) is None


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getppid())},
        {"LISTEN_PID": str(os.getpid())},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
    ],
)
def test_no_socket_is_taken_that_was_not_passed_to_this_process(environ: dict[str, str]) -> None:
    assert listen_sockets(environ) == {}


def test_a_number_of_sockets_out_of_all_reason_is_refused() -> None:
    with pytest.raises(ValueError, match="LISTEN_FDS=65: at most 64"):
        listen_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "65"})


# Descriptors from 3 on belong to pytest in this process, so what is passed there is looked at by a child.
RECEIVER = """
import os, sys
from broker.systemd import listen_sockets
os.environ["LISTEN_PID"] = str(os.getpid())
try:
    received = listen_sockets(os.environ)
except ValueError as error:
    sys.exit(f"refused: {error}")
for name, sockets in received.items():
    for sock in sockets:
        print(name, sock.fileno(), *sock.getsockname(), sock.getblocking(), sock.get_inheritable())
"""


def received(
    passed: list[socket.socket], names: str | None, count: int | None = None
) -> tuple[list[str], str]:
    """What a process sees that is started as systemd starts it: (a line for each socket, its complaint)."""
    environ = {"LISTEN_FDS": str(len(passed) if count is None else count)}
    if names is not None:
        environ["LISTEN_FDNAMES"] = names
    fds = [sock.fileno() for sock in passed]
    # The shell moves each one to its place: first out of the way, then to 3, 4, …
    away = "; ".join(f"exec {60 + n}<&{fd}" for n, fd in enumerate(fds))
    place = "; ".join(f"exec {systemd.LISTEN_FD_FIRST + n}<&{60 + n}" for n, _ in enumerate(fds))
    script = "; ".join(part for part in (away, place, 'exec "$@"') if part)
    done = subprocess.run(
        ["bash", "-c", script, "-", sys.executable, "-c", RECEIVER],
        env={**environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": os.environ["PATH"]},
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout.splitlines(), done.stderr.strip()


def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_passed_sockets_come_by_name_non_blocking_and_not_inherited() -> None:
    with listener() as ours, listener() as web:
        lines, complaint = received([ours, web], "broker:web")
        assert complaint == ""
        assert lines == [
            f"broker 3 127.0.0.1 {ours.getsockname()[1]} False False",
            f"web 4 127.0.0.1 {web.getsockname()[1]} False False",
        ]


def test_sockets_of_one_name_stay_together() -> None:
    with listener() as v4, listener() as v6:
        lines, _ = received([v4, v6], "broker:broker")
        assert [line.split()[:2] for line in lines] == [["broker", "3"], ["broker", "4"]]


@pytest.mark.parametrize("names", [None, "", "broker"])
def test_a_socket_without_a_name_is_called_unknown(names: str | None) -> None:
    with listener() as first, listener() as second:
        lines, _ = received([first, second], names)
        assert [line.split()[0] for line in lines] == [names or systemd.UNNAMED, systemd.UNNAMED]


def test_more_names_than_sockets_are_ignored() -> None:
    with listener() as only:
        lines, _ = received([only], "broker:web:debug")
        assert [line.split()[0] for line in lines] == ["broker"]


def test_a_descriptor_that_is_no_socket_is_refused_in_one_sentence() -> None:
    lines, complaint = received([], "broker", count=1)
    assert lines == []
    assert complaint.startswith("refused: descriptor 3 from the service manager is no socket")


def test_a_socket_that_does_not_listen_is_refused_in_one_sentence() -> None:
    for passed in (socket.socket(), socket.socket(type=socket.SOCK_DGRAM)):
        with passed:
            lines, complaint = received([passed], "broker")
            assert lines == []
            assert complaint == "refused: descriptor 3 from the service manager is no listening stream socket"
