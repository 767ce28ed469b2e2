"""A QEMU process with a kernel under test, the host's root under a throw-away overlay, and an agent inside.

The host's root is shared read-only, so the toolchain, the virtual environment and the build are in the guest as
they are on the host, at the same paths, and nothing has to be installed into images.
"""

from __future__ import annotations

import atexit
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ublk_vm import accel, initramfs, layout
from ublk_vm.channel import Channel, MachineDied
from ublk_vm.timescale import Timescale
from ublk_vm.verdict import problems_in

if TYPE_CHECKING:
    from ublk_vm.accel import Accel
    from ublk_vm.kernels import Kernel

BOOT_SECS = 40.0
BOOT_TRIES = 3
SHARED_AT = "/artifacts"
# 5: warnings reach the console, so that the last words of a dying kernel are all there.
CONSOLE_LEVEL = 5


@dataclass(frozen=True)
class Shape:
    """What a test asks of its machine."""

    smp: int = 2
    mem: str = "2G"
    icount: bool = False


def _tsc() -> str:
    """The host's clock rate: a guest that calibrates it while the host is busy has a wrong clock ever after."""
    found = re.search(r"cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text())
    return f"tsc_early_khz={round(float(found[1]) * 1000)}" if found else ""


def guest_path() -> str:
    """Real tool directories first: every pyenv or rustup shim costs seconds under emulation."""
    python = [str(Path(sys.executable).parent), str(Path(sys.executable).resolve().parent)]
    rustc = shutil.which("rustc")
    rust = []
    if rustc:
        done = subprocess.run([rustc, "--print", "sysroot"], capture_output=True, text=True, check=False)
        rust = [f"{done.stdout.strip()}/bin"] if done.returncode == 0 else []
    system = [f"{root}/{name}" for root in ("/usr/local", "/usr", "") for name in ("sbin", "bin")]
    return ":".join(dict.fromkeys([*python, *rust, *system]))


class VirtualMachine:
    """A booted guest."""

    def __init__(
        self, kernel: Kernel, shape: Shape, how: Accel, shared: Path, boot_secs: float | None = None
    ) -> None:
        self.label = kernel.label
        self.cpus = shape.smp
        self.emulated = how.emulated
        self.scale = Timescale.of(emulated=how.emulated)
        self.shape = shape
        self.accel = how
        began = time.monotonic()
        self._dir = Path(tempfile.mkdtemp(prefix="ublk-vm."))
        self._console = self._dir / "console.log"
        self._final_console = ""
        self._cleanup = weakref.finalize(self, shutil.rmtree, self._dir, ignore_errors=True)
        (self._dir / "initramfs").write_bytes(initramfs.build(kernel, self._settings(kernel)))
        shared.mkdir(parents=True, exist_ok=True)
        with (self._dir / "qemu.log").open("w") as log:
            self._qemu = subprocess.Popen(
                self._command(kernel, shared),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C at the terminal is for whoever runs the tests, who ends this machine in good order.
                start_new_session=True,
            )
        atexit.register(self.kill)
        try:
            self.channel = self._connect()
            limit = boot_secs if boot_secs is not None else self.scale.seconds(BOOT_SECS)
            self.release = self.channel.wait_ready(limit)
        except BaseException as e:
            words = self.last_words()
            self.kill()
            if isinstance(e, MachineDied):
                raise MachineDied(f"{kernel.release} did not boot: {e}; console:\n{words}") from e
            raise
        self.boot_secs = time.monotonic() - began

    def _settings(self, kernel: Kernel) -> dict[str, str]:
        return {
            "RIG_PACKAGE": str(layout.PACKAGE),
            "RIG_MODULES": str(kernel.modules),
            "RIG_BUSYBOX": str(initramfs.busybox()),
            "RIG_PYTHON": str(Path(sys.executable).resolve()),
            "RIG_PATH": guest_path(),
            "RIG_HOME": str(Path.home()),
            "RIG_SHARED_AT": SHARED_AT,
            "RIG_HUNG_TASK_SECS": str(round(self.scale.seconds(15))),
            "RIG_LOCKUP_SECS": str(min(60, round(self.scale.seconds(10)))),
        }

    def _command(self, kernel: Kernel, shared: Path) -> list[str]:
        words = (
            f"console=ttyS0 loglevel={CONSOLE_LEVEL} panic=-1 oops=panic mitigations=off nokaslr {_tsc()} "
            "tsc=reliable no_timer_check random.trust_cpu=on rcupdate.rcu_expedited=1 nmi_watchdog=0 "
            f"rcupdate.rcu_cpu_stall_timeout={min(300, round(self.scale.seconds(21)))} "
            "log_buf_len=4M cryptomgr.notests raid=noautodetect 8250.nr_uarts=1"
        )
        nine = "security_model=none,multidevs=remap"
        return [
            # A QEMU must not outlive the run that started it, however that ends.
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-M", "q35", *self.accel.arguments),
            *("-smp", str(self.shape.smp), "-m", self.shape.mem, "-nodefaults", "-no-user-config"),
            *("-display", "none", "-no-reboot", "-serial", f"file:{self._console}"),
            *("-kernel", str(kernel.vmlinuz), "-initrd", f"{self._dir}/initramfs", "-append", words),
            *("-chardev", f"socket,id=agent,path={self._dir}/agent.sock,server=on,wait=off"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=ublk.agent"),
            *("-virtfs", f"local,path=/,mount_tag=root,readonly=on,{nine}"),
            *("-virtfs", f"local,path={shared},mount_tag=shared,{nine}"),
        ]

    def _connect(self) -> Channel:
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(f"{self._dir}/agent.sock")
            except OSError:
                sock.close()
                if self._qemu.poll() is not None:
                    raise MachineDied("QEMU ended at once") from None
                time.sleep(0.01)
            else:
                return Channel(sock)

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._qemu.pid

    def console(self) -> str:
        """Everything on the serial console, also after the end."""
        if self._console.exists():
            return self._console.read_text(errors="replace")
        return self._final_console

    def last_words(self) -> str:
        """The end of the console and what QEMU itself had to say."""
        log = self._dir / "qemu.log"
        return self.console()[-4000:] + (log.read_text(errors="replace")[-2000:] if log.exists() else "")

    def stop(self) -> None:
        """Power off, or kill what does not."""
        try:
            self.channel.send({"op": "poweroff"})
            self._qemu.wait(self.scale.seconds(5))
        except (MachineDied, subprocess.TimeoutExpired):
            pass
        self.kill()

    def kill(self) -> None:
        """End it now; whoever waits for an answer of it gets MachineDied."""
        atexit.unregister(self.kill)
        self._qemu.kill()
        self._qemu.wait()
        if hasattr(self, "channel"):
            self.channel.close()
        self._final_console = self.console()
        self._cleanup()


def boot(kernel: Kernel, shape: Shape, shared: Path) -> VirtualMachine:
    """Boot a guest. One that dies on the way up is tried again: emulation loses about one boot in a hundred."""

    def boots_with(how: Accel, secs: float) -> bool:
        try:
            VirtualMachine(kernel, Shape(), how, shared, secs).stop()
        except MachineDied:
            return False
        return True

    how = accel.ICOUNT if shape.icount else accel.choose(kernel.release, boots_with)
    for _ in range(BOOT_TRIES - 1):
        try:
            return _booted_cleanly(kernel, shape, how, shared)
        except MachineDied as e:
            print(f"boot failed, trying again: {e}", file=sys.stderr)
    return _booted_cleanly(kernel, shape, how, shared)


def _booted_cleanly(kernel: Kernel, shape: Shape, how: Accel, shared: Path) -> VirtualMachine:
    """A guest whose kernel has nothing to complain about before any test had a chance to cause it."""
    machine = VirtualMachine(kernel, shape, how, shared)
    try:
        log = machine.channel.ask("inspect", machine.scale.seconds(BOOT_SECS))["log"]
        if found := problems_in(log):
            raise MachineDied("its kernel complained while booting:\n" + "\n".join(found))
    except MachineDied:
        machine.kill()
        raise
    return machine
