"""TLS on every hop: what a process shows of itself, and whom it believes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from common.errors import StartupError
from common.logs import logger
from common.settings import TlsSettings


def server_credentials(tls: TlsSettings) -> grpc.ServerCredentials | None:
    """What a server shows to its callers; None: it speaks without TLS. With `callers_ca` callers show theirs too.

    Certificates that are replaced on disk are shown from the next connection on.

    Raises:
        StartupError: a file is missing or unreadable, or one was named without the other.
    """
    if tls.certificate is None and tls.key is None and tls.callers_ca is None:
        return None
    if tls.certificate is None or tls.key is None:
        raise StartupError("TLS needs both tls.certificate and tls.key")
    files = _Files([tls.key, tls.certificate, tls.callers_ca])
    configuration = _configuration(files.read())

    def fetch() -> Any:
        try:
            return _configuration(files.read()) if files.changed() else None
        except StartupError as error:
            logger().error("the certificates cannot be read again: the old ones stay", fault=str(error))
            return None

    return grpc.dynamic_ssl_server_credentials(
        configuration, fetch, require_client_authentication=tls.callers_ca is not None
    )


def channel_credentials(
    ca: Path | None, certificate: Path | None = None, key: Path | None = None
) -> grpc.ChannelCredentials:
    """Whom a caller believes, and what it shows if it is asked. `ca`: None: the system's authorities.

    Raises:
        StartupError: a file cannot be read, or a certificate came without its key.
    """
    if (certificate is None) != (key is None):
        raise StartupError("a client's certificate needs its key too; one file may hold both")
    return grpc.ssl_channel_credentials(_read(ca), _read(key), _read(certificate))


class _Files:
    """Files that may be replaced."""

    def __init__(self, paths: list[Path | None]) -> None:
        self._paths = paths
        self._seen = self._version()

    def changed(self) -> bool:
        """Since the last time that they were."""
        version = self._version()
        changed, self._seen = version != self._seen, version
        return changed

    def read(self) -> list[bytes | None]:
        return [_read(path) for path in self._paths]

    def _version(self) -> list[int]:
        return [_mtime_ns(path) for path in self._paths if path is not None]


def _configuration(files: list[bytes | None]) -> Any:
    key, certificate, callers_ca = files
    assert key is not None and certificate is not None  # noqa: PT018 (they were named)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], callers_ca)


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0  # it is being replaced


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from None
