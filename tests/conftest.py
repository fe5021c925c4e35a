"""A level of tests that must run can't be skipped in silence: `pytest -m lab --require-level lab`.

A level is a marker of pyproject.toml. With the option, a skip of a test of that level (or of a module that speaks of
it) is a failure, and so is a run in which no test of that level was found.

And the longest files come first: workers that share the tests out by files are then done at about the same time.

A test of real processes on a real clock that fails is run again some seconds later, twice at most: such a test waits
for something with patience, and a machine that others use can be without time for longer (the host of a virtual one
took a quarter of it for minutes). The summary names each; `.ci/run` fails where a level has too many of them. Tests of
code alone have one go; no case of theirs fails for its time.

pytest-timeout sets one timer for all goes of a test and the pauses between them. Here each go has a timer of its own,
and so has taking down: what hangs twice, or once more while it is taken down, is a failure with a name.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest
import pytest_timeout
from hypothesis import settings

LONG = ("tests/e2e/test_recovery.py", "tests/e2e/", "tests/testbed/")
"""Where tests start processes and wait for them; the longest first."""

REAL = (
    "tests/e2e/",
    "tests/testbed/",
    "tests/install/",
    *(
        f"tests/agent/test_{name}.py"
        for name in (
            "ahead",
            "databroker",
            "finding",
            "garbage",
            "inference",
            "measuring_memory",
            "processes",
            "service",
            "store_and_fetch",
        )
    ),
    *(f"tests/coordinator/test_{name}.py" for name in ("openai", "operations", "pump", "runner", "taps")),
    "tests/hwprofiles/test_link_mqtt.py",
    "tests/hwprofiles/test_sampler.py",
    *(
        f"tests/wire/test_{name}.py"
        for name in ("broker", "discovery", "lane", "light", "mqtt", "several", "transport")
    ),
)
"""Where processes, brokers and links are real, and so is the clock."""

settings.register_profile("edgelam", deadline=None)
settings.load_profile("edgelam")

# As models.engine does for the programs: some tests import onnxruntime by itself.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-level",
        action="append",
        default=[],
        metavar="MARKER",
        help="fail where a test with this marker is skipped, and where there is none; may be given more than once",
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    expected = hasattr(report, "wasxfail")
    for level in item.config.getoption("--require-level"):
        if report.skipped and not expected and item.get_closest_marker(level):
            report.outcome = "failed"
            report.longrepr = f"level '{level}' is required here, but this test was skipped: {reason(report.longrepr)}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if getattr(item, "execution_count", 1) > 1:
        time_anew(item)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, None]:
    time_anew(item)
    yield
    item.config.pluginmanager.hook.pytest_timeout_cancel_timer(item=item)


def time_anew(item: pytest.Item) -> None:
    hook, limits = item.config.pluginmanager.hook, pytest_timeout._get_item_settings(item)
    hook.pytest_timeout_cancel_timer(item=item)
    if limits.timeout:
        hook.pytest_timeout_set_timer(item=item, settings=limits)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    if not (report.skipped and isinstance(collector, pytest.Module)):
        return
    text = collector.path.read_text(encoding="utf-8")
    for level in collector.config.getoption("--require-level"):
        if f"mark.{level}" in text:
            report.outcome = "failed"
            report.longrepr = (
                f"level '{level}' is required here, but this module was skipped: {reason(report.longrepr)}"
            )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((at for at, path in enumerate(LONG) if item.nodeid.startswith(path)), len(LONG)))
    if config.pluginmanager.hasplugin("rerunfailures"):
        for item in items:
            if item.nodeid.startswith(REAL) and item.get_closest_marker("flaky") is None:
                item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=5))
    for level in config.getoption("--require-level"):
        if not any(item.get_closest_marker(level) for item in items):
            raise pytest.UsageError(f"level '{level}' is required here, but no test of it was selected")


def reason(longrepr: Any) -> str:
    """The words of a skip report: (path, line, reason)."""
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
