"""Runs a command under the kernel rules of a service unit, without systemd as PID 1.

    python -m tests.deploy.sandbox UNIT COMMAND [ARGUMENT …]

What systemd would do with the unit's CapabilityBoundingSet=, NoNewPrivileges=, MemoryDenyWriteExecute=,
RestrictAddressFamilies=, SystemCallFilter=, LimitCORE= and UMask=, in that order, then exec. The system calls
behind a group's name come from the installed systemd, the filter is built by the library systemd uses itself.
Left out is what needs mounts or another user: Protect*=, TemporaryFileSystem=, User=.

Sources: systemd.exec(5), prctl(2), seccomp_rule_add(3).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import mmap
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.deploy.unit_file import keys, one

PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38  # linux/prctl.h
SCMP_ACT_ALLOW, SCMP_ACT_ERRNO = 0x7FFF0000, 0x00050000  # seccomp.h
SCMP_CMP_EQ, SCMP_CMP_MASKED_EQ = 4, 7  # seccomp.h
CAPABILITIES_MAX = 64  # the kernel has 41 (linux/capability.h); above its last one the drop answers EINVAL
PROT_ARGUMENT = 2  # the third argument of mmap(2), mprotect(2) and pkey_mprotect(2) is the protection


class Argument(ctypes.Structure):
    """`struct scmp_arg_cmp`: a rule that holds only for some values of one argument."""

    _fields_ = (
        ("index", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def seccomp_library() -> ctypes.CDLL | None:
    """libseccomp, or None where it is not installed."""
    name = ctypes.util.find_library("seccomp")
    if name is None:
        return None
    library = ctypes.CDLL(name, use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_load.argtypes = (ctypes.c_void_p,)
    library.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(Argument),
    )
    return library


def system_call_groups() -> dict[str, set[str]]:
    """`@group` → its members, which may be groups again, as the installed systemd has them."""
    listing = subprocess.run(
        ["systemd-analyze", "--no-pager", "syscall-filter"], capture_output=True, text=True, check=True
    ).stdout
    groups: dict[str, set[str]] = {}
    members: set[str] = set()
    for line in listing.splitlines():
        if line.startswith("@"):
            members = groups.setdefault(line.strip(), set())
        elif line.startswith(" ") and line.strip() and not line.strip().startswith("#"):
            members.add(line.strip())
    return groups


def expand(names: Iterable[str], groups: dict[str, set[str]]) -> set[str]:
    """System calls behind names and groups; a group that the listing lacks is an error."""
    calls: set[str] = set()
    for name in names:
        calls |= expand(groups[name], groups) if name.startswith("@") else {name}
    return calls


def allowed_calls(unit: Path) -> set[str]:
    """What is left of the first SystemCallFilter= line, the allowed ones, after the `~` lines."""
    groups = system_call_groups()
    allowed: set[str] = set()
    for line in keys(unit)["Service.SystemCallFilter"]:
        named = expand(line.lstrip("~").split(), groups)
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


def conditions(call: str, families: Iterable[int], deny_write_execute: bool) -> list[Argument] | None:
    """The arguments with which a call is allowed, one rule each; None: with any."""
    write, execute = mmap.PROT_WRITE, mmap.PROT_EXEC
    if call == "socket":
        return [Argument(0, SCMP_CMP_EQ, family, 0) for family in families]
    if call == "mmap" and deny_write_execute:
        harmless = (0, write, execute)
        return [Argument(PROT_ARGUMENT, SCMP_CMP_MASKED_EQ, write | execute, value) for value in harmless]
    if call in {"mprotect", "pkey_mprotect"} and deny_write_execute:
        return [Argument(PROT_ARGUMENT, SCMP_CMP_MASKED_EQ, execute, 0)]
    return None


def load_filter(unit: Path, library: ctypes.CDLL) -> None:
    """The unit's seccomp rules, for this process and all it starts."""
    families = [getattr(socket, name) for name in one(unit, "Service.RestrictAddressFamilies").split()]
    deny_write_execute = keys(unit).get("Service.MemoryDenyWriteExecute") == ["yes"]
    refusal = SCMP_ACT_ERRNO | getattr(errno, one(unit, "Service.SystemCallErrorNumber"))
    context = library.seccomp_init(refusal)
    for call in sorted(allowed_calls(unit)):
        number = library.seccomp_syscall_resolve_name(call.encode())
        if number < 0:
            continue  # a call of another architecture
        rules = conditions(call, families, deny_write_execute)
        for rule in [None] if rules is None else rules:
            pointer = None if rule is None else ctypes.pointer(rule)
            failed = library.seccomp_rule_add_array(
                context, SCMP_ACT_ALLOW, number, rule is not None, pointer
            )
            assert failed == 0, (call, failed)
    assert library.seccomp_load(context) == 0


def give_up_privileges(unit: Path) -> None:
    """An empty bounding set, when we are root, and no way to gain anything by exec."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert one(unit, "Service.CapabilityBoundingSet") == ""
    for capability in range(CAPABILITIES_MAX):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    assert one(unit, "Service.NoNewPrivileges") == "yes"
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0


def main(unit: Path, command: list[str]) -> None:
    """Never returns: becomes the command."""
    library = seccomp_library()
    assert library is not None, "libseccomp is not installed"
    limit_core = int(one(unit, "Service.LimitCORE"))
    resource.setrlimit(resource.RLIMIT_CORE, (limit_core, limit_core))
    os.umask(int(one(unit, "Service.UMask"), 8))
    give_up_privileges(unit)
    load_filter(unit, library)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
