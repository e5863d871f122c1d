"""Certificate and key of an endpoint that speaks TLS, as a Serve config's `http_options` name them.

Ray's own names, `ssl_certfile` and `ssl_keyfile`. Ray 2.60 hands them to its Python proxy only: HAProxy, which is
before our pools, gets them from haproxy.py. Called by: lifecycle.py, haproxy.py, node.py, cli/serve.py,
serving/checks.py.
"""

import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftkv.config import StrictModel
from swiftkv.errors import ConfigError

_CONNECT_TIMEOUT_S = 5.0


class Tls(StrictModel):
    """Two PEM files. The certificate's holds those between it and its authority too."""

    ssl_certfile: Path
    ssl_keyfile: Path


def read_tls(options: Mapping[str, Any], source: str) -> Tls | None:
    """What the options say, with absolute paths; None if they name no certificate.

    Raises: ConfigError if one of the two is missing or cannot be read, if they do not belong together, or if the key
    has a password, which nothing here could ask for.
    """
    names = ("ssl_certfile", "ssl_keyfile")
    given = {name: options[name] for name in names if options.get(name)}
    if not given:
        return None
    for name in names:
        if name not in given:
            raise ConfigError(f"{source}: {next(iter(given))} is given and {name} is not; TLS needs both.")
        if not Path(given[name]).is_file():
            raise ConfigError(f"{source}: {name} is {given[name]}, and there is no such file.")
    tls = Tls(**{name: Path(value).resolve() for name, value in given.items()})
    _check_pair(tls, source)
    return tls


def speaks_tls(host: str, port: int) -> bool:
    """Whether what listens there answers a TLS handshake; whose certificate it has is not looked at.

    Raises: OSError if nothing listens.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S) as connection:
        try:
            with context.wrap_socket(connection):
                return True
        except (ssl.SSLError, ConnectionError):
            return False


def _check_pair(tls: Tls, source: str) -> None:
    def refuse_password() -> str:
        raise ConfigError(
            f"{source}: ssl_keyfile is {tls.ssl_keyfile}, which asks for a password; give one without "
            "(openssl pkey -in FILE -out FILE), closed to others (chmod 600)."
        )

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.ssl_certfile, tls.ssl_keyfile, refuse_password)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{source}: ssl_certfile {tls.ssl_certfile} and ssl_keyfile {tls.ssl_keyfile} cannot be used: {error}. "
            "Give a certificate and the key that it was made for, both as PEM."
        ) from error
