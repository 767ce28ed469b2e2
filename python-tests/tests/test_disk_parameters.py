"""Parameters that a backend or its builder states are what the kernel's block layer says of the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ublk_rig import testdisk

if TYPE_CHECKING:
    from ublk_vm.guest import Guest


MIB = 1 << 20


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize(
    ("caps", "expected"),
    [
        ("WRITE", ("write through", "0", False, False)),
        ("WRITE,FLUSH", ("write back", "0", False, False)),
        ("WRITE,FLUSH,FUA,DISCARD", ("write back", "1", True, False)),
        ("WRITE,WRITE_ZEROES", ("write through", "0", False, True)),
    ],
)
def test_capabilities_are_advertised(guest: Guest, caps: str, expected: tuple[str, str, bool, bool]) -> None:
    with testdisk.serving(guest, "target=test", f"caps={caps}") as disks:
        says = disks.attributes()
        discards, zeroes = (int(says[f"queue/{op}_max_bytes"]) > 0 for op in ("discard", "write_zeroes"))
        assert (says["queue/write_cache"], says["queue/fua"], discards, zeroes) == expected
        done = guest.run(["blkdiscard", "--offset", "0", "--length", "65536", disks.path], check=False)
        assert (done.rc == 0) == discards, done


@pytest.mark.vm(smp=4)
def test_a_backend_that_cannot_write_makes_a_read_only_disk(guest: Guest) -> None:
    with testdisk.serving(guest, "target=test", "caps=") as disks:
        assert disks.attributes()["ro"] == "1"
        assert guest.run(["dd", "if=/dev/zero", f"of={disks.path}", "count=1"], check=False).rc != 0
        assert disks.backend()["write"] == 0
        disks.start("target=mem", "read_only=1")
        assert disks.attributes()["ro"] == "1"
        disks.start("target=mem")
        assert disks.attributes()["ro"] == "0"


@pytest.mark.vm(smp=4)
def test_sizes_and_limits_are_advertised(guest: Guest) -> None:
    with testdisk.serving(guest) as disks:
        disks.start("target=mem", "rotational=1", "max_io=131072", "depth=7", "queues=2", f"size={48 * MIB}")
        says = disks.attributes()
        assert says["queue/rotational"] == "1"
        assert says["queue/max_hw_sectors_kb"] == "128"
        assert says["size"] == str(48 * MIB // 512)
        assert (says["mq/0/nr_tags"], says["mq/1/nr_tags"], "mq/2/nr_tags" in says) == ("7", "7", False)
        disks.start("target=mem", "discard=0:131072:1048576")
        says = disks.attributes()
        assert says["queue/rotational"] == "0"
        assert says["queue/discard_granularity"] == "131072"
        assert says["queue/discard_max_hw_bytes"] == str(MIB)


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize("block", [512, 1024, 4096])
def test_logical_blocks_have_their_size_and_sectors_stay_512_bytes(guest: Guest, block: int) -> None:
    with testdisk.serving(guest, "target=test", f"block={block}", f"size={16 * MIB}") as disks:
        assert disks.attributes()["queue/logical_block_size"] == str(block)
        assert disks.attributes()["size"] == str(16 * MIB // 512)
        # The second block and the last, each with its own byte: an offset that is off by a factor shows.
        last = 16 * MIB - block
        calls = [f"write:{block}:{block}:17", f"write:{last}:{block}:18"]
        assert disks.errnos(*calls) == [0, 0]
        guest.run(["blkdiscard", "--offset", str(2 * block), "--length", str(block), disks.path])
        assert disks.backend()["discards"] == [[2 * block, block]]
        answers = disks.calls(f"read:{block}:{block}", f"read:{last}:{block}", f"read:0:{block}")
        assert [(a["first"], a["same"]) for a in answers] == [(17, True), (18, True), (0, True)]
        if block > 512:
            # EINVAL: no direct I/O in parts of a block.
            assert disks.errnos("read:512:512") == [22]


@pytest.mark.vm(smp=4)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=1000", "size"),
        ("block=1000", "block"),
        ("depth=5000", "depth"),
        ("max_io=5000", "page"),
        ("target=test caps=FUA,WRITE", "FLUSH"),
        ("threads=2", "blocking"),
    ],
)
def test_a_wrong_description_is_refused_before_there_is_a_device(guest: Guest, options: str, words: str) -> None:
    with testdisk.serving(guest) as disks:
        with pytest.raises(testdisk.Refused) as refused:
            disks.start(*options.split())
        assert refused.value.kind == "InvalidParameter"
        assert words in refused.value.text
        assert testdisk.devices(guest) == []
