"""Every option of `Device`, and what it changes."""

from __future__ import annotations

import inspect
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import ublk
from tests.py_guest.disks import (
    BLOCK,
    MIB,
    Ram,
    Reads,
    has,
    needs,
    opened,
    raised,
    read,
    read_at,
    sysfs,
    tasks,
    together,
    until,
    usable_paths,
    write,
)
from ublk_rig.pyguest import NotRun


def _info(device: ublk.Device) -> ublk.DeviceInfo:
    """What the driver says of it."""
    return next(info for info in ublk.list() if info.id == device.id)


def test_defaults() -> None:
    with ublk.Device(Ram()) as device:
        info = _info(device)
        assert (info.queues, info.depth, info.max_io_size, info.fingerprint) == (1, 128, 512 << 10, 0)
        assert info.size == device.size == MIB
        assert device.info.features == device.features == info.features
        assert device.data_path == "copy"
        assert sysfs(device, "logical_block_size") == "512"
        assert sysfs(device, "physical_block_size") == "4096"
        assert sysfs(device, "rotational") == "0"
        assert "USER_RECOVERY" not in device.features
        assert device.warnings == []


def test_sizes_of_blocks_and_requests() -> None:
    options: dict[str, Any] = {
        "block_size": 4096,
        "physical_block_size": 16384,
        "io_min": 32768,
        "io_opt": 65536,
        "max_io_size": 128 << 10,
        "rotational": True,
        "read_only": True,
    }
    with ublk.Device(Ram(), **options) as device:
        assert sysfs(device, "logical_block_size") == "4096"
        assert sysfs(device, "physical_block_size") == "16384"
        assert sysfs(device, "minimum_io_size") == "32768"
        assert sysfs(device, "optimal_io_size") == "65536"
        assert sysfs(device, "max_hw_sectors_kb") == "128"
        assert sysfs(device, "rotational") == "1"
        assert sysfs(device, "../ro") == "1"
        assert device.info.max_io_size == 128 << 10
        raised(PermissionError, lambda: write(device.path, 0, bytes(BLOCK)))
    lengths: list[int] = []
    with ublk.Device(Reads(lambda buf, offset: lengths.append(len(buf))), size=MIB, max_io_size=64 << 10) as device:
        read(device.path, 0, 512 << 10)
        assert max(lengths) == 64 << 10


def test_queues_depth_id_and_fingerprint() -> None:
    with ublk.Device(Ram(), queues=2, depth=16, id=11, fingerprint=0xFEED_0000_0000_BEEF) as device:
        info = _info(device)
        assert (info.queues, info.depth, info.id) == (min(2, os.cpu_count() or 1), 16, 11)
        assert info.fingerprint == 0xFEED_0000_0000_BEEF
        assert len(os.listdir(f"/sys/block/ublkb{device.id}/mq")) == info.queues
        assert len(device.stats().queues) == info.queues


def test_trim_and_zero_limits() -> None:
    with ublk.Device(Ram(), trim_granularity=4096, max_trim_size=64 << 10, max_zero_size=32 << 10) as device:
        assert sysfs(device, "discard_granularity") == "4096"
        assert sysfs(device, "discard_max_bytes") == str(64 << 10)
        assert sysfs(device, "write_zeroes_max_bytes") == str(32 << 10)
    with ublk.Device(Ram(), trim=False, zero=False) as device:
        assert sysfs(device, "discard_max_bytes") == "0"
        assert sysfs(device, "write_zeroes_max_bytes") == "0"


def test_what_a_raw_backend_is_told_to_advertise() -> None:
    class Raw:
        size = MIB

        def handle(self, request: ublk.Request) -> None:
            request.complete()

    with ublk.Device(Raw()) as device:
        assert (sysfs(device, "write_cache"), sysfs(device, "fua")) == ("write through", "0")
        assert (sysfs(device, "discard_max_bytes"), sysfs(device, "write_zeroes_max_bytes")) == ("0", "0")
        assert sysfs(device, "../ro") == "0"
    with ublk.Device(Raw(), read_only=True) as device:
        assert sysfs(device, "../ro") == "1"
    with ublk.Device(Raw(), cache=True, fua=True, trim=True, zero=True) as device:
        assert (sysfs(device, "write_cache"), sysfs(device, "fua")) == ("write back", "1")
        assert "0" not in {sysfs(device, "discard_max_bytes"), sysfs(device, "write_zeroes_max_bytes")}


def test_data_paths() -> None:
    granted = {
        "user-copy": "USER_COPY",
        "zero-copy": "SUPPORT_ZERO_COPY",
        "auto-buf-reg": "AUTO_BUF_REG",
        "need-get-data": "NEED_GET_DATA",
    }
    for path in usable_paths():
        with ublk.Device(Ram(), data_path=path) as device:
            assert device.data_path == path
            assert path == "copy" or granted[path] in device.features
            write(device.path, BLOCK, b"d" * BLOCK)
            assert read(device.path, BLOCK) == b"d" * BLOCK
    with ublk.Device(ublk.Mem(MIB), data_path="auto") as device:
        assert device.data_path != "auto"
    missing = set(granted) - set(usable_paths())
    for path in missing:
        error = raised(OSError, ublk.Device(Ram(), data_path=path).start, granted[path])  # type: ignore[arg-type]
        assert "Linux" in "".join([str(error), *getattr(error, "__notes__", [])])


def test_require_prefer_forbid() -> None:
    # What a data path asks for is asked for by it.
    error = raised(ValueError, lambda: ublk.Device(Ram(), require=["USER_COPY"]), "USER_COPY", "data_path=")
    assert "::" not in str(error)
    with ublk.Device(Ram(), require=["URING_CMD_COMP_IN_TASK"]) as device:
        assert "URING_CMD_COMP_IN_TASK" in device.features
    with ublk.Device(Ram(), prefer=["USER_RECOVERY"], forbid={"USER_RECOVERY_REISSUE"}) as device:
        assert "USER_RECOVERY" in device.features
    raised(
        (OSError, ValueError),
        lambda: ublk.Device(Ram(), recovery="wait", forbid=["USER_RECOVERY"]).start(),
        "USER_RECOVERY",
    )  # type: ignore[arg-type]
    for batch in (True, False):
        if batch and not has("BATCH_IO"):
            raised(OSError, ublk.Device(Ram(), batch=True).start, "BATCH_IO")
            continue
        with ublk.Device(Ram(), batch=batch) as device:
            assert ("BATCH_IO" in device.features) == batch
            write(device.path, 0, b"b" * BLOCK)
            assert read(device.path) == b"b" * BLOCK


def test_recovery_options_ask_for_their_features() -> None:
    for recovery, names in (
        ("wait", {"USER_RECOVERY"}),
        ("reissue", {"USER_RECOVERY", "USER_RECOVERY_REISSUE"}),
        ("fail", {"USER_RECOVERY", "USER_RECOVERY_FAIL_IO"}),
    ):
        if not all(map(has, names)):
            raised(OSError, ublk.Device(Ram(), recovery=recovery).start, "FAIL_IO")  # type: ignore[arg-type]
            continue
        with ublk.Device(Ram(), recovery=recovery) as device:  # type: ignore[arg-type]
            assert {n for n in device.features if "RECOVERY" in n} == names


def test_threads_workers_and_pinning() -> None:
    def named(start: str) -> list[int]:
        found = {task for task, name in tasks().items() if name.startswith(start)} - former
        former.update(found)
        return sorted(found)

    # Of devices before, which had the same number: a stop does not wait for the last instructions of a worker's thread.
    former = set(tasks())
    with ublk.Device(Ram(), threads=5, queues=1) as device:
        # A thread has its name once it has run.
        until(lambda: sum(re.fullmatch(r"ublk-py-\d", name) is not None for name in tasks().values()) == 5)
        assert len(named(f"ublk{device.id}-q")) == 1
        read(device.path)
    all_cpus = os.sched_getaffinity(0)
    queues = len(all_cpus)
    for pin in (True, False):
        with ublk.Device(Ram(), queues=queues, pin=pin) as device:
            masks = [os.sched_getaffinity(task) for task in named(f"ublk{device.id}-q")]
            assert len(masks) == queues
            if pin:
                assert set.union(*masks) == all_cpus
                assert queues == 1 or all(len(mask) < len(all_cpus) for mask in masks)
            else:
                assert all(mask == all_cpus for mask in masks)
    if has("PER_IO_DAEMON"):
        with ublk.Device(Ram(), workers_per_queue=2) as device:
            assert len(named(f"ublk{device.id}-q")) == 2
            together(4, lambda i: read(device.path, i * BLOCK))
    else:
        raised(OSError, ublk.Device(Ram(), workers_per_queue=2).start)


def test_a_pool_of_workers_is_shared_by_python_and_native_devices() -> None:
    pool = ublk.Workers(2)
    assert pool.count == 2
    for wrong in (0, 1025, -1):
        raised((ValueError, OverflowError), lambda wrong=wrong: ublk.Workers(wrong))  # type: ignore[arg-type]
    rams = [Ram(), Ram(), Later()]
    devices = [ublk.Device(backend, workers=pool) for backend in rams]
    devices += [ublk.Device(ublk.Mem(MIB), workers=pool) for _ in range(2)]
    for device in devices:
        device.start()
    until(lambda: sum(name.startswith("ublk-pool-") for name in tasks().values()) == 4)
    names = list(tasks().values())
    assert not [n for n in names if "-q" in n], names

    def use(number: int) -> None:
        device = devices[number % len(devices)]
        with opened(device.path) as fd:
            for at in range(8):
                data = bytes([number, at]) * (BLOCK // 2)
                os.preadv(fd, [], 0)
                write(device.path, at * BLOCK, data) if number < len(devices) else read_at(fd, at * BLOCK)

    together(10, use)
    for device in devices[::-1]:
        device.stop()
    for number, ram in enumerate(rams):
        assert ram.data[: 2 * BLOCK] == bytes([number, 0]) * (BLOCK // 2) + bytes([number, 1]) * (BLOCK // 2)
    # It can be used again, and ends with the last reference.
    with ublk.Device(Ram(), workers=pool) as device:
        read(device.path)


class Later(Ram):
    """On a loop."""

    async def pread(self, buf: memoryview, offset: int) -> None:  # type: ignore[override]
        Ram.pread(self, buf, offset)


def test_memory_options() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    with ublk.Device(Ram(), depth=32, max_io_size=MIB, populate=True) as device:
        assert resident() > before + 30 * MIB
        read(device.path)
    before = resident()
    with ublk.Device(Ram(), depth=32, max_io_size=MIB) as device:
        assert resident() < before + 8 * MIB
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists():
        raise NotRun("this kernel has no transparent huge pages; the other options of memory have passed")
    for huge in (False, True):
        with ublk.Device(Ram(), depth=16, max_io_size=4 * MIB, huge_pages=huge, populate=True) as device:
            write(device.path, 0, b"h" * BLOCK)
            assert read(device.path) == b"h" * BLOCK
            # MADV_HUGEPAGE, or MADV_NOHUGEPAGE, is what the kernel was told of the buffers.
            flags = re.findall(r"^VmFlags: (.*)$", Path("/proc/self/smaps").read_text(), re.MULTILINE)
            marks = {mark for line in flags for mark in line.split() if "wf" in line.split()}
            assert ("hg" in marks) == huge, marks
            assert ("nh" in marks) != huge, marks


def test_limits_of_segments_and_alignment() -> None:
    # The attribute of the alignment is a mask. Older drivers drop such parameters, and that is an error.
    for options, name, value in (
        ({"dma_alignment": 4096}, "dma_alignment", "4095"),
        ({"segments": (0xFFFF, 65536, 16)}, "max_segments", "16"),
    ):
        try:
            device = ublk.Device(Ram(), **options).start()  # type: ignore[arg-type]
        except OSError as error:
            assert "Linux" in str(error) + "".join(getattr(error, "__notes__", []))
            assert ublk_kernel() < (6, 15), error
        else:
            assert sysfs(device, name) == value
            device.stop()


def ublk_kernel() -> tuple[int, ...]:
    """The kernel's version."""
    return tuple(int(n) for n in os.uname().release.split("-")[0].split("+")[0].split(".")[:2])


def test_partitions_are_not_looked_for() -> None:
    if not has("NO_AUTO_PART_SCAN"):
        error = raised(OSError, ublk.Device(Ram(), partition_scan=False).start, "NO_AUTO_PART_SCAN")
        assert isinstance(error, OSError)
        return
    started = threading.Event()
    reads: list[int] = []

    def counts(buf: memoryview, offset: int) -> None:
        if not started.is_set():
            reads.append(offset)

    with ublk.Device(Reads(counts), size=MIB, partition_scan=False):
        started.set()
    assert not reads


def test_descriptors_of_another_size() -> None:
    if not has("IO_DESC_SIZE"):
        raised(OSError, ublk.Device(Ram(), descriptor_size=64).start, "IO_DESC_SIZE", "7.3")
        return

    def mapped(**options: Any) -> int:
        """Bytes of descriptors that are mapped."""
        with ublk.Device(Ram(), depth=128, **options) as device:
            write(device.path, BLOCK, b"d" * BLOCK)
            assert read(device.path, BLOCK) == b"d" * BLOCK
            assert ("IO_DESC_SIZE" in device.features) == bool(options)
            lines = Path("/proc/self/maps").read_text().splitlines()
            ranges = [line.split()[0].split("-") for line in lines if line.endswith(f"/dev/ublkc{device.id}")]
            return sum(int(end, 16) - int(start, 16) for start, end in ranges)

    assert mapped() == 4096
    assert mapped(descriptor_size=64) == 128 * 64
    assert mapped(descriptor_size=256) == 128 * 256


def test_unprivileged_devices_are_not_for_root() -> None:
    needs("UNPRIVILEGED_DEV")
    # py_guest/unprivileged.py is about those whom they are for.
    error = raised(OSError, ublk.Device(Ram(), unprivileged=True).start, "CAP_SYS_ADMIN", "drop that capability")
    assert isinstance(error, OSError)


# Which tests show what an option does: `module.function`, of this folder.
SHOWN: dict[str, str] = {
    "integrity": "integrity.test_a_backend_keeps_metadata_beside_its_data",
    "size": "contract.test_sizes",
    "block_size": "options.test_sizes_of_blocks_and_requests",
    "physical_block_size": "options.test_sizes_of_blocks_and_requests",
    "io_min": "options.test_sizes_of_blocks_and_requests",
    "io_opt": "options.test_sizes_of_blocks_and_requests",
    "queues": "options.test_queues_depth_id_and_fingerprint",
    "depth": "options.test_queues_depth_id_and_fingerprint",
    "max_io_size": "options.test_sizes_of_blocks_and_requests",
    "read_only": "options.test_sizes_of_blocks_and_requests",
    "rotational": "options.test_sizes_of_blocks_and_requests",
    "cache": "contract.test_what_a_backend_has_is_what_the_disk_advertises",
    "fua": "contract.test_what_a_backend_has_is_what_the_disk_advertises",
    "trim": "options.test_trim_and_zero_limits",
    "trim_granularity": "options.test_trim_and_zero_limits",
    "max_trim_size": "options.test_trim_and_zero_limits",
    "zero": "options.test_trim_and_zero_limits",
    "max_zero_size": "options.test_trim_and_zero_limits",
    "zoned": "machine.test_zoned_disks",
    "data_path": "options.test_data_paths",
    "recovery": "machine.test_the_next_process_recovers_what_a_killed_one_left",
    "fingerprint": "machine.test_the_next_process_recovers_what_a_killed_one_left",
    "id": "options.test_queues_depth_id_and_fingerprint",
    "threads": "contract.test_sync_handlers_run_one_at_a_time_per_queue_and_threads_overlap_them",
    "workers": "options.test_a_pool_of_workers_is_shared_by_python_and_native_devices",
    "workers_per_queue": "options.test_threads_workers_and_pinning",
    "pin": "options.test_threads_workers_and_pinning",
    "populate": "options.test_memory_options",
    "huge_pages": "options.test_memory_options",
    "dma_alignment": "options.test_limits_of_segments_and_alignment",
    "segments": "options.test_limits_of_segments_and_alignment",
    "descriptor_size": "options.test_descriptors_of_another_size",
    "batch": "options.test_require_prefer_forbid",
    "partition_scan": "options.test_partitions_are_not_looked_for",
    "unprivileged": "unprivileged.test_an_ordinary_user_makes_serves_uses_and_deletes_disks",
    "allow_many_unprivileged": "unprivileged.test_an_ordinary_user_makes_serves_uses_and_deletes_disks",
    "require": "options.test_require_prefer_forbid",
    "prefer": "options.test_require_prefer_forbid",
    "forbid": "options.test_require_prefer_forbid",
    "start_timeout": "interrupts.test_a_start_that_takes_too_long_leaves_nothing",
    "stop_timeout": "contract.test_leaving_with_takes_the_disk_from_its_users",
    "force": "machine.test_the_next_process_recovers_what_a_killed_one_left",
}


def test_every_option_is_shown_at_work() -> None:
    options = {*inspect.signature(ublk.Device.__init__).parameters, *inspect.signature(ublk.recover).parameters}
    assert set(SHOWN) == options - {"self", "backend", "options"}
    for option, place in SHOWN.items():
        module, _, name = place.partition(".")
        text = Path(__file__).with_name(f"{module}.py").read_text()
        assert f"\ndef {name}() -> None:\n" in text, place
        # Sizes are told in many ways there.
        assert option == "size" or re.search(rf"\b{option}\b", text), (option, place)


def test_statistics() -> None:
    with ublk.Device(Ram(), queues=1) as device:
        with opened(device.path) as fd:
            for at in range(4):
                os.pwrite(fd, _aligned(), at * BLOCK)
            os.fsync(fd)
        before = device.stats()
        assert before.total.write.completed == 4
        assert before.total.write.bytes == 4 * BLOCK
        assert before.total.flush.completed >= 1
        assert before.total.write.p50 is not None
        assert 0 < before.total.write.p50 < 10
        assert before.total.write.longest is not None
        assert before.total.write.p50 <= before.total.write.longest
        assert before.total.rejected == 0
        assert before.total.trim.completed == 0
        assert before.enters > 0
        began = time.monotonic()
        read(device.path)
        after = device.stats()
        assert after.total.read.completed >= before.total.read.completed + 1
        assert after.total.read.bytes >= before.total.read.bytes + BLOCK
        assert time.monotonic() - began < 60
    assert device.stats().total.write.completed == 4


def _aligned() -> Any:
    import mmap  # noqa: PLC0415

    memory = mmap.mmap(-1, BLOCK)
    memory[:] = b"s" * BLOCK
    return memory
