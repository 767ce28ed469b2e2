"""The programs of ublk-core/examples do what their first lines say."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ublk_rig import layout, served, support, testdisk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ublk_vm.guest import Guest
    from ublk_vm.process import Process

SIZE = 16 << 20
WAY_TO_UDEV = "export SYSTEMD_IGNORE_CHROOT=1"


@contextmanager
def example(guest: Guest, name: str, *arguments: str) -> Iterator[tuple[Process, str]]:
    guest.run("modprobe ublk_drv")
    with guest.popen([served.build_example(name), *arguments]) as server:
        disk = server.read_line(served.START_SECS).strip()
        assert re.fullmatch(r"/dev/ublkb\d+", disk), (disk, server.err)
        try:
            yield server, disk
        except BaseException:
            testdisk.delete(guest, int(disk.removeprefix("/dev/ublkb")))
            raise


def ended(server: Process) -> str:
    server.close_stdin()
    assert server.wait(served.STOP_SECS) == 0, server.err
    return server.out


def test_a_successor_takes_the_disk_from_under_a_file_system(
    guest: Guest, record_property: Callable[[str, object], None]
) -> None:
    """By a handover where the kernel has it, and from a server that is killed; the next one waits for either."""
    folder = guest.run("mktemp -d").out.strip()
    file = [f"{folder}/image", str(SIZE)]
    with example(guest, "successor", *file) as (first, disk):
        number = disk.removeprefix("/dev/ublkb")
        guest.run(f"mkfs.ext4 -q {disk} && mkdir {folder}/mnt && mount {disk} {folder}/mnt")
        before = guest.run(
            f"head -c 2000000 /dev/urandom > {folder}/mnt/a && sync -f {folder}/mnt && sha256sum < {folder}/mnt/a"
        ).out
        with guest.popen([served.build_example("successor"), *file, number]) as second:
            if guest.kernel == "6.12":
                record_property(support.REFUSED, ["QUIESCE (since Linux 6.16)"])
                first.kill()
            else:
                first.write_line("next")
                assert first.read_line(served.STOP_SECS).strip() == "handed over"
                assert first.wait(served.STOP_SECS) == 0, first.err
            assert second.read_line(60).strip() == disk
            guest.run("echo 3 > /proc/sys/vm/drop_caches")
            after = guest.run(f"sha256sum < {folder}/mnt/a && umount {folder}/mnt").out
            assert before == after
            ended(second)
    guest.run(["rm", "-r", folder])


def test_zones_are_as_the_example_says(guest: Guest) -> None:
    with example(guest, "zoned_disk", str(SIZE), str(4 << 20)) as (server, disk):
        guest.run(f"dd if=/dev/zero of={disk} bs=64k count=2 seek=64 oflag=direct")
        report = guest.run(["blkzone", "report", disk]).out
        assert [("CONVENTIONAL" in line) for line in report.splitlines()] == [True, False, False, False], report
        said = ended(server)
    assert "0x400000: Sequential, ImplicitlyOpen, 131072 bytes" in said


def test_a_client_that_shares_memory(guest: Guest, record_property: Callable[[str, object], None]) -> None:
    program = served.build_example("shared_memory")
    guest.run("modprobe ublk_drv")
    if guest.kernel == "6.12":
        done = guest.run([program, str(SIZE)], check=False)
        assert done.rc == 1
        assert "SHMEM_ZC (since Linux 7.1)" in done.err
        record_property(support.REFUSED, ["SHMEM_ZC (since Linux 7.1)"])
        return
    with example(guest, "shared_memory", str(SIZE)) as (server, disk):
        memory = server.read_line(served.START_SECS).strip()
        assert guest.run([program, disk, memory]).out == "0xa5\n"
        said = ended(server)
    assert re.search(r"^2 requests in shared memory, \d+ elsewhere$", said, re.MULTILINE), said


def steps_of(page: Path) -> list[str]:
    """What the page has the administrator do."""
    shown = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    return [line.removeprefix("$ ") for line in shown[0].splitlines()]


def test_a_disk_of_alice(guest: Guest) -> None:
    """By the steps of docs/unprivileged.md, which the one that builds comes before."""
    build, *steps = steps_of(layout.TREE / "docs/unprivileged.md")
    assert build == "cargo build --release --example ublk_chown"
    helper = served.build_example("ublk_chown")
    guest.run("modprobe ublk_drv; useradd --create-home alice")
    program = guest.run(f"cp {served.build_example('own_disk')} /home/alice && echo /home/alice/own_disk").out.strip()
    refused = guest.run([program, str(SIZE)], check=False)
    assert "CAP_SYS_ADMIN" in refused.err, "root's own"
    with guest.popen(["env", "SYSTEMD_IGNORE_CHROOT=1", "/lib/systemd/systemd-udevd"]) as udevd:
        try:
            ping = "udevadm control --ping --timeout=5"
            guest.run(f"{WAY_TO_UDEV}; for i in $(seq 100); do {ping} && exit; sleep 0.1; done")
            for step in steps:
                command = step.replace("sudo ", "").replace("target/release/examples/ublk_chown", str(helper))
                guest.run(f"{WAY_TO_UDEV}; cd {layout.TREE}; {command}")
            guest.run(f"{WAY_TO_UDEV}; udevadm settle")
            as_alice = ["setpriv", "--reuid=alice", "--regid=alice", "--init-groups"]
            with guest.popen([*as_alice, program, str(SIZE)]) as server:
                disk = server.read_line(60).strip()
                assert disk.startswith("/dev/ublkb"), server.err
                guest.run([*as_alice, "dd", "if=/dev/zero", f"of={disk}", "bs=64k", "count=4", "oflag=direct"])
                ended(server)
        finally:
            udevd.kill()
            guest.run(
                "rm -f /etc/udev/rules.d/80-ublk.rules /usr/lib/udev/ublk_chown; userdel -r alice; groupdel ublk"
            )
