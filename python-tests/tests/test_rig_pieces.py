"""The rig's own logic, without a kernel."""

from __future__ import annotations

import json
import types
from typing import TYPE_CHECKING

import pytest

from ublk_rig.provision import CannotProvision, install, too_old, wanted_packages
from ublk_vm import accel, apt, initramfs, kernels, manifest
from ublk_vm.layout import cache_dir
from ublk_vm.moduledeps import insmod_order
from ublk_vm.timescale import EMULATION, Timescale
from ublk_vm.verdict import problems_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    (tmp_path / "vmlinuz").write_bytes(b"kernel")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/module.ko").write_bytes(b"module")
    manifest.write(tmp_path, {"release": "1.2"})
    return tmp_path


def test_an_intact_entry_verifies(entry: Path) -> None:
    assert manifest.verify(entry, ("vmlinuz", "lib/module.ko")) == {"release": "1.2"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "forge", "no manifest", "half a manifest"])
def test_a_damaged_entry_does_not_verify(entry: Path, damage: str) -> None:
    match damage:
        case "flip":
            (entry / "lib/module.ko").write_bytes(b"modulf")
        case "truncate":
            (entry / "vmlinuz").write_bytes(b"")
        case "remove":
            (entry / "lib/module.ko").unlink()
        case "forge":
            (entry / manifest.NAME).write_text('{"facts": {}, "files": {}}')
        case "no manifest":
            (entry / manifest.NAME).unlink()
        case "half a manifest":
            text = (entry / manifest.NAME).read_text()
            (entry / manifest.NAME).write_text(text[: len(text) // 2])
    with pytest.raises(manifest.BrokenEntry):
        manifest.verify(entry, ("vmlinuz",))


def test_modules_come_after_what_they_need() -> None:
    dep = """k/9p.ko.xz: k/netfs.ko.xz k/9pnet.ko.xz
k/9pnet.ko.xz:
k/netfs.ko.xz: k/fs-cache.ko.xz
k/fs-cache.ko.xz:
"""
    assert insmod_order(dep, ["9p", "built_in"]) == [
        "k/fs-cache.ko.xz",
        "k/netfs.ko.xz",
        "k/9pnet.ko.xz",
        "k/9p.ko.xz",
    ]
    assert insmod_order(dep, ["fs_cache", "netfs"]) == ["k/fs-cache.ko.xz", "k/netfs.ko.xz"]


def test_the_newest_plain_image_of_a_series_is_chosen() -> None:
    names = [
        "linux-image-7.3.9+deb13-amd64",
        "linux-image-7.3.10+deb13-amd64",
        "linux-image-7.3.11+deb13-cloud-amd64",
        "linux-image-7.3.11+deb13-rt-amd64",
        "linux-image-7.4.1+deb13-amd64",
        "linux-image-amd64",
    ]
    assert kernels.newest_image(names, "7.3") == "7.3.10+deb13-amd64"
    assert kernels.newest_image(names, "6.12") is None


def test_an_own_kernel_is_labelled_by_its_modules(tmp_path: Path) -> None:
    modules = tmp_path / "lib/modules/6.16.1-mine"
    modules.mkdir(parents=True)
    (tmp_path / "bzImage").write_bytes(b"")
    with pytest.raises(kernels.KernelError, match=r"modules\.dep"):
        kernels.own(tmp_path / "bzImage", tmp_path)
    (modules / "modules.dep").write_text("")
    for given in (tmp_path, modules):
        kernel = kernels.own(tmp_path / "bzImage", given)
        assert (kernel.label, kernel.release, kernel.module_dir) == ("6.16", "6.16.1-mine", modules)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.ensure.cache_clear()
    yield cache_dir()
    kernels.ensure.cache_clear()


def put(cache: Path, release: str) -> Path:
    """A kernel, or what passes for one, in the cache."""
    target = cache / "kernels" / release
    for name in ("vmlinuz", f"lib/modules/{release}/modules.dep", f"lib/modules/{release}/modules.dep.bin"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(name)
    manifest.write(target, {"release": release})
    return target


def again(label: str) -> kernels.Kernel:
    """What a new process gets."""
    kernels.ensure.cache_clear()
    return kernels.ensure(label)


def test_the_cache_serves_when_debian_cannot(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = "7.3.4+deb13-amd64"
    target = put(cache, release)
    (cache / "chosen.json").write_text(f'{{"7.3": "{release}"}}')
    monkeypatch.setattr("ublk_vm.apt.mirrors", list)
    assert again("7.3").release == release
    (target / "vmlinuz").write_text("rotten")
    with pytest.raises(kernels.KernelError, match=r"cannot fetch 7\.3: this machine's apt has no repository"):
        again("7.3")


def test_repositories_are_known_before_their_lists_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image whose lists were removed."""
    state, sources = tmp_path / "state", tmp_path / "sources"
    (state / "partial").mkdir(parents=True)
    sources.mkdir()
    (sources / "a.list").write_text(
        "deb http://one.invalid/debian trixie main\n"
        "deb http://two.invalid/apt trixie main\n"
        "deb http://one.invalid/debian-security trixie-security main\n"
    )
    config = tmp_path / "apt.conf"
    config.write_text(
        f'Dir::State::Lists "{state}";\nDir::Etc::SourceList "/dev/null";\nDir::Etc::SourceParts "{sources}";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(config))
    assert apt.mirrors() == ["http://one.invalid/debian", "http://two.invalid/apt"]
    (sources / "a.list").unlink()
    assert apt.mirrors() == []


class Suites:
    """Debian as it is after a series has gone."""

    def __init__(self, *releases: str) -> None:
        self.releases = releases
        self.asked = 0

    def names(self, prefix: str) -> list[str]:
        """Of all packages."""
        self.asked += 1
        return [f"{prefix}{release}" for release in self.releases]

    def field(self, package: str, name: str) -> str:
        """What the newest image is."""
        assert (package, name) == ("linux-image-amd64", "Depends")
        return f"linux-image-{self.releases[-1]} (= 1)"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def moved_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Suites:
    """Debian has 7.4 and no 7.3."""
    debian = Suites("6.12.120+deb13-amd64", "7.4.1+deb13-amd64")
    monkeypatch.setattr("ublk_vm.apt.opened", lambda _suites: debian)
    monkeypatch.setattr("ublk_vm.kernels._fetch_kernel", lambda _apt, release, _target: put(cache, release))
    return debian


def test_a_kernel_that_debian_dropped_stays_itself(
    cache: Path, moved_on: Suites, capfd: pytest.CaptureFixture[str]
) -> None:
    """A whole one of the series goes before a newer one of another; without one, what stands in says so."""
    for release in ("7.3.9+deb13-amd64", "7.3.10+deb13-amd64", "7.2.8+deb13-amd64"):
        put(cache, release)
    (cache / "chosen.json").write_text('{"7.3": "7.3.9+deb13-amd64", "7.3 asked": "0"}')
    kept = again("7.3")
    assert (kept.release, kept.stands_in, moved_on.asked) == ("7.3.10+deb13-amd64", False, 1)
    assert "7.3: Debian has none any more; keeping 7.3.10+deb13-amd64" in capfd.readouterr().err
    assert (again("7.3").release, moved_on.asked) == (kept.release, 1), "asked again within the week"
    assert (again("6.12").release, again("6.12").stands_in) == ("6.12.120+deb13-amd64", False)
    for release in ("7.3.9+deb13-amd64", "7.3.10+deb13-amd64"):
        (cache / "kernels" / release / "vmlinuz").write_text("rotten")
    other = again("7.3")
    assert (other.label, other.release, other.stands_in) == ("7.3", "7.4.1+deb13-amd64", True)
    assert "7.4.1+deb13-amd64 stands in" in capfd.readouterr().err


def test_a_stand_in_makes_room_for_the_real_one(cache: Path, moved_on: Suites) -> None:
    assert again("7.3").stands_in
    put(cache, "7.3.4+deb13-amd64")
    assert (again("7.3").release, moved_on.asked) == ("7.3.4+deb13-amd64", 1)
    moved_on.releases = ("7.3.11+deb13-amd64",)
    chosen = json.loads((cache / "chosen.json").read_text()) | {"7.3 asked": "0"}
    (cache / "chosen.json").write_text(json.dumps(chosen))
    assert (again("7.3").release, moved_on.asked) == ("7.3.11+deb13-amd64", 2)


def test_kvm_is_asked_once_per_boot_and_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("UBLK_RIG_ACCEL", raising=False)
    asked: list[accel.Accel] = []

    def boots(how: accel.Accel, _secs: float) -> bool:
        asked.append(how)
        return len(asked) > 1

    monkeypatch.setattr("ublk_vm.accel._may_open_kvm", lambda: True)
    assert [accel.choose(r, boots).name for r in ("1.0", "1.0", "2.0", "2.0")] == ["tcg", "tcg", "kvm", "kvm"]
    assert asked == [accel.KVM, accel.KVM]
    monkeypatch.setattr("ublk_vm.accel._may_open_kvm", lambda: False)
    assert accel.choose("2.0", boots) is accel.TCG


@pytest.mark.parametrize(
    ("there", "ours", "group", "said"),
    [
        (True, False, "kvm", "sudo usermod -aG kvm $USER"),
        (True, False, "root", "using emulation"),
        (True, True, "kvm", None),
        (False, False, "kvm", None),
    ],
)
def test_a_kvm_that_is_not_ours_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *,
    there: bool,
    ours: bool,
    group: str,
    said: str | None,
) -> None:
    accel.say.cache_clear()
    node = types.SimpleNamespace(exists=lambda: there, stat=lambda: types.SimpleNamespace(st_gid=1))
    monkeypatch.delenv("UBLK_RIG_ACCEL", raising=False)
    monkeypatch.setattr("ublk_vm.accel._may_open_kvm", lambda: ours)
    monkeypatch.setattr("ublk_vm.accel.Path", lambda _name: node)
    monkeypatch.setattr("grp.getgrgid", lambda _gid: types.SimpleNamespace(gr_name=group))
    why = accel.closed()
    assert (why is None) == (said is None)
    if said:
        assert said in str(why)
        assert ("usermod" in str(why)) == (group != "root")
        for _ in range(2):
            assert accel.choose("1.0", lambda _how, _secs: False) is accel.TCG
        assert capfd.readouterr().err == f"kvm: {why}\n"
        monkeypatch.setenv("UBLK_RIG_ACCEL", "tcg")
        assert accel.closed() is None


def test_timeouts_grow_under_emulation_and_by_the_users_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UBLK_RIG_TIMESCALE", raising=False)
    assert Timescale.of(emulated=False).seconds(10) == 10
    assert Timescale.of(emulated=True).seconds(10) == 10 * EMULATION
    monkeypatch.setenv("UBLK_RIG_TIMESCALE", "2")
    assert Timescale.of(emulated=True).seconds(10) == 20 * EMULATION


@pytest.mark.parametrize(
    "line",
    [
        "WARNING: CPU: 0 PID: 1 at block/blk-mq.c:1 blk_mq_free_request+0x1/0x2",
        "WARNING: possible circular locking dependency detected",
        "WARNING: block/blk-mq.c:1 at blk_mq_free_request+0x1/0x2, CPU#0: fio/1",
        "BUG: kernel NULL pointer dereference, address: 0000000000000000",
        "BUG: KASAN: slab-use-after-free in ublk_ch_release+0x1/0x2 [ublk_drv]",
        "kernel BUG at drivers/block/ublk_drv.c:1!",
        "Oops: general protection fault, probably for non-canonical address: 0000 [#1] PREEMPT SMP NOPTI",
        "INFO: task fio:123 blocked for more than 45 seconds.",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "rcu: INFO: rcu_preempt self-detected stall on CPU",
        "watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [fio:12]",
        "Kernel panic - not syncing: Fatal exception",
        "UBSAN: array-index-out-of-bounds in drivers/block/ublk_drv.c:1:2",
        "refcount_t: underflow; use-after-free.",
        "Out of memory: Killed process 1 (x)",
    ],
)
def test_kernel_complaints_are_recognised(line: str) -> None:
    assert problems_in([f"[    1.000000] {line}"]) == [f"[    1.000000] {line}"]
    assert problems_in([line], [r"^no match$"]) == [line]
    assert problems_in([line], [r".*"]) == []


@pytest.mark.parametrize(
    "line",
    [
        "I/O error, dev ublkb0, sector 0 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2",
        "Buffer I/O error on dev ublkb0, logical block 0, lost async page write",
        "EXT4-fs (ublkb0): mounted filesystem with ordered data mode",
        "EXT4-fs warning (device ublkb0): ext4_end_bio:343: I/O error 10 writing to inode 2",
        "RCU CPU stall warnings timeout set to 63 (rcu_cpu_stall_timeout).",
        "ublk_drv: loading out-of-tree module taints kernel.",
        "systemd[1]: a warning: nothing of ours",
    ],
)
def test_what_tests_provoke_on_purpose_is_no_complaint(line: str) -> None:
    assert problems_in([line]) == []


def test_the_archive_is_what_cpio_expects() -> None:
    packed = initramfs.archive({"init": b"#!/x", "a/b/c": b"12345"})
    assert len(packed) % 512 == 0
    assert packed.count(b"070701") == 7  # dev, a, a/b, dev/console, init, a/b/c, trailer
    assert b"TRAILER!!!\0" in packed


def test_packages_are_listed_with_a_reason() -> None:
    packages = wanted_packages()
    assert "qemu-system-x86" in packages
    assert all(reason for reason in packages.values())


def test_a_compiler_that_is_too_old_is_named() -> None:
    manifest = '[workspace.package]\nedition = "2024"\nrust-version = "1.88"\n'
    for said in ("cargo 1.88.0 (873a06493 2025-05-10)", "cargo 2.0.0", "cargo 1.105.1"):
        assert too_old(said, manifest, by_rustup=True) is None
    said = "cargo 1.85.0 (Debian)"
    assert too_old(said, manifest, by_rustup=True) == "Rust 1.85 is too old, 1.88 is needed: rustup update stable"
    assert "install Rust by rustup" in str(too_old(said, manifest, by_rustup=False))


def test_a_machine_that_is_no_debian_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotProvision, match=r"this is no Debian: .* busybox-static"):
        install({"busybox-static": "the guest's first programs"})
