"""The logic of `--ublk-vm` that needs no guest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ublk_vm import needs
from ublk_vm.remote import arguments_for, labelled, unlabelled

LABELS = ["6.12", "7.3"]


@pytest.mark.parametrize(
    ("name", "with_kernel"),
    [
        ("t/test_a.py::test_x", "t/test_a.py::test_x[7.3]"),
        ("t/test_a.py::test_x[4096-on]", "t/test_a.py::test_x[7.3-4096-on]"),
        ("t/test_a.py::TestC::test_x[a::b[c]]", "t/test_a.py::TestC::test_x[7.3-a::b[c]]"),
    ],
)
def test_the_kernel_is_the_first_parameter_and_comes_off_again(name: str, with_kernel: str) -> None:
    assert labelled(name, "7.3") == with_kernel
    assert unlabelled(with_kernel, LABELS) == (name, "7.3")
    assert unlabelled(name, LABELS) == (name, None)


@pytest.mark.parametrize("argument", ["-k", "7.3", "tests/test_a.py", "-o", "x=a::b", "test_a.py::test_x[16.12]"])
def test_other_arguments_stay_as_they_are(argument: str) -> None:
    assert unlabelled(argument, LABELS) == (argument, None)


def test_a_name_with_a_kernel_selects_that_kernel() -> None:
    given = ["-v", "a.py::test_x[6.12]"]
    assert arguments_for("6.12", given, LABELS) == ["-v", "a.py::test_x"]
    assert arguments_for("7.3", given, LABELS) is None
    assert arguments_for("7.3", [*given, "a.py::test_y"], LABELS) == ["-v", "a.py::test_y"]
    assert arguments_for("7.3", ["a.py"], LABELS) == ["a.py"]


def test_what_is_missing_is_named_as_debian_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "_SBIN", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert needs.missing(fetches=False) == ["qemu-system-x86", "busybox-static", "util-linux"]
    with pytest.raises(needs.CannotRun, match="--ublk-vm-kernel PATH --ublk-vm-modules DIR"):
        needs.check(fetches=True, seen=tmp_path)
    for program in ("apt-get", "qemu-system-x86_64", "setpriv", "dpkg-deb", "depmod"):
        (tmp_path / program).touch(mode=0o755)
    # A busybox that needs libraries would not start in the guest.
    (tmp_path / "busybox").write_bytes(b"\x7fELF..../lib64/ld-linux-x86-64.so.2")
    (tmp_path / "busybox").chmod(0o755)
    with pytest.raises(needs.CannotRun, match="apt-get install busybox-static"):
        needs.check(fetches=True, seen=tmp_path)
    (tmp_path / "busybox").write_bytes(b"\x7fELF static")
    needs.check(fetches=True, seen=tmp_path)
    with pytest.raises(needs.CannotRun, match="not those below /run"):
        needs.check(fetches=True, seen=Path("/run/user/0"))


def outer(where: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:ublk_rig", "-p", "no:cacheprovider", *options],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_plugin_does_nothing_until_it_is_asked(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import sys\n"
        "def test_a(ublk_vm_kernel, ublk_vm_artifacts):\n"
        "    assert ublk_vm_kernel is None and ublk_vm_artifacts.is_dir()\n"
        "    assert 'ublk_vm.plugin' in sys.modules\n"
        "    assert not {'ublk', 'ublk_vm.vm', 'ublk_vm.remote'} & set(sys.modules)\n"
    )
    done = outer(tmp_path, "-W", "error")
    assert "1 passed" in done.stdout, done
    assert done.returncode == 0
    assert "ublk-vm:" not in done.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ublk-vm=newest"], "'newest' is no series of kernels such as 7.3"),
        (["--ublk-vm-kernel=/boot/vmlinuz"], "--ublk-vm-kernel needs --ublk-vm-modules DIR"),
        (["--ublk-vm=7.3", "--ublk-vm-kernel=x", "--ublk-vm-modules=y"], "one of them"),
        (["--ublk-vm-kernel=x", "--ublk-vm-modules=y"], "expected one lib/modules/RELEASE"),
        (["--ublk-vm=7.3", "--pdb"], "a debugger has no terminal in a guest"),
        (["--ublk-vm=7.3", "no/such/test.py"], "file or directory not found: no/such/test.py"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_boots(options: list[str], says: str, tmp_path: Path) -> None:
    done = outer(tmp_path, *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert says in done.stdout + done.stderr


def test_collecting_alone_needs_no_guest(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_a(): pass\n")
    done = outer(tmp_path, "--ublk-vm=7.3", "--collect-only", "-q")
    assert "test_a.py::test_a" in done.stdout
    assert done.returncode == 0
