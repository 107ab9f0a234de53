"""Certificates of an authority of one's own, made by openssl."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, NamedTuple

from rig.names import temporary_directory
from rig.process import HERE

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Certificate(NamedTuple):
    """A certificate and its key, in PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates; its files are gone with it.

    Attributes:
        certificate: its own, to be trusted.
        key: also good as a key for signing tokens.
    """

    def __init__(self) -> None:
        self.directory = temporary_directory("certificates")
        self.certificate, self.key = self.directory / "ca.crt", self.directory / "ca.key"
        HERE.run(
            *("openssl", "req", "-x509", *KEY, "-days", "2", "-subj", "/CN=test authority"),
            *("-keyout", self.key, "-out", self.certificate),
        )

    def issue(self, name: str, *alternatives: str, organization: str = "") -> Certificate:
        """Return a certificate for a server (with ``IP:..`` or ``DNS:..``) or a client (without)."""
        base = self.directory / name.replace("/", "_").replace(":", "_")
        made = Certificate(base.with_suffix(".crt"), base.with_suffix(".key"))
        subject = (f"/O={organization}" if organization else "") + f"/CN={name}"
        extensions = ["-addext", f"subjectAltName={','.join(alternatives)}"] if alternatives else []
        HERE.run(
            *("openssl", "req", "-x509", *KEY, "-days", "2", "-subj", subject, *extensions),
            *("-CA", self.certificate, "-CAkey", self.key),
            *("-addext", f"extendedKeyUsage={'serverAuth' if alternatives else 'clientAuth'}"),
            *("-addext", "basicConstraints=critical,CA:false"),
            *("-keyout", made.key, "-out", made.certificate),
        )
        return made

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
