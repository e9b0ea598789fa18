"""A target and what was measured against it: met, missed, or not measured. Never a guess."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    what: str
    wanted: str
    measured: str
    met: bool | None  # None: not measured, and `measured` says why

    @property
    def word(self) -> str:
        return {True: "met", False: "**missed**", None: "not measured"}[self.met]


def at_least(what: str, wanted: float, measured: float | None, why_not: str) -> Verdict:
    if measured is None:
        return Verdict(what, f"≥ {wanted:g} x", why_not, None)
    return Verdict(what, f"≥ {wanted:g} x", f"{measured:.2f} x", measured >= wanted)


def at_most(what: str, wanted: float, measured: float, unit: str) -> Verdict:
    return Verdict(what, f"≤ {wanted:g} {unit}", f"{measured:.3g} {unit}", measured <= wanted)
