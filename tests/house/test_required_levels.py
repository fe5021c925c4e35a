"""`--require-level`: a level that must run can't be skipped in silence. And what hangs is a failure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SKIPPED = """
import pytest

@pytest.mark.lab
def test_needs_root():
    pytest.skip("needs root")

def test_other():
    pytest.skip("not this level")
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    shutil.copy(Path(__file__).resolve().parents[1] / "conftest.py", pytester.path / "conftest.py")
    pytester.makeini("[pytest]\nmarkers =\n    lab: a level\n")
    return pytester


def test_a_skip_of_a_required_level_fails_with_its_reason(project: pytest.Pytester) -> None:
    project.makepyfile(SKIPPED)
    done = project.runpytest_inprocess("--require-level", "lab")
    done.assert_outcomes(failed=1, skipped=1)
    done.stdout.fnmatch_lines(["*level 'lab' is required here, but this test was skipped: *needs root*"])


def test_without_the_option_a_skip_is_a_skip(project: pytest.Pytester) -> None:
    project.makepyfile(SKIPPED)
    project.runpytest_inprocess().assert_outcomes(skipped=2)


def test_a_skip_by_marker_counts_too(project: pytest.Pytester) -> None:
    project.makepyfile("import pytest\n@pytest.mark.lab\n@pytest.mark.skipif(True, reason='no')\ndef test_it(): pass\n")
    project.runpytest_inprocess("--require-level", "lab").assert_outcomes(errors=1)


def test_a_module_that_is_skipped_as_a_whole_counts_too(project: pytest.Pytester) -> None:
    project.makepyfile("import pytest\npytest.importorskip('no_such_module')\npytestmark = pytest.mark.lab\n")
    done = project.runpytest_inprocess("--require-level", "lab")
    assert done.ret != 0
    done.stdout.fnmatch_lines(["*level 'lab' is required here*"])


def test_a_level_without_tests_fails(project: pytest.Pytester) -> None:
    project.makepyfile("def test_other(): pass\n")
    assert project.runpytest_inprocess("--require-level", "lab").ret != 0


def test_what_hangs_in_each_go_and_in_taking_down_ends_as_a_failure(project: pytest.Pytester) -> None:
    project.makepyfile(
        """
        import time
        import pytest

        pytestmark = [pytest.mark.timeout(0.3), pytest.mark.flaky(reruns=1, reruns_delay=0.5)]

        @pytest.fixture
        def slow_to_go():
            yield
            time.sleep(60)

        def test_hangs():
            time.sleep(60)

        def test_hangs_going(slow_to_go):
            pass
        """
    )
    done = project.runpytest_subprocess(timeout=40)
    found = done.parseoutcomes()
    assert (found["failed"], found["errors"], found["rerun"]) == (1, 1, 2), found
