"""Every Rust test that needs a kernel, one by one, on every kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ublk_rig import layout, rusttests, support

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_vm.guest import Guest

BODY_SECS = 240
# Rust's harness knows "passed" and "failed". A test that its kernel rules out says so and returns; one that saw a
# feature refused, because the kernel lacks it, says what.
NOT_RUN, REFUSED = "not run: ", "refused: "
# What the kernel says of what some of these tests do to it on purpose.
PROVOKED = {
    # Linux 6.12, of fetches whose queue is not complete.
    "a_recovery_that_is_killed_in_the_middle_of_its_fetches": r"WARNING: .*ublk_drv\.c:\d+ ublk_ch_uring_cmd\+",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        try:
            cases = rusttests.cases(layout.TREE)
        except rusttests.BuildFailed as e:
            raise pytest.Collector.CollectError(str(e)) from e
        metafunc.parametrize("case", [pytest.param(case, marks=allowed(case)) for case in cases], ids=str)


def allowed(case: rusttests.Case) -> list[pytest.MarkDecorator]:
    """Which complaints of the kernel are no failure of this one."""
    return [pytest.mark.console_allow(words) for name, words in PROVOKED.items() if name in str(case)]


@pytest.mark.vm(smp=4)
def test_rust(
    guest: Guest,
    case: rusttests.Case,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    if case.ignored and not pytestconfig.getoption("--full"):
        pytest.skip("a soak: runs with --full (make test-full)")
    guest.run("modprobe ublk_drv")
    done = guest.run(case.command(), timeout=BODY_SECS, cwd=case.package_dir, env={"RUST_BACKTRACE": "1"})
    # A filter that matches nothing also exits with 0.
    assert "1 passed" in done.out, done
    lines = done.out.splitlines()
    if refused := [line.removeprefix(REFUSED) for line in lines if line.startswith(REFUSED)]:
        record_property(support.REFUSED, refused)
    for line in lines:
        if line.startswith(NOT_RUN):
            pytest.skip(line.removeprefix(NOT_RUN))
