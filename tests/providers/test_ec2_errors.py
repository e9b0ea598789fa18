"""The error table: what each of EC2's words means to the broker, and what a person gets to read."""

from __future__ import annotations

import pytest
from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError

from broker.core.errors import (
    CloudError,
    CloudUnreachable,
    CredentialsRefused,
    InstanceNotFound,
    OfferingRefused,
    OrderMismatch,
    OrderSpent,
    PermanentRefusal,
    QuotaReached,
    Throttled,
)
from broker.providers.base import OUTCOMES
from broker.providers.ec2_errors import MEANINGS, client_error, outcome_of, translate
from tests.providers.ec2_support import NOW_UNIX


def launch_error(code: str, message: str = "", status: int = 400, api: str = "RunInstances") -> CloudError:
    return translate(client_error(api, code, message, status), api, NOW_UNIX)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("InsufficientInstanceCapacity", 500, OfferingRefused),
        ("UnfulfillableCapacity", 400, OfferingRefused),
        ("Unsupported", 400, OfferingRefused),
        ("InsufficientFreeAddressesInSubnet", 400, OfferingRefused),
        ("SpotMaxPriceTooLow", 400, OfferingRefused),
        ("MaxSpotInstanceCountExceeded", 400, QuotaReached),
        ("VcpuLimitExceeded", 400, QuotaReached),
        ("RequestLimitExceeded", 503, Throttled),
        ("UnknownThrottle", 429, Throttled),
        ("UnauthorizedOperation", 403, PermanentRefusal),
        ("InvalidAMIID.NotFound", 400, PermanentRefusal),
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", 403, PermanentRefusal),
        ("InvalidParameterValue", 400, PermanentRefusal),
        ("SomethingNewNextYear", 400, PermanentRefusal),
        ("AuthFailure", 401, CredentialsRefused),
        ("RequestExpired", 400, CredentialsRefused),
        ("ExpiredToken", 400, CredentialsRefused),
        ("SignatureDoesNotMatch", 403, CredentialsRefused),
        ("InvalidClientTokenId", 403, CredentialsRefused),
        ("IdempotentParameterMismatch", 400, OrderMismatch),
        ("IdempotentInstanceTerminated", 400, OrderSpent),
        ("InternalError", 500, CloudUnreachable),
        ("Unavailable", 503, CloudUnreachable),
        ("SomethingNewNextYear", 500, CloudUnreachable),
        ("SomethingNewNextYear", 408, CloudUnreachable),
        ("403", 403, CloudUnreachable),
        ("", 404, CloudUnreachable),
    ],
)
def test_every_refusal_of_a_launch_becomes_the_error_that_says_what_to_do(
    code: str, status: int, kind: type[CloudError]
) -> None:
    assert type(launch_error(code, status=status)) is kind


@pytest.mark.parametrize("code", sorted(MEANINGS))
@pytest.mark.parametrize("api", ["RunInstances", "DescribeInstances", "TerminateInstances"])
def test_every_code_gives_one_readable_line_and_a_label_from_the_closed_list(code: str, api: str) -> None:
    error = launch_error(code, "The words of AWS. And more of them.", api=api)
    assert code in error.message
    assert "\n" not in error.message
    assert "And more" not in error.message
    assert error.message[0].islower() or error.message.startswith(("AWS", "EC2"))
    assert outcome_of(error) in OUTCOMES.values()


def test_what_only_makes_sense_for_a_launch_is_a_plain_refusal_elsewhere() -> None:
    assert type(launch_error("UnsupportedOperation", api="TerminateInstances")) is PermanentRefusal
    assert type(launch_error("ResourceLimitExceeded", api="CreateTags")) is PermanentRefusal
    assert type(launch_error("InvalidInstanceID.NotFound", api="DescribeInstances")) is PermanentRefusal
    assert type(launch_error("InvalidInstanceID.NotFound", api="CreateTags")) is InstanceNotFound


def test_a_missing_permission_is_named_and_the_encoded_message_left_out() -> None:
    words = (
        "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/lab is not "
        "authorized to perform: iam:PassRole on resource: arn:aws:iam::123456789012:role/w because no "
        "identity-based policy allows it. Encoded authorization failure message: aGVsbG8gd29ybGQ"
    )
    message = launch_error("UnauthorizedOperation", words, 403).message
    assert message == (
        "the AWS credentials may not perform iam:PassRole: allow it in their IAM policy "
        "(UnauthorizedOperation)"
    )


def test_an_unnamed_missing_permission_of_a_launch_mentions_what_a_launch_needs() -> None:
    message = launch_error("UnauthorizedOperation", "You are not authorized.", 403).message
    assert "ec2:RunInstances" in message
    assert "ec2:CreateTags" in message
    assert "iam:PassRole" in message


def test_an_explicit_deny_is_said_to_be_one() -> None:
    words = "not authorized to perform: ec2:RunInstances with an explicit deny in a service control policy"
    assert "forbids it explicitly" in launch_error("UnauthorizedOperation", words, 403).message


def test_someone_elses_image_is_not_a_matter_of_credentials() -> None:
    error = launch_error("AuthFailure", "Not authorized for images: [ami-12cb8f72]")
    assert type(error) is PermanentRefusal
    assert "`image`" in error.message
    assert "ami-12cb8f72" in error.message


def test_refused_credentials_tell_by_how_much_the_clock_is_off() -> None:
    failure = client_error("DescribeInstances", "AuthFailure", "AWS was not able to validate", 401)
    failure.response["ResponseMetadata"]["HTTPHeaders"] = {"date": "Thu, 01 Jan 2026 00:00:00 GMT"}  # type: ignore[attr-defined]
    assert "clock is 400 s ahead of AWS's" in translate(failure, "DescribeInstances", NOW_UNIX + 400).message
    assert "clock is 400 s behind AWS's" in translate(failure, "DescribeInstances", NOW_UNIX - 400).message
    assert "behind" not in translate(failure, "DescribeInstances", NOW_UNIX - 5).message


def test_no_message_quotes_a_signature_or_an_access_key() -> None:
    leak = "The Canonical String should have been 'x-amz-security-token:FwoGZXIvYXdz' AKIAIOSFODNN7EXAMPLE"
    assert launch_error("SignatureDoesNotMatch", leak, 403).message.endswith("(SignatureDoesNotMatch)")
    assert "AKIA" not in launch_error("InvalidParameterValue", leak).message


def test_a_long_explanation_is_cut_to_its_first_sentence() -> None:
    words = (
        "We currently do not have sufficient c5.24xlarge capacity in the Availability Zone you requested "
        "(us-east-1a). Our system will be working on provisioning additional capacity."
    )
    message = launch_error("InsufficientInstanceCapacity", words, 500).message
    assert message.endswith("(us-east-1a))")
    assert len(launch_error("InvalidParameterValue", "x" * 5_000).message) < 400


def test_an_error_while_fetching_credentials_is_about_the_credentials() -> None:
    refused = client_error(
        "AssumeRole", "AccessDenied", "User is not authorized to perform: sts:AssumeRole", 403
    )
    assert type(translate(refused, "RunInstances", NOW_UNIX)) is CredentialsRefused
    throttled = client_error("AssumeRole", "Throttling", "Rate exceeded")
    assert type(translate(throttled, "RunInstances", NOW_UNIX)) is Throttled


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (sdk.ReadTimeoutError(endpoint_url="https://ec2.us-east-1.amazonaws.com/"), "no answer within"),
        (
            sdk.ConnectTimeoutError(endpoint_url="https://ec2.us-east-1.amazonaws.com/"),
            "no connection within",
        ),
        (sdk.EndpointConnectionError(endpoint_url="https://ec2.us-eats-1.amazonaws.com/"), "region's name"),
        (sdk.ConnectionClosedError(endpoint_url="https://x/"), "broke before the answer"),
        (sdk.ProxyConnectionError(proxy_url="http://user:secret@proxy:3128"), "proxy"),
        (sdk.SSLError(endpoint_url="https://x/", error=OSError("self signed")), "TLS"),
        (sdk.HTTPClientError(error="?"), "connection broke"),
        (ResponseParserError("garbage"), "cannot be understood"),
        (RuntimeError("a fault inside the SDK"), "cannot be understood"),
    ],
)
def test_silence_leaves_open_whether_the_launch_happened(error: Exception, phrase: str) -> None:
    ours = translate(error, "RunInstances", NOW_UNIX)
    assert type(ours) is CloudUnreachable
    assert ours.sent
    assert phrase in ours.message
    assert "secret" not in ours.message


def test_silence_names_the_host_that_was_asked() -> None:
    silence = sdk.EndpointConnectionError(endpoint_url="https://ec2.us-eats-1.amazonaws.com/")
    assert "[ec2.us-eats-1.amazonaws.com]" in translate(silence, "DescribeInstances", NOW_UNIX).message


@pytest.mark.parametrize(
    "error",
    [
        sdk.NoCredentialsError(),
        sdk.CredentialRetrievalError(provider="custom-process", error_msg="key=SECRET"),
        sdk.SSOTokenLoadError(error_msg="expired"),
    ],
)
def test_credentials_that_cannot_be_fetched_are_refused_credentials(error: Exception) -> None:
    ours = translate(error, "DescribeInstances", NOW_UNIX)
    assert type(ours) is CredentialsRefused
    assert "SECRET" not in ours.message


def test_parameters_the_sdk_refuses_were_never_sent() -> None:
    ours = translate(
        sdk.ParamValidationError(report="Invalid type for parameter KeyName"), "RunInstances", NOW_UNIX
    )
    assert type(ours) is PermanentRefusal
    assert "KeyName" in ours.message
