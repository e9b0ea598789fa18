"""Which installation of the broker this is: one state directory on one host.

A host's machine-id outlives the state directory, so a broker that lost all it knew is still the owner of its
machines and waits for nobody. It is confidential (machine-id(5)), so only a hash of it leaves the host. Two
hosts with one machine-id, as clones of one disk image may be, are one installation to this rule: give each
its own with systemd-machine-id-setup.
"""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

MACHINE_ID = Path("/etc/machine-id")
OWNER_CHARS = 12  # 48 bits: two of a dozen brokers never meet, and a person can compare them
WRITTEN = re.compile(r"[0-9a-f]{32}")  # anything else is no id yet: "uninitialized" at the first boot


def owner_of(state_dir: Path, machine_id: Path = MACHINE_ID) -> str | None:
    """The owner in short hexadecimal; None on a host without a machine-id (macOS, most containers)."""
    try:
        text = machine_id.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not WRITTEN.fullmatch(text):
        return None
    return sha256(f"compute-broker {text} {state_dir.absolute()}".encode()).hexdigest()[:OWNER_CHARS]
