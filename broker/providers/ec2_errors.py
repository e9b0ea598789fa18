"""Every error of EC2 and of its SDK → one of ours, with a sentence that names cause and remedy.

The question behind the table is always: may the call have been carried out although it failed? A client
error (4xx) that AWS itself wrote means it was not. Everything else (server errors, silence, answers that
are not AWS's) means nobody knows. AWS's own words are quoted by their first sentence only, and not at all
where they speak of credentials.

Sources of the codes: AWS, EC2 API reference, "Error codes for the Amazon EC2 API", unless noted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from botocore import exceptions as sdk

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


class TemplateExists(CloudError):
    """the launch template is there already"""


class TemplateMissing(CloudError):
    """EC2 does not know the launch template"""


TEMPLATE_OUTCOMES: dict[type[CloudError], str] = {TemplateExists: "ok", TemplateMissing: "not-found"}

QUOTED_CHARS_MAX = 200  # of AWS's words: what a client reads stays one line
CLOCK_SKEW_SECONDS_NOTABLE = (
    60.0  # AWS tolerates 5 minutes (InvalidSecurity.RequestHasExpired); say it earlier
)

OK, CANCELLED = "ok", "cancelled"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a code means to us. `quote` is off where AWS's own words add nothing or may hold secrets."""

    kind: type[CloudError]
    sentence: str
    quote: bool = True


NO_CAPACITY = Meaning(
    OfferingRefused,
    "AWS has no capacity for this machine type at the moment; another type or zone may have it",
)
NOT_OFFERED = Meaning(OfferingRefused, "AWS does not offer this machine type on this market in this zone")
PRICE_TOO_LOW = Meaning(OfferingRefused, "the spot price is above the maximum price")
SUBNET_FULL = Meaning(OfferingRefused, "the subnet has no free addresses: use a larger subnet")
QUOTA = Meaning(
    QuotaReached, "a quota of the AWS account is reached: ask AWS for more in the Service Quotas console"
)
SLOW_DOWN = Meaning(Throttled, "AWS asks for fewer calls")
CREDENTIALS = Meaning(
    CredentialsRefused,
    "AWS does not accept the credentials: they are wrong, expired or revoked, or this machine's clock is off",
    quote=False,
)
NO_PERMISSION = Meaning(PermanentRefusal, "", quote=False)  # its sentence names the action: see _permission
ACCOUNT = Meaning(PermanentRefusal, "the AWS account may not do this: look for notices in the AWS console")
SPOT_ROLE = Meaning(
    PermanentRefusal,
    "the AWS account has no role for spot yet: run "
    "`aws iam create-service-linked-role --aws-service-name spot.amazonaws.com` once",
    quote=False,
)
IMAGE = Meaning(PermanentRefusal, "the image cannot be used in this region: correct the pool's `image`")
KEY_PAIR = Meaning(PermanentRefusal, "the key pair is not there: correct the pool's `key_name`")
SUBNET = Meaning(PermanentRefusal, "the subnet is not there: correct the pool's `subnet`")
GROUP = Meaning(PermanentRefusal, "a security group is not there: correct the pool's `security_group_ids`")
PROFILE = Meaning(
    PermanentRefusal, "the instance profile cannot be used: correct the pool's `instance_profile`"
)
NO_VPC = Meaning(PermanentRefusal, "the region has no default VPC: name a `subnet` for the pool")
NO_ZONE = Meaning(PermanentRefusal, "the zone is not there or not open to this account")
TAGS = Meaning(PermanentRefusal, "the tags are not accepted: correct the pool's `tags`")
PROTECTED = Meaning(
    PermanentRefusal, "the machine may not be ended this way: look at its termination protection"
)
NO_ANSWER = Meaning(CloudUnreachable, "EC2 has a fault of its own")
LISTING_BROKE = Meaning(CloudUnreachable, "EC2 lost the place in a listing: ask for it again", quote=False)
NOT_FOUND = Meaning(InstanceNotFound, "EC2 does not know the machine at the moment")
USED_OTHERWISE = Meaning(OrderMismatch, "EC2 saw this order's token with other parameters", quote=False)
TEMPLATE_EXISTS = Meaning(TemplateExists, "the launch template is there already", quote=False)
TEMPLATE_MISSING = Meaning(TemplateMissing, "EC2 does not know the launch template", quote=False)
SPENT = Meaning(OrderSpent, "the machine of this order was launched and is gone already", quote=False)

MEANINGS: dict[str, Meaning] = {
    # The offering: try another one, come back to this one later.
    "InsufficientInstanceCapacity": NO_CAPACITY,
    "InsufficientHostCapacity": NO_CAPACITY,
    "InsufficientCapacityOnHost": NO_CAPACITY,
    "InsufficientReservedInstanceCapacity": NO_CAPACITY,
    "InsufficientReservedInstancesCapacity": NO_CAPACITY,
    "InsufficientVolumeCapacity": NO_CAPACITY,
    "InsufficientAddressCapacity": NO_CAPACITY,
    "InsufficientCapacity": NO_CAPACITY,
    "ReservationCapacityExceeded": NO_CAPACITY,
    "UnfulfillableCapacity": NO_CAPACITY,
    "Unsupported": NOT_OFFERED,
    "InvalidFleetConfiguration": NOT_OFFERED,  # of a fleet: "your requested instance type is not supported"
    "UnsupportedOperation": NOT_OFFERED,  # for a launch: "an instance type that is not supported by the AMI"
    "VolumeTypeNotAvailableInZone": NOT_OFFERED,
    "SpotMaxPriceTooLow": PRICE_TOO_LOW,
    "InsufficientFreeAddressesInSubnet": SUBNET_FULL,
    # The account's quotas.
    "MaxSpotInstanceCountExceeded": QUOTA,
    "VcpuLimitExceeded": QUOTA,
    "InstanceLimitExceeded": QUOTA,
    "VolumeLimitExceeded": QUOTA,
    "MaxIOPSLimitExceeded": QUOTA,
    "NetworkInterfaceLimitExceeded": QUOTA,
    "ResourceLimitExceeded": QUOTA,
    "ResourceCountExceeded": QUOTA,
    "RequestResourceCountExceeded": QUOTA,
    # Too many calls. What EC2 does not document is in AWS's "Common errors" (STS) or the SDK's own list.
    "RequestLimitExceeded": SLOW_DOWN,
    "Throttling": SLOW_DOWN,
    "ThrottlingException": SLOW_DOWN,
    "ThrottledException": SLOW_DOWN,
    "RequestThrottled": SLOW_DOWN,
    "RequestThrottledException": SLOW_DOWN,
    "EC2ThrottledException": SLOW_DOWN,
    "TooManyRequestsException": SLOW_DOWN,
    "BandwidthLimitExceeded": SLOW_DOWN,
    "PriorRequestNotComplete": SLOW_DOWN,
    "SlowDown": SLOW_DOWN,
    "ConcurrentTagAccess": SLOW_DOWN,
    # Who we are. The ones on tokens: AWS, STS and IAM API references, "Common errors".
    "AuthFailure": CREDENTIALS,
    "InvalidClientTokenId": CREDENTIALS,
    "SignatureDoesNotMatch": CREDENTIALS,
    "IncompleteSignature": CREDENTIALS,
    "MissingAuthenticationToken": CREDENTIALS,
    "RequestExpired": CREDENTIALS,
    "InvalidSecurity.RequestHasExpired": CREDENTIALS,
    "ExpiredToken": CREDENTIALS,
    "ExpiredTokenException": CREDENTIALS,
    "InvalidToken": CREDENTIALS,
    "InvalidAccessKeyId": CREDENTIALS,
    "RequestTimeTooSkewed": CREDENTIALS,
    "UnrecognizedClientException": CREDENTIALS,
    # What we may do.
    "UnauthorizedOperation": NO_PERMISSION,
    "AccessDenied": NO_PERMISSION,
    "AccessDeniedException": NO_PERMISSION,
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted": SPOT_ROLE,  # (AWS: EC2 user guide, spot requests)
    "ServiceLinkedRoleCreationNotPermitted": SPOT_ROLE,
    "AccountDisabled": ACCOUNT,
    "Blocked": ACCOUNT,
    "OptInRequired": ACCOUNT,
    "PendingVerification": ACCOUNT,
    # What the pool asks for does not exist.
    "InvalidAMIID.Malformed": IMAGE,
    "InvalidAMIID.NotFound": IMAGE,
    "InvalidAMIID.Unavailable": IMAGE,
    "InvalidKeyPair.NotFound": KEY_PAIR,
    "InvalidSubnet": SUBNET,
    "InvalidSubnetID.Malformed": SUBNET,
    "InvalidSubnetID.NotFound": SUBNET,
    "InvalidSubnetId.NotFound": SUBNET,
    "InvalidGroup.NotFound": GROUP,
    "InvalidGroupId.Malformed": GROUP,
    "InvalidSecurityGroupID.NotFound": GROUP,
    "InvalidSecurityGroupId.Malformed": GROUP,
    "InvalidIamInstanceProfileArn.Malformed": PROFILE,
    "VPCIdNotSpecified": NO_VPC,
    "DefaultVpcDoesNotExist": NO_VPC,
    "InvalidAvailabilityZone": NO_ZONE,
    "InvalidZone.NotFound": NO_ZONE,
    "InvalidTagKey.Malformed": TAGS,
    "TagLimitExceeded": TAGS,
    "TagPolicyViolation": TAGS,
    "OperationNotPermitted": PROTECTED,
    # A launch template.
    "InvalidLaunchTemplateName.AlreadyExistsException": TEMPLATE_EXISTS,
    "InvalidLaunchTemplateName.NotFoundException": TEMPLATE_MISSING,
    "InvalidLaunchTemplateId.NotFoundException": TEMPLATE_MISSING,
    # One machine.
    "InvalidInstanceID.NotFound": NOT_FOUND,
    "InvalidInstanceID.Malformed": NOT_FOUND,  # an id that cannot be one is not known either
    # One order.
    "IdempotentParameterMismatch": USED_OTHERWISE,
    "IdempotentInstanceTerminated": SPENT,
    # Nobody knows what became of the call.
    "InternalError": NO_ANSWER,
    "InternalFailure": NO_ANSWER,
    "ServerInternal": NO_ANSWER,
    "ServiceUnavailable": NO_ANSWER,
    "Unavailable": NO_ANSWER,
    "RetryableError": NO_ANSWER,
    "RequestTimeout": NO_ANSWER,
    "RequestTimeoutException": NO_ANSWER,
    "InvalidPaginationToken": LISTING_BROKE,
    "InvalidNextToken": LISTING_BROKE,
}

# An AMI that belongs to somebody else is an AuthFailure too ("trying to use an AMI for which you do not have
# permissions"); its message begins with these words.
FOREIGN_IMAGE = "Not authorized for images"

LAUNCHES = frozenset({"RunInstances", "CreateFleet"})
# What a call cannot mean: an error that only makes sense for other calls is a refusal like any other.
ONLY_FROM: dict[type[CloudError], frozenset[str]] = {
    OfferingRefused: LAUNCHES | {"StartInstances"},
    QuotaReached: LAUNCHES | {"StartInstances"},
    OrderMismatch: LAUNCHES,
    OrderSpent: LAUNCHES,
    TemplateExists: frozenset({"CreateLaunchTemplate"}),
    TemplateMissing: frozenset({"CreateFleet"}),
    InstanceNotFound: frozenset({"CreateTags", "StartInstances", "StopInstances", "TerminateInstances"}),
}

SILENCES: tuple[tuple[type[Exception], str], ...] = (
    (sdk.ProxyConnectionError, "the HTTP proxy cannot be reached"),
    (sdk.SSLError, "the TLS connection is not trusted (is a proxy in between, or the clock far off?)"),
    (sdk.ConnectTimeoutError, "no connection within the time limit"),
    (sdk.EndpointConnectionError, "no connection (is the network up, and the region's name right?)"),
    (sdk.ReadTimeoutError, "no answer within the time limit"),
    (sdk.ConnectionClosedError, "the connection broke before the answer came"),
    (sdk.HTTPClientError, "the connection broke"),
    (sdk.ConnectionError, "no connection"),
)
CREDENTIAL_FAULTS = (
    sdk.NoCredentialsError,
    sdk.NoAuthTokenError,
    sdk.PartialCredentialsError,
    sdk.CredentialRetrievalError,
    sdk.TokenRetrievalError,
    sdk.RefreshWithMFAUnsupportedError,
    sdk.MetadataRetrievalError,
    sdk.SSOError,
    sdk.LoginError,
)
ACTION_NAMED = re.compile(r"perform: (?P<action>[a-z0-9-]+:[A-Za-z]+)")
SECRETS = re.compile(r"Encoded authorization failure message:.*|\b(?:AKIA|ASIA)[A-Z0-9]{12,}", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.!?])\s")


def translate(error: Exception, api: str, now_unix: float) -> CloudError:
    """Whatever a call of `api` raised, as one of ours. Never raises."""
    if isinstance(error, sdk.ClientError):
        return _answered(error, api, now_unix)
    if isinstance(error, sdk.ParamValidationError):
        return PermanentRefusal(f"{api} cannot be sent: {_first_sentence(str(error))}")
    if isinstance(error, CREDENTIAL_FAULTS):
        source = error.kwargs.get("provider", "")
        return CredentialsRefused(
            "no AWS credentials can be had"
            + (f" from {source}" if source else "")
            + ": renew them or log in again"
        )
    for kind, phrase in SILENCES:
        if isinstance(error, kind):
            return CloudUnreachable(f"AWS does not answer {api}: {phrase}{_place(error)}")
    # An answer that cannot be parsed, or a fault inside the SDK: the call may have been carried out.
    return CloudUnreachable(f"EC2's answer to {api} cannot be understood ({type(error).__name__})")


def outcome_of(error: CloudError) -> str:
    """The label of a failed call, from OUTCOMES."""
    return TEMPLATE_OUTCOMES.get(type(error)) or OUTCOMES[type(error)]


def client_error(api: str, code: str, message: str = "", status: int = 400) -> Exception:
    """The error an SDK client raises for such an answer: for stand-ins of the client."""
    response: Any = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return sdk.ClientError(response, api)


def refusal(api: str, code: str, words: str) -> CloudError:
    """An error that stands within an answer: nothing was launched for what it is about."""
    return translate(client_error(api, code, words), api, 0.0)


def _answered(error: sdk.ClientError, api: str, now_unix: float) -> CloudError:
    response: dict[str, Any] = dict(error.response)
    details = response.get("Error") or {}
    code, words = str(details.get("Code") or ""), str(details.get("Message") or "")
    status = int((response.get("ResponseMetadata") or {}).get("HTTPStatusCode") or 0)
    meaning = _meaning(code, words, status)
    if error.operation_name != api and meaning.kind not in (Throttled, CloudUnreachable):
        meaning = CREDENTIALS  # the call was another one: the SDK was fetching credentials (STS, SSO)
    if api not in ONLY_FROM.get(meaning.kind, {api}):
        meaning = Meaning(PermanentRefusal, f"EC2 refuses {api}")
    if meaning is NO_PERMISSION:
        return PermanentRefusal(_permission(api, code, words))
    remark = f"{code}: {_first_sentence(words)}" if meaning.quote and words else code
    if meaning is CREDENTIALS:
        remark += _clock_remark(response, now_unix)
    return meaning.kind(f"{meaning.sentence or f'EC2 refuses {api}'} ({remark})")


def _meaning(code: str, words: str, status: int) -> Meaning:
    if code == "AuthFailure" and words.startswith(FOREIGN_IMAGE):
        return IMAGE
    if code in MEANINGS:
        return MEANINGS[code]
    if status == 429:
        return SLOW_DOWN
    if not code or code.isdigit():  # the SDK fills in the status when the answer is not AWS's: a proxy spoke
        return Meaning(
            CloudUnreachable, "something between here and AWS answered instead of EC2", quote=False
        )
    if status >= 500 or status == 408:
        return NO_ANSWER
    return Meaning(PermanentRefusal, "EC2 refuses the call as it stands")


def _permission(api: str, code: str, words: str) -> str:
    named = ACTION_NAMED.search(words)
    action = named["action"] if named else f"ec2:{api}"
    remedy = "a policy forbids it explicitly" if "explicit deny" in words else "allow it in their IAM policy"
    if not named and api in LAUNCHES:
        remedy += ", with ec2:CreateTags, and iam:PassRole for an instance profile"
    return f"the AWS credentials may not perform {action}: {remedy} ({code})"


def _clock_remark(response: dict[str, Any], now_unix: float) -> str:
    """By how much this machine's clock differs from the one that stamped the answer, when it matters."""
    headers = (response.get("ResponseMetadata") or {}).get("HTTPHeaders") or {}
    try:
        skew_seconds = now_unix - parsedate_to_datetime(str(headers.get("date"))).timestamp()
    except ValueError:
        return ""
    if abs(skew_seconds) < CLOCK_SKEW_SECONDS_NOTABLE:
        return ""
    side = "ahead of" if skew_seconds > 0 else "behind"
    return f"; this machine's clock is {abs(skew_seconds):.0f} s {side} AWS's"


def _first_sentence(words: str) -> str:
    plain = " ".join(SECRETS.sub("", words).split())
    sentence = SENTENCE_END.split(plain, maxsplit=1)[0].rstrip(".")
    return sentence if len(sentence) <= QUOTED_CHARS_MAX else sentence[: QUOTED_CHARS_MAX - 3] + "..."


def _place(error: Exception) -> str:
    """The host that was asked; the rest of the URL may hold what is nobody's business."""
    host = urlsplit(str(getattr(error, "kwargs", {}).get("endpoint_url") or "")).hostname
    return f" [{host}]" if host else ""
