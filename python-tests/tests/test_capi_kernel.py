"""The C library on real kernels: its examples serve file systems, and what must not be done to it is answered."""

from __future__ import annotations

import contextlib
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from ublk_rig import capi, layout, served, testdisk, valgrind
from ublk_vm.guest import CommandFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ublk_vm.guest import Guest
    from ublk_vm.process import Process

# Small: valgrind on an emulated processor is slow.
SIZE = 8 << 20
# The arguments of each example; FILE is a file of the test's.
EXAMPLES = {
    "ramdisk.c": [str(SIZE)],
    "file_disk.c": ["FILE", str(SIZE), "queues=2"],
    "epoll_disk.c": [str(SIZE)],
    "disk.cpp": [str(SIZE)],
}
ASAN = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
FIO = ["--rw=randrw", "--bs=4k-32k", "--iodepth=8", "--ioengine=io_uring", "--direct=1", "--verify=crc32c"]


def served_well(guest: Guest, disk: str, folder: str) -> None:
    """A file system that is found again, and verified I/O."""
    guest.run(["mkfs.ext4", "-q", disk], timeout=120)
    # Twice: the second mount reads what the first one wrote, and not its cache.
    before = guest.run(
        f"mount {disk} {folder} && head -c 1000000 /dev/urandom > {folder}/file && sha256sum < {folder}/file"
        f" && umount {folder}",
        timeout=120,
    ).out
    after = guest.run(f"mount {disk} {folder} && sha256sum < {folder}/file && umount {folder}", timeout=120).out
    assert before == after
    guest.run(["e2fsck", "-fn", disk], timeout=120)
    guest.run(["fio", "--name=verify", f"--filename={disk}", "--size=512k", *FIO], timeout=120)


# Where root has its programs from under Debian's sudo.
SECURE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def installing(page: str) -> list[str]:
    """The lines of a page that end in a program, without their comments."""
    text = (layout.TREE / page).read_text()
    shown = next(b for b in re.findall(r"```console\n(.*?)```", text, re.DOTALL) if "ublk-capi install" in b)
    return [line.removeprefix("$ ").partition("  #")[0].strip() for line in shown.splitlines()]


def test_the_pages_installation_ends_in_a_disk(guest: Guest) -> None:
    """The pages' lines, the first of them outside, where Rust is, and the others by a root who has none."""
    (build, *steps, compiled), (*same, compiled_too) = installing("README.md"), installing("docs/c.md")
    assert build == "make -C ublk-capi"
    assert same == [build, *steps]
    capi.prefix()
    guest.run("modprobe ublk_drv")
    assert any(step.startswith("sudo ") for step in steps)
    root = {"PATH": SECURE_PATH, "HOME": "/nowhere", "CARGO_TARGET_DIR": str(capi.target_dir())}
    env = " ".join(["env", "-i", *(f"{name}={value}" for name, value in root.items())])

    def step(line: str) -> None:
        guest.run(f"cd {layout.TREE} && exec {env} sh -c '{line.removeprefix('sudo ')}'", timeout=120)

    guest.run("touch /tmp/before")
    try:
        for line in steps:
            step(line)
        for line in (compiled, compiled_too):
            step(line)
            with running(guest, [layout.TREE / "ramdisk", str(SIZE)], {}) as (server, disk):
                guest.run(["dd", "if=/dev/zero", f"of={disk}", "bs=64k", "count=4", "oflag=direct"])
                testdisk.delete(guest, int(disk.removeprefix("/dev/ublkb")))
                assert server.wait(30) == 0
            guest.run(f"rm {layout.TREE}/ramdisk")
    finally:
        # The machine has other tests to serve, which bring a library of their own.
        guest.run(f"rm -f {layout.TREE}/ramdisk; find /usr/local -newer /tmp/before ! -type d -delete; ldconfig")


@contextmanager
def running(guest: Guest, argv: list[str | Path], env: dict[str, str]) -> Iterator[tuple[Process, str]]:
    with guest.popen(argv, env=env) as server:
        disk = server.read_line(60).strip()
        assert disk.startswith("/dev/ublkb"), server.err
        try:
            yield server, disk
        except BaseException:
            # What failed is what matters, also if the disk is gone already.
            with contextlib.suppress(CommandFailed):
                testdisk.delete(guest, int(disk.removeprefix("/dev/ublkb")))
            raise


def end(guest: Guest, server: Process, disk: str, example: str) -> None:
    if example == "ramdisk.c":
        # It serves until somebody stops the device: here, another process.
        testdisk.delete(guest, int(disk.removeprefix("/dev/ublkb")))
    else:
        server.close_stdin()
    assert server.wait(60) == 0, server.err
    # Neither valgrind nor a sanitizer has said a thing.
    assert not server.err


def serve(guest: Guest, example: str, program: Path, prefix: list[str], env: dict[str, str]) -> None:
    folder = guest.run(["mktemp", "-d"]).out.strip()
    guest.run("modprobe ublk_drv")
    arguments = [f"{folder}.img" if a == "FILE" else a for a in EXAMPLES[example]]
    with running(guest, [*prefix, program, *arguments], env) as (server, disk):
        served_well(guest, disk, folder)
        end(guest, server, disk, example)
    guest.run(f"rmdir {folder}; rm -f {folder}.img")


@pytest.mark.time_limit(600)
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_serves_under_valgrind(guest: Guest, example: str) -> None:
    prefix, env = valgrind.command()
    env = {**env, "LD_LIBRARY_PATH": str(capi.stripped())}
    serve(guest, example, capi.program(capi.EXAMPLES / example), prefix, env)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_serves_sanitized(guest: Guest, example: str) -> None:
    """The program under AddressSanitizer and UndefinedBehaviorSanitizer, the library as it is shipped."""
    flavour = capi.Flavour(flags=capi.SANITIZED)
    serve(guest, example, capi.program(capi.EXAMPLES / example, flavour), [], ASAN)


@pytest.mark.time_limit(600)
def test_rust_under_address_sanitizer(guest: Guest) -> None:
    """The library itself, too, where a nightly toolchain is given."""
    if missing := capi.no_nightly():
        pytest.skip(missing)
    serve(guest, "file_disk.c", capi.sanitized_program(capi.EXAMPLES / "file_disk.c"), [], ASAN)
    negative = capi.sanitized_program(capi.TESTS / "negative.c")
    for case in ("completions", "never-completed", "destroyed-once", "dispatching"):
        guest.run([negative, case], env=ASAN, timeout=120)


@pytest.mark.time_limit(600)
def test_what_must_not_be_done_is_answered(guest: Guest) -> None:
    program = capi.program(capi.TESTS / "negative.c", capi.Flavour(flags=capi.SANITIZED))
    guest.run("modprobe ublk_drv")
    cases = guest.run([program, "list"]).out.split()
    assert len(cases) >= 15
    # That one waits for the library to give a callback up, and has a test of its own.
    for case in (case for case in cases if case != "stuck"):
        done = guest.run([program, case], env=ASAN, timeout=120)
        assert not done.err, case


def test_a_stuck_callback_outlives_its_device(guest: Guest, pytestconfig: pytest.Config) -> None:
    """`free` comes back, `destroy` is called when the callback has."""
    if not pytestconfig.getoption("--full"):
        pytest.skip("runs with --full (make test-full): the library waits 20 seconds for a callback")
    guest.run("modprobe ublk_drv")
    program = capi.program(capi.TESTS / "negative.c", capi.Flavour(flags=capi.SANITIZED))
    # What the kernel may still write to is left to it.
    done = guest.run([program, "stuck"], env={**ASAN, "ASAN_OPTIONS": "detect_leaks=0"}, timeout=120)
    assert not done.err


# What 6.12 has of a disk's life; 7.3 has all.
EARLY = {"killed", "zoned", "targets", "dispatch-busy"}


def test_a_disk_in_its_life(guest: Guest) -> None:
    """Another size, another server, shared memory, zones, ready-made disks."""
    program = capi.program(capi.TESTS / "life.c", capi.Flavour(flags=capi.SANITIZED))
    guest.run("modprobe ublk_drv")
    for case in guest.run([program, "list"]).out.split():
        done = guest.run([program, case], env=ASAN, timeout=120)
        had = guest.kernel != "6.12" or case in EARLY
        assert (done.out, done.err) == ("" if had else "unsupported\n", ""), case


def test_the_cxx_header_does_what_it_says(guest: Guest) -> None:
    program = capi.program(capi.TESTS / "cxx.cpp", capi.Flavour(flags=capi.SANITIZED))
    guest.run("modprobe ublk_drv")
    assert not guest.run([program], env=ASAN, timeout=120).err


def test_pages_on_a_ring_of_the_programs_own(guest: Guest) -> None:
    """READ_FIXED straight into the client's memory: register, read from a file, unregister, complete."""
    program = capi.program(capi.TESTS / "zero_copy.c", capi.Flavour(flags=capi.SANITIZED))
    guest.run("modprobe ublk_drv")
    done = guest.run([program], env=ASAN, check=False)
    if guest.kernel == "6.12":
        assert done.rc == 77, done
        assert "SUPPORT_ZERO_COPY" in done.err
    else:
        assert (done.rc, done.err) == (0, ""), done


def test_the_benchmark_disk_serves(guest: Guest) -> None:
    program = capi.program(capi.TESTS / "null.c")
    guest.run("modprobe ublk_drv")
    for style in ("calls", "submit"):
        with served.serving(guest, [program, style, "queue_depth=64"]) as (_, disk):
            done = guest.run(["fio", "--name=r", f"--filename={disk}", "--size=8m", *FIO[1:5], "--rw=randread"])
            assert "err= 0" in done.out
