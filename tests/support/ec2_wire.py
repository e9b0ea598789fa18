"""EC2's query protocol as the fault proxy reads and writes it: form parameters in, XML out. Pure.

Requests are form-encoded (`Action=…&InstanceId.1=…&Filter.1.Name=…`), answers are XML in one namespace,
errors are XML without one. (AWS: EC2 API reference, "Query requests" and "Error codes".)
Every address in an answer is rewritten to 127.x.y.z, because an emulator's addresses belong to somebody
and a test must never send a packet there.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl
from xml.etree import ElementTree

Element = ElementTree.Element
AddressKind = Literal["public", "private", "dns"]

NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15"
REGION_DEFAULT = "us-east-1"

STATE_CODES = {
    "pending": 0,
    "running": 16,
    "shutting-down": 32,
    "terminated": 48,
    "stopping": 64,
    "stopped": 80,
}

# Server errors are 5xx, client errors 4xx, 400 unless named here (AWS: EC2 API reference, "Error codes").
ERROR_STATUS_DEFAULT = 400
ERROR_STATUS = {
    "AuthFailure": 401,
    "InsufficientInstanceCapacity": 500,
    "InternalError": 500,
    "InternalFailure": 500,
    "RequestLimitExceeded": 503,
    "ServiceUnavailable": 503,
    "Unavailable": 503,
    "UnauthorizedOperation": 403,
}
ERROR_MESSAGE = {
    "AuthFailure": "AWS was not able to validate the provided access credentials",
    "InsufficientInstanceCapacity": "There is no capacity available that matches your request.",
    "InternalError": "An internal error has occurred",
    "RequestExpired": "Request has expired.",
    "RequestLimitExceeded": "Request limit exceeded.",
    "Unavailable": "The server is overloaded and can't handle the request.",
    "UnauthorizedOperation": "You are not authorized to perform this operation.",
}

_CREDENTIAL_SCOPE = re.compile(r"Credential=[^/,\s]+/\d+/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request")

_ADDRESS_TAGS: dict[str, AddressKind] = {
    "ipAddress": "public",
    "publicIp": "public",
    "dnsName": "dns",
    "publicDnsName": "dns",
    "privateIpAddress": "private",
    "privateDnsName": "private",
}


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter of a Describe: any of `values` may match; `*` and `?` are wildcards."""

    name: str
    values: tuple[str, ...]

    def accepts(self, value: str) -> bool:
        # Only * and ? mean anything to EC2; fnmatch would read a bracket as a set of characters.
        return any(fnmatch.fnmatchcase(value, pattern.replace("[", "[[]")) for pattern in self.values)


# ---------------------------------------------------------------- requests


def parse_form(body: bytes) -> dict[str, str]:
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))


def numbered(params: Mapping[str, str], prefix: str) -> tuple[str, ...]:
    """The values of `prefix.1`, `prefix.2`, … in order, each once."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)")
    found = sorted((int(m[1]), v) for k, v in params.items() if (m := pattern.fullmatch(k)))
    return tuple(dict.fromkeys(value for _, value in found))


def filters_of(params: Mapping[str, str]) -> tuple[Filter, ...]:
    names = sorted(
        (int(m[1]), v) for k, v in params.items() if (m := re.fullmatch(r"Filter\.(\d+)\.Name", k))
    )
    return tuple(Filter(name, numbered(params, f"Filter.{n}.Value")) for n, name in names)


def with_filters(params: Mapping[str, str], filters: Iterable[Filter]) -> dict[str, str]:
    """The same parameters with exactly these filters."""
    renewed = {k: v for k, v in params.items() if not k.startswith("Filter.")}
    for n, one in enumerate(filters, 1):
        renewed[f"Filter.{n}.Name"] = one.name
        renewed |= {f"Filter.{n}.Value.{m}": value for m, value in enumerate(one.values, 1)}
    return renewed


def scope_of(authorization: str) -> tuple[str, str]:
    """(region, service) out of a signature's credential scope; an unsigned request has no service."""
    found = _CREDENTIAL_SCOPE.search(authorization)
    return (found["region"], found["service"]) if found else (REGION_DEFAULT, "")


def signed_for(region: str, service: str = "ec2") -> str:
    """An Authorization header that names a region. moto reads the scope and checks no signature."""
    scope = f"testing/20000101/{region}/{service}/aws4_request"
    return f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"


# ---------------------------------------------------------------- answers


def tag(name: str) -> str:
    return f"{{{NAMESPACE}}}{name}"


def path(*names: str) -> str:
    return "/".join(tag(name) for name in names)


def text_of(element: Element, *names: str) -> str:
    return element.findtext(path(*names)) or ""


def set_text(element: Element, name: str, text: str) -> None:
    """Sets a direct child's text; adds the child when it is missing."""
    child = element.find(tag(name))
    if child is None:
        child = ElementTree.SubElement(element, tag(name))
    child.text = text


def remove(element: Element, *names: str) -> None:
    for name in names:
        for child in element.findall(tag(name)):
            element.remove(child)


def set_state(element: Element, state: str, name: str = "instanceState") -> None:
    holder = element.find(tag(name))
    if holder is None:
        holder = ElementTree.SubElement(element, tag(name))
    set_text(holder, "code", str(STATE_CODES[state]))
    set_text(holder, "name", state)


def to_xml(root: Element) -> bytes:
    body: bytes = ElementTree.tostring(
        root, encoding="utf-8", xml_declaration=True, default_namespace=NAMESPACE
    )
    return body


def answer_root(action: str) -> Element:
    root = Element(tag(f"{action}Response"))
    ElementTree.SubElement(root, tag("requestId")).text = str(uuid.uuid4())
    return root


def error_xml(code: str, message: str) -> bytes:
    root = Element("Response")
    error = ElementTree.SubElement(ElementTree.SubElement(root, "Errors"), "Error")
    ElementTree.SubElement(error, "Code").text = code
    ElementTree.SubElement(error, "Message").text = message
    ElementTree.SubElement(root, "RequestID").text = str(uuid.uuid4())
    body: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return body


def error_code_of(body: bytes) -> str:
    """The code in an error answer, or "unreadable" (moto answers some of its gaps with an HTML page)."""
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return "unreadable"
    return next((e.text or "" for e in root.iter() if e.tag.rpartition("}")[2] == "Code"), "unreadable")


def not_found_message(instance_ids: Iterable[str]) -> str:
    ids = ", ".join(instance_ids)
    return (
        f"The instance IDs '{ids}' do not exist" if "," in ids else f"The instance ID '{ids}' does not exist"
    )


# ---------------------------------------------------------------- addresses


def loopback_address(instance_id: str, kind: AddressKind = "public") -> str:
    """127.x.y.z for an instance, always the same for the same id and kind.

    x is 1..254, which leaves 127.0.0.0/16 to everybody else's loopback. Public, private and DNS name
    differ, so that a test can tell which of them was handed out. There are 16.5 million addresses: 100
    instances share one with a chance of 3 in 10,000.
    """
    a, b, c = hashlib.sha256(f"{kind}/{instance_id}".encode()).digest()[:3]
    return f"127.{1 + a % 254}.{b}.{1 + c % 254}"


def rewrite_addresses(element: Element, instance_id: str) -> None:
    """Every address and DNS name below an instance's element becomes the instance's loopback one."""
    for part in element.iter():
        kind = _ADDRESS_TAGS.get(part.tag.rpartition("}")[2])
        if kind is not None and part.text:
            part.text = loopback_address(instance_id, kind)


def scrub_addresses(body: bytes) -> bytes:
    """Any other EC2 answer with its addresses made harmless: the same address gives the same 127.x.y.z."""
    try:
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return body
    found = [e for e in root.iter() if e.tag.rpartition("}")[2] in _ADDRESS_TAGS and e.text]
    if not found:
        return body
    for element in found:
        element.text = loopback_address(element.text or "")
    return to_xml(root)


def strip_public_address(item: Element) -> None:
    """What EC2 shows while no public address is attached: no address, an empty DNS name."""
    remove(item, "ipAddress")
    set_text(item, "dnsName", "")
    for holder in list(item.iter()):
        remove(holder, "association")


def strip_every_address(item: Element) -> None:
    """What EC2 shows of a terminated instance: no interface, no subnet, no address."""
    strip_public_address(item)
    remove(item, "privateIpAddress", "subnetId", "vpcId", "networkInterfaceSet")
    set_text(item, "privateDnsName", "")
