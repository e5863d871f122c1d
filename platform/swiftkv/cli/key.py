"""`swiftkv key`: a new API key for a tenant of the gateway. Called by: cli/main.py. Calls: serving/gateway/keys.py."""

import typer

from swiftkv.serving.gateway.keys import create_key


def key() -> None:
    """Make an API key for the gateway: the key, shown once and stored nowhere, and its hash for the tenants' file."""
    secret, digest = create_key()
    typer.echo(f"key, shown only now: {secret}\nfor the tenants' file: key_sha256: [{digest}]")
