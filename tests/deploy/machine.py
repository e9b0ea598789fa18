"""A machine to follow the install instructions on: a folder that stands for /, and commands that act on it.

What runs for real: install, systemd-sysusers, `systemctl enable` (all three can work below another root),
python -m venv, pip for the package itself, curl, rm, and the broker, started from the installed unit. What
cannot, for want of root, a network or PID 1, is answered by a method here that checks what it was asked.
Every command is noted in `commands`. Paths below / that the instructions write to are rewritten beforehand,
and a script with any other path that leads out of the checkout is refused before it runs.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.deploy.manager import Service
from tests.deploy.unit_file import REPOSITORY, environment, one, run

OWN_PATHS = (
    "/opt/compute-broker",
    "/etc/compute-broker",
    "/etc/sysusers.d",
    "/etc/systemd/system",
    "/var/lib/compute-broker",
)
HARMLESS_PATHS = re.compile(r"/dev/(stdin|null|tcp/.*)|/metrics|/healthz|/readyz")
STRANGE_PATH = re.compile(r"(?<![\w./:-])/[^\s'\";,()]*|~\S*|\$\S*|\S*\.\./\S*")
UNIT_NAME = re.compile(r"compute-broker\.(service|socket)")
COMMAND_SECONDS_MAX = 120.0

# Says what it was called with, and then does what it is told: print and exit, or become a real command.
STUB = """\
#!{python}
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as machine:
    machine.connect({address!r})
    machine.sendall(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]).encode() + b"\\n")
    answer = json.loads(machine.makefile().readline())
if answer["exec"]:
    os.execvp(answer["exec"][0], answer["exec"])
print(answer["output"], end="")
sys.exit(answer["code"])
"""


class Refused(Exception):
    """An instruction that would not work, or not be right, on a real machine."""


class Machine:
    """See the module. `loopback` takes the place of 127.0.0.1: two of these can be at work at once."""

    def __init__(self, folder: Path, loopback: str) -> None:
        self.root = folder / "root"
        self.commands: list[list[str]] = []
        self._folder = folder
        self._loopback = loopback
        self._stubs = folder / "stubs"
        self._service: Service | None = None
        self._listening: socket.socket | None = None
        self._calls = socket.socket(socket.AF_UNIX)
        self._calls.bind("")
        self._calls.listen()
        self._answering = threading.Thread(target=self._answer_all, daemon=True)

    def __enter__(self) -> Self:
        for path in ("etc/systemd/system", "opt", "var/lib"):
            (self.root / path).mkdir(parents=True)
        self._stubs.mkdir()
        for name in self._answers():
            self._stub(self._stubs / name)
        self._answering.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.shutdown(socket.SHUT_RDWR)
        self._answering.join()
        self._calls.close()
        if self._service is not None:
            self._service.__exit__(kind, error, trace)
        if self._listening is not None:
            self._listening.close()

    def type(self, script: str) -> str:
        """Runs one block of the instructions in this machine; what it printed. Raises when a line fails."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.rewritten(script)],
            cwd=REPOSITORY,
            env={"PATH": f"{self._stubs}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
        )
        if done.returncode:
            raise Refused(f"{script}\nfailed ({done.returncode}):\n{done.stdout}{done.stderr}")
        return done.stdout

    def rewritten(self, script: str) -> str:
        """The script with the machine's own paths and address in place of the real ones."""
        strangers = [
            path
            for path in STRANGE_PATH.findall(script)
            if not path.startswith(OWN_PATHS) and not HARMLESS_PATHS.fullmatch(path)
        ]
        if strangers:
            raise Refused(f"no test may touch {strangers}")
        for path in OWN_PATHS:
            script = re.sub(rf"(?<![\w.-]){path}\b", f"{self.root}{path}", script)
        return script.replace("127.0.0.1", self._loopback)

    def path(self, absolute: str) -> Path:
        """Where a path of the real machine is in this one."""
        return self.root / absolute.lstrip("/")

    # --- the commands that cannot be themselves ------------------------------------------------------

    def _answers(self) -> dict[str, Callable[[list[str]], dict[str, object]]]:
        return {
            "sudo": self._sudo,
            "apt-get": self._apt_get,
            "install": self._install,
            "systemd-sysusers": self._systemd_sysusers,
            "python3": self._python3,
            "pip": self._pip,
            "systemctl": self._systemctl,
            "journalctl": self._journalctl,
            "sudoedit": self._sudoedit,
            "git": self._git,
            "userdel": self._userdel,
        }

    def _sudo(self, arguments: list[str]) -> dict[str, object]:
        if arguments[0] == "-u":
            self._expect(arguments[1], {"compute-broker"})
            arguments = arguments[2:]
        return _become(*arguments)

    def _apt_get(self, arguments: list[str]) -> dict[str, object]:
        self._expect(arguments[0], {"update", "install"})
        return _say()

    def _install(self, arguments: list[str]) -> dict[str, object]:
        """The real one, without the change of owner, which takes root and the new user."""
        kept: list[str] = []
        rest = iter(arguments)
        for argument in rest:
            if argument in {"-o", "-g"}:
                self._expect(next(rest), {"root"} if argument == "-o" else {"compute-broker"})
            else:
                kept.append(argument)
        return _become("/usr/bin/install", *kept)

    def _systemd_sysusers(self, arguments: list[str]) -> dict[str, object]:
        return _become("/usr/bin/systemd-sysusers", f"--root={self.root}", *arguments)

    def _python3(self, arguments: list[str]) -> dict[str, object]:
        """A real virtual environment, whose pip asks here what to do."""
        self._expect(" ".join(arguments[:2]), {"-m venv"})
        made = run(sys.executable, "-m", "venv", arguments[2])
        pip = Path(arguments[2]) / "bin" / "pip"
        pip.rename(pip.with_name("real-pip"))
        self._stub(pip)
        return _say(made.stdout + made.stderr, made.returncode)

    def _pip(self, arguments: list[str]) -> dict[str, object]:
        """The package is really installed; its locked dependencies are the ones these tests run with."""
        venv = self.path("/opt/compute-broker/.venv")
        if "-r" in arguments:
            self._expect(" ".join(arguments), {"install --require-hashes -r requirements.lock"})
            (site_packages,) = venv.glob("lib/python3*/site-packages")
            ours = Path(next(path for path in sys.path if path.endswith("site-packages")))
            (site_packages / "dependencies.pth").write_text(f"{ours}\n")
            return _say()
        self._expect(" ".join(arguments), {"install --no-deps .", "install --no-deps --force-reinstall ."})
        offline = [
            "--no-index",
            "--no-build-isolation",
            "--ignore-installed",
            "--quiet",
            "--no-warn-script-location",
        ]
        return _become(str(venv / "bin/python"), "-m", "pip", *arguments[:-1], *offline, ".")

    def _journalctl(self, arguments: list[str]) -> dict[str, object]:
        self._expect(" ".join(arguments), {"--no-pager --lines=20 --unit=compute-broker.service"})
        return _say("" if self._service is None else self._service.journal)

    def _sudoedit(self, arguments: list[str]) -> dict[str, object]:
        (file,) = arguments
        if Path(file).stat().st_mode & 0o027:
            raise Refused(f"{file} is about to hold a secret and others may read or change it")
        return _say()

    def _git(self, arguments: list[str]) -> dict[str, object]:
        self._expect(" ".join(arguments), {"pull"})
        return _say()

    def _userdel(self, arguments: list[str]) -> dict[str, object]:
        self._expect(" ".join(arguments), {"compute-broker"})
        return _say()

    # --- systemd -------------------------------------------------------------------------------------

    def _systemctl(self, arguments: list[str]) -> dict[str, object]:
        verb, *rest = arguments
        now = "--now" in rest
        units = [name for name in rest if not name.startswith("-")]
        for name in units:
            if not UNIT_NAME.fullmatch(name) or not self._unit(name).exists():
                raise Refused(f"systemctl {verb}: there is no unit {name}")
        if verb in {"enable", "disable"}:
            done = run("/usr/bin/systemctl", f"--root={self.root}", "--quiet", verb, *units)
            if done.returncode:
                raise Refused(done.stderr)
        if verb in {"stop", "restart"} or (verb == "disable" and now):
            self._stop(units)
        if verb in {"start", "restart"} or (verb == "enable" and now):
            self._start(units)
        self._expect(verb, {"enable", "disable", "start", "stop", "restart", "status", "daemon-reload"})
        return _say()

    def _start(self, units: list[str]) -> None:
        if "compute-broker.socket" in units:
            host, _, port = self.rewritten(
                one(self._unit("compute-broker.socket"), "Socket.ListenStream")
            ).partition(":")
            self._listening = socket.create_server((host, int(port)))
        if "compute-broker.service" in units:
            self._service = self._service or self._installed_service()
            self._service.start(self._listening)
            self._service.expect("READY=1")

    def _stop(self, units: list[str]) -> None:
        if "compute-broker.socket" in units and self._listening is not None:
            self._listening.close()
            self._listening = None
        service = self._service
        running = "compute-broker.service" in units and service is not None and service.running
        if service is not None and running and service.stop() != 0:
            raise Refused(f"the broker failed:\n{service.journal}")

    def _installed_service(self) -> Service:
        """What PID 1 would prepare: command, variables, home, state directory."""
        unit = self._unit("compute-broker.service")
        variables = {name: self.rewritten(value) for name, value in environment(unit).items()}
        home = self.path(f"/var/lib/{one(unit, 'Service.StateDirectory')}")
        home.mkdir(mode=int(one(unit, "Service.StateDirectoryMode"), 8), exist_ok=True)
        command = self.rewritten(one(unit, "Service.ExecStart")).split()
        return Service(command, {**variables, "HOME": str(home)}, self._folder)

    def _unit(self, name: str) -> Path:
        return self.path(f"/etc/systemd/system/{name}")

    # --- the wire between the stubs and here ---------------------------------------------------------

    def _stub(self, path: Path) -> None:
        address = self._calls.getsockname()
        path.write_text(STUB.format(python=sys.executable, address=address))
        path.chmod(0o755)

    def _answer_all(self) -> None:
        while True:
            try:
                call, _ = self._calls.accept()
            except OSError:
                return  # the machine is switched off
            with call, call.makefile("rw") as lines:
                name, *arguments = json.loads(lines.readline())
                self.commands.append([name, *arguments])
                try:
                    answer = self._answers()[name](arguments)
                except Exception as error:  # whatever went wrong belongs into the output of the command
                    answer = _say(f"{name}: {error}\n", 1)
                lines.write(json.dumps(answer) + "\n")

    @staticmethod
    def _expect(found: str, known: set[str]) -> None:
        if found not in known:
            raise Refused(f"{found!r} is none of {sorted(known)}")


def _become(*command: str) -> dict[str, object]:
    return {"exec": command, "output": "", "code": 0}


def _say(output: str = "", code: int = 0) -> dict[str, object]:
    return {"exec": [], "output": output, "code": code}
