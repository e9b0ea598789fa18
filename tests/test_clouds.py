"""What is known of each cloud's health, and when nothing is bought from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from broker.clouds import SCAN_FAILURES_MAX, Cloud, Clouds
from broker.core.errors import (
    BrokerError,
    CloudError,
    CloudUnreachable,
    Code,
    CredentialsRefused,
    SettingsError,
    Throttled,
)
from broker.core.model import Offering
from broker.providers.base import Provider
from broker.testing import FakeCloud, ManualClock


class Named:
    """A provider of which nothing but its name is asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def offerings(self, pool: str) -> Sequence[Offering]:
        return ()


def cloud(name: str = "ec2 us-east-1") -> Cloud:
    return Cloud(cast(Provider, Named(name)))


def scanned(at: float = 10.0) -> Cloud:
    one = cloud()
    one.scan_succeeded(at, 1.8e9)
    return one


def test_a_cloud_counts_as_seen_only_after_a_complete_listing() -> None:
    one = cloud()
    assert not one.recovered
    one.scan_failed(CloudUnreachable())
    assert not one.recovered
    one.scan_succeeded(0.0, 1.8e9)
    assert one.recovered, "also when its clock began at zero"
    one.scan_failed(CloudUnreachable())
    assert one.recovered, "what has been seen once stays known"


def test_before_the_first_listing_the_first_failure_is_told_at_once() -> None:
    one = cloud()
    assert one.refusal() is None, "nothing is known yet: who asks waits"
    one.scan_failed(CloudUnreachable("connection reset"))
    refusal = one.refusal()
    assert refusal is not None
    assert refusal.message == "ec2 us-east-1 cannot be used at the moment: connection reset"
    assert refusal.code is Code.CLOUD


def test_a_scan_or_two_may_fail_before_a_cloud_counts_as_unreachable() -> None:
    one = scanned()
    for _ in range(SCAN_FAILURES_MAX - 1):
        one.scan_failed(Throttled())
        assert one.refusal() is None
    one.scan_failed(Throttled())
    assert one.refusal() is not None


def test_refused_credentials_are_told_at_once_because_waiting_does_not_mend_them() -> None:
    one = scanned()
    one.scan_failed(CredentialsRefused())
    refusal = one.refusal()
    assert refusal is not None
    assert "clock is off" in refusal.message


def test_one_good_scan_ends_an_outage() -> None:
    one = scanned()
    for _ in range(10):
        one.scan_failed(CloudUnreachable())
    one.scan_succeeded(99.0, 1.8e9)
    assert one.refusal() is None
    assert (one.failures, one.error, one.scanned_at) == (0, None, 99.0)


def test_settings_that_do_not_work_are_told_whatever_the_scans_say() -> None:
    one = scanned()
    one.mistake = SettingsError(["pool.default.image: there is no such image"])
    refusal = one.refusal()
    assert refusal is not None
    assert refusal.message == "the broker's settings do not work: pool.default.image: there is no such image"


@pytest.mark.parametrize("error", [CloudError("no\nway"), CredentialsRefused("\x1b[31mno"), BrokerError()])
def test_a_refusal_is_one_printable_line_whatever_the_cloud_has_said(error: BrokerError) -> None:
    one = cloud()
    one.scan_failed(error)
    refusal = one.refusal()
    assert refusal is not None
    assert refusal.wire().isprintable()
    assert refusal.wire().startswith("ERROR: ")


def test_pools_that_buy_at_one_place_share_its_cloud() -> None:
    here, there = cast(Provider, Named("here")), cast(Provider, Named("there"))
    clouds = Clouds({"default": [here], "gpu": [here], "far": [there]})
    assert clouds.of("default") == clouds.of("gpu") != clouds.of("far")
    assert [one.provider.name for one in clouds.all] == ["here", "there"]
    assert clouds.of("forgotten") == ()


def test_all_clouds_must_have_been_seen_before_the_broker_knows_its_workers() -> None:
    clouds = Clouds({name: [cast(Provider, Named(name))] for name in ("here", "there")})
    assert not clouds.recovered()
    clouds.all[0].scan_succeeded(1.0, 1.8e9)
    assert not clouds.recovered()
    clouds.all[1].scan_succeeded(1.0, 1.8e9)
    assert clouds.recovered()


def test_the_fake_that_is_shipped_is_a_provider() -> None:
    assert Cloud(FakeCloud("lab", clock=ManualClock())).provider.name == "fake"
