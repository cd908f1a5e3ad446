"""Keeps what Ray Serve would open to all machines to this one."""

from __future__ import annotations

from typing import Any

import ray.serve._private.replica as serve_replica


def keep_to_loopback() -> None:
    """Have this replica's gRPC port, which Serve opens next, listen on loopback.

    Nobody uses it, and it unpickles whatever it is sent, but Serve has no setting for it and opens
    it to all machines.
    """
    listen = serve_replica.add_port_to_grpc_server

    def listen_here(server: Any, address: str) -> Any:
        return listen(server, address.replace("[::]", "127.0.0.1"))

    serve_replica.add_port_to_grpc_server = listen_here
