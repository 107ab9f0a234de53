"""One command in a virtual machine: QEMU without hardware support, two processors, no network device."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from vm.kernels import uncompressed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vm.kernels import Kernel

HERE = Path(__file__).parent
MEMORY_MIB = 2560
# What a host's root needs that a distribution's kernel has as modules.
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_rng")


class Result(NamedTuple):
    """How a command ended."""

    status: int
    output: str
    duration_s: float  # starting and ending the machine included


class BootError(Exception):
    """The machine ended, or was ended, before the command; the message ends with what both said last."""


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    timeout_s: float = 600,
    memory_mib: int = MEMORY_MIB,
    echo: IO[str] | None = None,
) -> Result:
    """Run a command under a kernel, as root, on a copy of this machine's files that nobody else sees.

    Args:
        kernel: what to boot.
        command: what to run, in this process's directory.
        timeout_s: the machine is ended after that.
        memory_mib: of the machine; what it writes stays in it.
        echo: gets the output as it comes.

    Raises:
        BootError: there is no exit status.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ebpfproxy-vm-") as temporary:
        work = Path(temporary)
        share = work / "share"
        share.mkdir()
        shutil.copy(HERE / "guest", share)
        (share / "modules").write_text(f"{kernel.modules}\n")
        (share / "command").write_text(f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(command)}\n")
        (share / "output").touch()
        _make_initramfs(kernel, work)
        console = work / "console"
        # It ends with us, however we end.
        argv = ["setpriv", "--pdeathsig", "KILL", "--", *_qemu(kernel, work, share, console, memory_mib)]
        with (
            (work / "qemu").open("w+b") as said,
            (share / "output").open(errors="replace") as output,
            subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as machine,
        ):
            is_over = has_ended = False
            try:
                while not (has_ended or is_over):
                    time.sleep(0.05)
                    has_ended = machine.poll() is not None
                    is_over = time.monotonic() - started > timeout_s
                    if echo:
                        echo.write(output.read())
                        echo.flush()
            finally:
                machine.kill()
        said_all = (share / "output").read_text(errors="replace")
        try:
            status = int((share / "status").read_text())
        except (FileNotFoundError, ValueError):
            why = f"no end after {timeout_s:g} s" if is_over else f"QEMU ended with {machine.returncode}"
            told = "\n".join(
                [
                    _tail(path.read_text(errors="replace"))
                    for path in (work / "qemu", console)
                    if path.exists()
                ]
            )
            raise BootError(f"{kernel.release}: {why}\n{told}\n{_tail(said_all)}") from None
        return Result(status, said_all, time.monotonic() - started)


def _qemu(kernel: Kernel, work: Path, share: Path, console: Path, memory_mib: int) -> list[str]:
    files = "security_model=none,multidevs=remap"
    return [
        *["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"],
        # Not KVM: a machine that is virtual itself often has one that does not work.
        *["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"],
        *["-m", str(memory_mib), "-serial", f"file:{console}", "-device", "virtio-rng-pci"],
        *["-fsdev", f"local,id=host,path=/,readonly=on,{files}"],
        *["-device", "virtio-9p-pci,fsdev=host,mount_tag=host"],
        *["-fsdev", f"local,id=share,path={share},{files}"],
        *["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"],
        *["-kernel", str(kernel.vmlinux), "-initrd", str(work / "initramfs")],
        # The emulated HPET, which the kernel would choose, is slow to ask.
        *["-append", "console=ttyS0 quiet panic=-1 tsc=reliable"],
    ]


def _make_initramfs(kernel: Kernel, work: Path) -> None:
    tree = work / "tree"
    for directory in ("bin", "dev", "proc", "modules", "lower", "upper", "root"):
        (tree / directory).mkdir(parents=True)
    shutil.copy(HERE / "init", tree)
    shutil.copy(shutil.which("busybox") or "busybox", tree / "bin")
    order = []
    for path in kernel.module_files(*MODULES):
        name = f"{path.name.partition('.ko')[0]}.ko"
        (tree / "modules" / name).write_bytes(uncompressed(path.read_bytes()))
        order.append(f"{name}\n")
    (tree / "modules" / "order").write_text("".join(order))
    names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    with (work / "initramfs").open("wb") as archive:
        subprocess.run(
            ["cpio", "--create", "--quiet", "--format=newc"],
            cwd=tree,
            input=names.encode(),
            stdout=archive,
            check=True,
        )


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-30:])
