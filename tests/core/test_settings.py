"""The settings: what is written is understood; what is not is said all at once, each problem with its key."""

from __future__ import annotations

import math
import re
from datetime import date, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from broker.core.errors import SettingsError
from broker.core.settings import (
    DURATION_SECONDS_MAX,
    BrokerSettings,
    ExposedError,
    PoolSettings,
    Section,
    Settings,
    duration_seconds,
    parse,
    require_private,
    schema,
    split_address,
)
from tests.core.generated import FEW, MANY

SECTIONS: list[type[Section]] = [BrokerSettings, PoolSettings]
KEYS = [(section, key) for section in SECTIONS for key in section.model_fields]
EC2 = {"provider": "ec2", "image": "ami-0123456789abcdef0", "instance_types": ["c7i.16xlarge"]}


def problems(document: dict[str, Any], environ: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        parse(document, environ or {})
    return caught.value.problems


def pool(environ: dict[str, str] | None = None, /, **values: Any) -> PoolSettings:
    return parse({"pool": {"default": values}}, environ or {}).pool["default"]


def broker(**values: Any) -> BrokerSettings:
    return parse({"broker": values}, {}).broker


# --- what is there without a file -----------------------------------------------------------------------


def test_nothing_at_all_is_the_embedded_default() -> None:
    settings = parse({}, {})
    assert settings == Settings()
    assert (settings.broker.id, settings.broker.listen, settings.broker.http) == (
        "local", "127.0.0.1:9000", "127.0.0.1:9100",
    )  # fmt: skip
    assert list(settings.pool) == ["default"]
    assert not settings.pool["default"].exclusive
    assert settings.pool["default"].price_usd_micros_per_hour == 0


def test_the_defaults_are_those_that_are_documented() -> None:
    broker_says, pool_says = parse({}, {}).broker.model_dump(), parse({}, {}).pool["default"].model_dump()
    assert {key: value for key, value in broker_says.items() if isinstance(value, int | float)} == {
        "insecure_listen": False, "connections_max": 12_000, "line_timeout": 30.0, "silence_timeout": 3600.0,
        "reconcile_interval": 30.0,
    }  # fmt: skip
    assert {key: value for key, value in pool_says.items() if value} == {
        "provider": "local", "worker_port": 2560, "readiness": "tcp", "readiness_max_age": 1.0,
        "sharing": "shared", "idle_timeout": 900.0, "max_lifetime": 28_800.0, "boot_deadline": 600.0,
        "wait": 900.0, "max_workers": 4, "launches_per_hour": 20, "boot_failures_max": 3, "market": "spot",
        "on_demand_after": 120.0,
        "region_order": "listed", "address": "public", "name_tag": "dserv-worker",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "least", "most"),
    [
        ("worker_port", 1, 65_535), ("max_workers", 0, None), ("launches_per_hour", 0, None),
        ("boot_failures_max", 1, None), ("price_usd_per_hour", 0, None), ("budget_usd_per_day", 0, None),
        ("wait", 0, DURATION_SECONDS_MAX),
    ],
)  # fmt: skip
def test_a_number_may_be_as_small_and_as_large_as_makes_sense(key: str, least: int, most: int | None) -> None:
    assert getattr(pool(**{key: least}), key) == least
    assert len(problems({"pool": {"default": {key: least - 1}}})) == 1
    if most is not None:
        assert getattr(pool(**{key: most}), key) == most
        assert len(problems({"pool": {"default": {key: most + 1}}})) == 1


def test_the_broker_itself_has_its_limits_too() -> None:
    assert broker(connections_max=1, reconcile_interval="5m").connections_max == 1
    found = problems({"broker": {"connections_max": 0, "reconcile_interval": 301}})
    assert [problem.partition(":")[0] for problem in found] == [
        "broker.connections_max", "broker.reconcile_interval",
    ]  # fmt: skip


def test_the_default_pool_exists_whatever_pools_there_are() -> None:
    settings = parse({"pool": {"gpu": {"max_workers": 1}}}, {})
    assert {name: it.max_workers for name, it in settings.pool.items()} == {"default": 4, "gpu": 1}


def test_the_defaults_would_be_accepted_if_somebody_wrote_them() -> None:
    settings = parse({}, {})
    assert parse(settings.model_dump(mode="json", exclude_none=True), {}) == settings


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_every_key_says_in_a_sentence_what_it_does(section: type[Section], key: str) -> None:
    description = section.model_fields[key].description or ""
    assert re.match(r"[A-Z]|(ec2|local|shared|tcp|auto): ", description)
    assert description.endswith(".")


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_the_schema_knows_every_key_with_its_description_and_default(
    section: type[Section], key: str
) -> None:
    told = schema()["$defs"][section.__name__]["properties"][section.model_fields[key].alias or key]
    assert told["description"] == section.model_fields[key].description
    assert "default" in told


def test_the_schema_takes_a_duration_as_words_or_as_seconds() -> None:
    told = schema()["$defs"]["PoolSettings"]["properties"]["idle_timeout"]
    assert set(told["type"]) == {"string", "number"}


@pytest.mark.parametrize("place", [("broker", "id"), ("broker", "listen")])
def test_settings_do_not_change(place: tuple[str, str]) -> None:
    settings = parse({}, {})
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings.broker, place[1], "other")
    with pytest.raises(ValidationError, match="frozen"):
        settings.broker = BrokerSettings.model_validate({})


def test_the_file_of_the_documentation_is_understood() -> None:
    settings = parse(
        {
            "broker": {"id": "lab", "state_dir": "/var/lib/compute-broker", "listen": "127.0.0.1:9000"},
            "pool": {
                "default": {
                    **EC2,
                    "region": "us-east-1",
                    "market": "spot",
                    "security_group_ids": ["sg-1", "sg-2"],
                    "readiness": "tcp",
                    "idle_timeout": "15m",
                    "max_lifetime": "8h",
                    "sharing": "exclusive",
                    "price_usd_per_hour": 1.0832,
                    "tags": {"owner": "ann"},
                }
            },
        },
        {},
    )
    lab = settings.pool["default"]
    assert (lab.instance_types, lab.security_group_ids) == (("c7i.16xlarge",), ("sg-1", "sg-2"))
    assert (lab.exclusive, lab.price_usd_micros_per_hour, lab.tags) == (True, 1_083_200, {"owner": "ann"})


# --- durations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("500ms", 0.5), ("30s", 30.0), ("15m", 900.0), ("8h", 28_800.0), ("2d", 172_800.0), ("1.5h", 5_400.0),
        ("90", 90.0), (" 90 ", 90.0), (90, 90.0), (0.25, 0.25), ("0", 0.0), (0, 0.0), (5e-05, 5e-05),
    ],
)  # fmt: skip
def test_a_duration_is_read_in_its_unit(written: object, seconds: float) -> None:
    assert duration_seconds(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "written",
    ["", "soon", "15 m", "15M", "1h30m", "-1s", -1, ".5s", "1,5h", True, None, [], math.inf, math.nan, "inf"],
)
def test_what_is_no_duration_says_how_to_write_one(written: object) -> None:
    with pytest.raises(ValueError, match='is no duration: write "30s", "15m", "8h" or a number of seconds'):
        duration_seconds(written)


@given(st.floats(0, DURATION_SECONDS_MAX))
@FEW
def test_seconds_are_seconds_however_few(seconds: float) -> None:
    assert duration_seconds(seconds) == seconds
    assert pool(wait=seconds).wait == seconds


def test_a_duration_has_a_maximum_of_ten_years() -> None:
    assert pool(max_lifetime="3650d").max_lifetime == DURATION_SECONDS_MAX
    for long in ("3651d", "9" * 400 + "d", 10**400):
        assert problems({"pool": {"default": {"max_lifetime": long}}}) == (
            "pool.default.max_lifetime: input should be less than or equal to 315360000",
        )


def test_some_durations_may_be_nothing_and_others_may_not() -> None:
    assert pool(wait=0, readiness_max_age="0s").wait == 0.0
    assert problems({"pool": {"default": {"idle_timeout": 0}}}) == (
        "pool.default.idle_timeout: input should be greater than 0",
    )


# --- addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "host", "port"),
    [
        ("127.0.0.1:9000", "127.0.0.1", 9000), ("127.8.9.10:1", "127.8.9.10", 1),
        ("localhost:0", "localhost", 0),
        ("[::1]:65535", "::1", 65535),
    ],
)  # fmt: skip
def test_an_address_on_loopback_may_be_listened_on(written: str, host: str, port: int) -> None:
    assert split_address(broker(listen=written, http=written).listen) == (host, port)


@pytest.mark.parametrize(
    "written",
    [
        "", "9000", 9000, ":9000", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536", "a:-1",
        "a:²", True, {},
    ],
)  # fmt: skip
def test_what_is_no_address_says_how_to_write_one(written: object) -> None:
    assert problems({"broker": {"listen": written}}) == (
        'broker.listen: is no address: write "127.0.0.1:9000"',
    )


EXPOSED = [
    "0.0.0.0:9000",
    "[::]:9000",
    "10.0.0.5:9000",
    "broker.example:9000",
    "127.0.0.1.example:9000",
    "0:9000",
]


@pytest.mark.parametrize("written", EXPOSED)
@pytest.mark.parametrize("key", ["listen", "http"])
def test_nobody_listens_beyond_loopback_by_accident(key: str, written: str) -> None:
    (problem,) = problems({"broker": {key: written}})
    assert problem.startswith(f"broker.{key}: ")
    assert f'"{written}" is reachable from other machines' in problem
    assert "insecure_listen = true" in problem


@pytest.mark.parametrize("written", EXPOSED)
def test_whoever_says_so_may_listen_beyond_loopback(written: str) -> None:
    assert broker(listen=written, http=written, insecure_listen=True).listen == written


def test_a_socket_that_somebody_else_opened_is_held_to_the_same() -> None:
    require_private("a socket on 0.0.0.0", "0.0.0.0", insecure_listen=True)
    require_private("a socket on ::1", "::1", insecure_listen=False)
    with pytest.raises(ExposedError, match=r"a socket on 0\.0\.0\.0 is reachable from other machines"):
        require_private("a socket on 0.0.0.0", "0.0.0.0", insecure_listen=False)


# --- the environment ----------------------------------------------------------------------------------------


def variable(*path: str) -> str:
    return "__".join(("COMPUTE_BROKER", *path))


def test_a_variable_beats_the_file() -> None:
    environ = {variable("POOL", "DEFAULT", "MAX_WORKERS"): "3", variable("BROKER", "ID"): "lab"}
    settings = parse({"broker": {"id": "file"}, "pool": {"default": {"max_workers": 9, "wait": 5}}}, environ)
    assert (settings.broker.id, settings.pool["default"].max_workers, settings.pool["default"].wait) == (
        "lab", 3, 5.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("IDLE_TIMEOUT", "15m", 900.0),
        ("PRICE_USD_PER_HOUR", "0.5", 0.5),
        ("ADOPT_NAME_TAG", "true", True),
        ("SHARING", "exclusive", "exclusive"),
        ("INSTANCE_TYPES", "c7i.large, c6i.large,", ("c7i.large", "c6i.large")),
        ("SECURITY_GROUP_IDS", "sg-1", ("sg-1",)),
        ("COMMAND", "/usr/bin/worker  --port 2560", ("/usr/bin/worker", "--port", "2560")),
        ("REGION", "eu-west-1", "eu-west-1"),
    ],
)
def test_a_variable_is_read_as_what_its_key_wants(key: str, written: str, value: object) -> None:
    assert getattr(pool({variable("POOL", "DEFAULT", key): written}), key.lower()) == value


def test_a_pools_dashes_are_underscores_in_a_variables_name() -> None:
    environ = {variable("POOL", "GPU_BIG", "MAX_WORKERS"): "7"}
    assert parse({"pool": {"gpu-big": {"wait": 1}}}, environ).pool["gpu-big"].max_workers == 7
    assert parse({}, environ).pool["gpu-big"].max_workers == 7, "a pool may be made of variables alone"


def test_a_pool_whose_name_is_wrong_is_not_made_a_second_time() -> None:
    found = problems({"pool": {"gpu_big": {}}}, {variable("POOL", "GPU_BIG", "MAX_WORKERS"): "many"})
    assert [problem.partition(":")[0] for problem in found] == ["pool.gpu_big", "pool.gpu_big.max_workers"]


def test_other_peoples_variables_are_none_of_our_business() -> None:
    environ = {
        "COMPUTE_BROKER_CONFIG": "/x",
        "COMPUTE_BROKER_HOST": "y",
        "PATH": "z",
        "compute_broker__a": "1",
    }
    assert parse({}, environ) == parse({}, {})


@pytest.mark.parametrize(
    "path",
    [
        ("",),
        ("BROKER",),
        ("POOL",),
        ("POOL", "DEFAULT"),
        ("MAX_WORKERS",),
        ("POOL", "DEFAULT", "TAGS", "OWNER"),
    ],
)
def test_a_variable_of_ours_that_names_no_setting_is_a_problem(path: tuple[str, ...]) -> None:
    name = variable(*path)
    assert problems({}, {name: "1"}) == (
        f"{name}: names no setting; write COMPUTE_BROKER__POOL__DEFAULT__MAX_WORKERS for instance",
    )


@pytest.mark.parametrize(
    ("document", "key"),
    [({"broker": 5}, "broker"), ({"pool": 5}, "pool"), ({"pool": {"default": 5}}, "pool.default")],
)
def test_a_variable_does_not_hide_that_the_file_has_no_table_there(
    document: dict[str, Any], key: str
) -> None:
    environ = {variable("BROKER", "ID"): "lab", variable("POOL", "DEFAULT", "MAX_WORKERS"): "3"}
    assert [problem.partition(":")[0] for problem in problems(document, environ)] == [key]


def test_a_document_is_not_changed_by_the_variables() -> None:
    document: dict[str, Any] = {"pool": {"default": {"max_workers": 1}}}
    parse(document, {variable("POOL", "DEFAULT", "MAX_WORKERS"): "3"})
    assert document == {"pool": {"default": {"max_workers": 1}}}


# --- problems -----------------------------------------------------------------------------------------------


def test_every_problem_is_said_at_once_with_its_key() -> None:
    found = problems(
        {
            "brokr": {},
            "broker": {"id": "no spaces", "log_level": "loud", "listen": "here", "nonsense": 1},
            "pool": {"default": {"idle_timeout": "soon", "worker_port": 0}, "GPU": {}},
        },
        {variable("NONSENSE"): "1", variable("POOL", "DEFAULT", "MAX_WORKERS"): "many"},
    )
    assert {problem.partition(":")[0] for problem in found} == {
        "brokr", "broker.id", "broker.log_level", "broker.listen", "broker.nonsense", "pool.GPU",
        "pool.default.idle_timeout", "pool.default.worker_port", "pool.default.max_workers",
        variable("NONSENSE"),
    }  # fmt: skip


def test_a_problem_between_two_keys_is_said_beside_the_others() -> None:
    found = problems(
        {
            "broker": {"listen": "0.0.0.0:9000", "http": "0.0.0.0:9100", "log_level": "loud"},
            "pool": {
                "gpu": {"provider": "ec2", "max_worker": 1, "tags": {"Name": "x"}},
                "default": {"user_data": "#!", "user_data_file": "boot.sh"},
            },
        }
    )
    assert {problem.partition(":")[0] for problem in found} == {
        "broker.listen", "broker.http", "broker.log_level", "pool.gpu.image", "pool.gpu.instance_types",
        "pool.gpu.max_worker", "pool.gpu.tags", "pool.default.user_data_file",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("document", "key", "meant"),
    [
        ({"pool": {"default": {"max_worker": 3}}}, "pool.default.max_worker", "max_workers"),
        ({"pool": {"gpu": {"instance_type": []}}}, "pool.gpu.instance_type", "instance_types"),
        ({"broker": {"listen_on": "x"}}, "broker.listen_on", "listen"),
        ({"pools": {}}, "pools", "pool"),
    ],
)
def test_a_slip_of_the_pen_is_told_what_was_meant(document: dict[str, Any], key: str, meant: str) -> None:
    assert problems(document) == (f"{key}: there is no such setting; did you mean {meant}?",)


def test_what_resembles_nothing_is_told_no_guess() -> None:
    assert problems({"xyz": {}, "broker": {"xyz": 1}}) == (
        "broker.xyz: there is no such setting",
        "xyz: there is no such setting",
    )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"provider": "gcp"}, "provider: input should be 'local' or 'ec2'"),
        ({"max_workers": -1}, "max_workers: input should be greater than or equal to 0"),
        ({"insecure": 1}, "insecure: there is no such setting"),
        ({"worker_port": 65536}, "worker_port: input should be less than or equal to 65535"),
        ({"boot_failures_max": 0}, "boot_failures_max: input should be greater than or equal to 1"),
        ({"price_usd_per_hour": math.inf}, "price_usd_per_hour: input should be a finite number"),
        ({"price_usd_per_hour": -0.1}, "price_usd_per_hour: input should be greater than or equal to 0"),
        ({"instance_types": [5]}, "instance_types.0: input should be a valid string"),
        ({"tags": "owner"}, "tags: input should be a valid dictionary"),
        ({"name_tag": ""}, "name_tag: string should have at least 1 character"),
        ({"name_tag": "x" * 256}, "name_tag: string should have at most 255 characters"),
    ],
)  # fmt: skip
def test_a_value_that_is_wrong_says_what_would_be_right(values: dict[str, Any], problem: str) -> None:
    assert problems({"pool": {"default": values}}) == (f"pool.default.{problem}",)


@pytest.mark.parametrize("name", ["Gpu", "1st", "gpu_big", "-", "", "x" * 33, "gpu\n"])
def test_a_pools_name_is_fit_for_a_protocol_word_and_a_metric_label(name: str) -> None:
    assert problems({"pool": {name: {}}})[0].startswith(f"pool.{name}: string should match pattern")


@pytest.mark.parametrize("name", ["", "no spaces", "-lab", "x" * 33, "lab\n"])
def test_a_brokers_id_is_fit_for_a_tag(name: str) -> None:
    assert problems({"broker": {"id": name}})[0].startswith("broker.id: string should match pattern")


@pytest.mark.parametrize("missing", [{"image"}, {"instance_types"}, {"image", "instance_types"}], ids=sorted)
def test_an_ec2_pool_says_what_it_lacks(missing: set[str]) -> None:
    values = {key: value for key, value in EC2.items() if key not in missing}
    assert problems({"pool": {"gpu": values}}) == tuple(
        f'pool.gpu.{key}: provider = "ec2" needs it' for key in sorted(missing)
    )


def test_a_script_comes_from_one_place() -> None:
    assert problems({"pool": {"default": {"user_data": "#!", "user_data_file": "x"}}}) == (
        "pool.default.user_data_file: user_data and user_data_file exclude each other",
    )
    assert pool(user_data="#!").user_data_file is None
    assert pool(user_data_file="boot.sh").user_data_file == "boot.sh"


@pytest.mark.parametrize("key", ["Name", "compute-broker:pool", "compute-broker:x", "aws:x", "AWS:x"])
def test_tags_that_are_the_brokers_or_amazons_cannot_be_set(key: str) -> None:
    assert problems({"pool": {"default": {"tags": {key: "x", "fine": "y"}}}}) == (
        f"pool.default.tags: may not contain {key}: the broker or AWS keeps these",
    )


def test_ten_places_for_tags_are_left_to_the_broker() -> None:
    forty = {f"tag-{number}": "x" for number in range(40)}
    assert pool(tags=forty).tags == forty
    assert problems({"pool": {"default": {"tags": {**forty, "one-more": "x"}}}}) == (
        "pool.default.tags: holds more than 40 entries",
    )


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just(10**400),
    st.just(date(2026, 1, 31)), st.just(datetime(2026, 1, 31, 8)),
    st.sampled_from(["ec2", "0.0.0.0:1", "5m", "a:1"]),
)  # fmt: skip
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=2)


def tables(section: type[Section]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(list(section.model_fields)) | st.text(max_size=10)
    return st.dictionaries(keys, VALUES, max_size=4) | SCALARS


POOLS = st.dictionaries(st.sampled_from(["default", "gpu", "Bad"]), tables(PoolSettings), max_size=2)
DOCUMENTS = st.fixed_dictionaries(
    {}, optional={"broker": tables(BrokerSettings), "pool": POOLS | SCALARS, "else": VALUES}
)
NAMES = [("BROKER", "LISTEN"), ("POOL", "GPU", "MAX_WORKERS"), ("POOL",), ("", "")]
VARIABLES = st.dictionaries(
    st.sampled_from([variable(*name) for name in NAMES]), st.text(max_size=10), max_size=2
)
KEYED = re.compile(r"(broker|pool|else|COMPUTE_BROKER__)[^:]*: .", re.DOTALL)


@given(document=DOCUMENTS, environ=VARIABLES)
@example(document={"pool": {"default": {"price_usd_per_hour": math.nan}}}, environ={})
@MANY
def test_whatever_is_written_there_are_settings_or_problems_with_their_keys(
    document: dict[str, Any], environ: dict[str, str]
) -> None:
    try:
        settings = parse(document, environ)
    except SettingsError as error:
        settings, found = None, error.problems
    if settings is None:
        assert found
        assert all(KEYED.match(problem) for problem in found)
        return
    assert "default" in settings.pool
    for it in settings.pool.values():
        assert it.price_usd_micros_per_hour >= 0
        assert 0 < it.idle_timeout <= DURATION_SECONDS_MAX


@pytest.mark.parametrize("key", ["subnets", "zones"])
def test_one_subnet_and_several_places_exclude_each_other(key: str) -> None:
    with pytest.raises(SettingsError) as raised:
        parse({"pool": {"default": {"subnet": "subnet-1", key: ["a"]}}}, {})
    assert raised.value.problems == (
        f"pool.default.{key}: subnet lies in one zone and excludes it; name subnets = [...] instead",
    )


def test_a_zone_that_is_named_twice_is_one() -> None:
    settings = parse({"pool": {"default": {"zones": "us-east-1a, us-east-1b, us-east-1a"}}}, {})
    assert settings.pool["default"].zones == ("us-east-1a", "us-east-1b")


# --- several regions --------------------------------------------------------------------------------------

EC2_POOL: dict[str, Any] = {"provider": "ec2", "image": "/lab/image", "instance_types": ["m7i.large"]}
TWO = ["us-east-1", "eu-central-1"]


def in_regions(**keys: Any) -> PoolSettings:
    return parse({"pool": {"default": {**EC2_POOL, **keys}}}, {}).pool["default"]


def problems_of(**keys: Any) -> str:
    with pytest.raises(SettingsError) as raised:
        in_regions(**keys)
    return "\n".join(raised.value.problems)


def test_a_pool_without_regions_is_the_same_wherever_it_is() -> None:
    pool = in_regions(region="us-east-1")
    assert pool.by_region == (pool,)
    assert pool.at("us-east-1") is pool


def test_a_pool_counts_in_each_of_its_regions_as_it_is() -> None:
    here, there = in_regions(
        regions=[*TWO, TWO[0]], security_groups=["lab"], region_order="latency"
    ).by_region
    assert (here.region, there.region) == tuple(TWO)
    assert there == in_regions(region=TWO[1], security_groups=["lab"])


def test_a_table_says_what_is_otherwise_in_its_region() -> None:
    table = {"image": "ami-2", "subnets": ["subnet-2"], "security_group_ids": ["sg-2"], "user_data": "two"}
    pool = {"image": "ami-1", "zones": ["us-east-1a"], "security_groups": ["lab"], "user_data_file": "/one"}
    here, there = in_regions(regions=TWO, **pool, **{"in": {TWO[1]: table}}).by_region
    assert here == in_regions(region=TWO[0], **pool)
    assert there == in_regions(region=TWO[1], **table)  # what it replaces is gone: no zone, no group by name


def test_a_pool_needs_no_image_that_each_of_its_regions_has() -> None:
    own = {one: {"image": f"ami-{one}"} for one in TWO}
    assert [one.image for one in in_regions(image=None, regions=TWO, **{"in": own}).by_region] == [
        "ami-us-east-1",
        "ami-eu-central-1",
    ]
    assert "needs it" in problems_of(image=None, regions=TWO, **{"in": {TWO[0]: {"image": "ami-1"}}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image", "ami-1"),
        ("zones", ["us-east-1a"]),
        ("subnet", "subnet-1"),
        ("subnets", ["subnet-1"]),
        ("security_group_ids", ["sg-1"]),
    ],
)
def test_an_id_that_lies_in_one_region_is_refused_for_two(key: str, value: Any) -> None:
    problem = problems_of(regions=TWO, **{key: value})
    assert problem.startswith(f"pool.default.{key}: ")
    assert "us-east-1 and eu-central-1" in problem
    assert "[pool.NAME.in.eu-central-1]" in problem
    assert in_regions(regions=TWO, **{key: value}, **{"in": {TWO[1]: {key: value}}})
    assert in_regions(regions=TWO[:1], **{key: value})


def test_what_regions_exclude_and_need_is_said() -> None:
    assert "region and regions exclude each other" in problems_of(regions=TWO, region=TWO[0])
    assert "has regions" in problems_of(regions=TWO, provider="local")
    assert "subnet lies in one zone" in problems_of(
        regions=TWO, **{"in": {TWO[0]: {"subnet": "a", "zones": ["b"]}}}
    )
    assert "exclude each other" in problems_of(
        regions=TWO, **{"in": {TWO[0]: {"user_data": "a", "user_data_file": "b"}}}
    )


def test_a_table_names_a_region_of_the_pool_and_settings_that_there_are() -> None:
    assert problems_of(regions=TWO, **{"in": {"eu-central-2": {}}}) == (
        "pool.default.in: eu-central-2: is none of the pool's regions (us-east-1, eu-central-1); "
        "did you mean eu-central-1?"
    )
    assert problems_of(region=TWO[0], **{"in": {TWO[0]: {}}}).endswith("regions (none)")
    assert problems_of(regions=TWO, **{"in": {TWO[0]: {"imge": "a"}}}) == (
        "pool.default.in.us-east-1.imge: there is no such setting; did you mean image?"
    )


# --- warm workers -----------------------------------------------------------------------------------------

OFFICE = "Mon-Fri 08:00-19:00 Europe/Berlin"


def test_a_warm_schedule_is_a_table_of_times_and_numbers() -> None:
    lab = pool(warm=1, warm_schedule={OFFICE: 2, "Sat,Sun 00:00-24:00": 0})
    assert lab.warm_schedule == {OFFICE: 2, "Sat,Sun 00:00-24:00": 0}
    assert [number for _, number in lab.warm_targets.windows] == [2, 0]
    assert lab.warm_targets.otherwise == 1


@pytest.mark.parametrize(
    ("values", "keeps"),
    [
        ({}, False), ({"warm": 1}, True), ({"warm_schedule": {OFFICE: 2}}, True),
        ({"warm_schedule": {OFFICE: 0}}, False),
    ],
)  # fmt: skip
def test_a_pool_knows_whether_it_ever_keeps_a_worker_that_nobody_asked_for(
    values: dict[str, Any], keeps: bool
) -> None:
    assert pool(**values).keeps_warm == keeps


def test_every_mistake_in_a_schedule_is_said_with_its_key_and_an_example() -> None:
    found = problems(
        {
            "pool": {
                "default": {"warm_schedule": {"Mo 08:00-19:00": 1, "Mon 8-19": 1, OFFICE: -1}, "warm": "x"}
            }
        }
    )
    assert sorted(problem.partition(": ")[0] for problem in found) == [
        "pool.default.warm", "pool.default.warm_schedule.Mo 08:00-19:00",
        "pool.default.warm_schedule.Mon 8-19", f"pool.default.warm_schedule.{OFFICE}",
    ]  # fmt: skip
    assert sum('for example "Mon-Fri 08:00-19:00 Europe/Berlin" = 2' in problem for problem in found) == 2


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"warm": 5}, "warm: asks for 5 warm workers, and max_workers = 4: raise that, or ask for fewer"),
        ({"warm_schedule": {OFFICE: 3}, "max_workers": 2},
         "warm_schedule: asks for 3 warm workers, and max_workers = 2: raise that, or ask for fewer"),
    ],
)  # fmt: skip
def test_more_warm_workers_than_the_cap_allows_are_a_mistake(values: dict[str, Any], problem: str) -> None:
    assert problems({"pool": {"default": values}}) == (f"pool.default.{problem}",)


def test_a_schedule_can_come_from_the_environment_as_json() -> None:
    variable = "COMPUTE_BROKER__POOL__DEFAULT__WARM_SCHEDULE"
    assert pool({variable: f'{{"{OFFICE}": 2}}'}).warm_schedule == {OFFICE: 2}
    [problem] = problems({}, {variable: f"{OFFICE} = 2"})
    assert problem.startswith("pool.default.warm_schedule: is no table: write { ")
    assert '{"Mon-Fri 08:00-19:00 Europe/Berlin": 2}' in problem
    [problem] = problems({}, {variable: "[2]"})
    assert problem == "pool.default.warm_schedule: input should be a valid dictionary"


def test_a_hard_lifetime_is_no_shorter_than_the_ordinary_one() -> None:
    (problem,) = problems({"pool": {"default": {"max_lifetime": "8h", "hard_lifetime": "7h"}}}, {})
    assert problem.startswith("pool.default.hard_lifetime: is shorter than max_lifetime (28800 s)")
    equal = parse({"pool": {"default": {"max_lifetime": "8h", "hard_lifetime": "8h"}}}, {})
    assert equal.pool["default"].hard_lifetime == 28_800.0


@pytest.mark.parametrize("key", ["uses_max", "workers_per_client_max"])
def test_a_limit_of_nobody_is_a_mistake(key: str) -> None:
    (problem,) = problems({"pool": {"default": {key: 0}}}, {})
    assert problem.startswith(f"pool.default.{key}: ")
