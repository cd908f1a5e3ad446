"""A channel over TLS: to a server that a named authority vouches for, and to no other."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from offramp.controller.errors import RegistryUnavailableError
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.deploy.serve.redis_server import EmbeddedRedis
from support.releases.channel import Bench


def self_signed(folder: Path) -> Path:
    """A certificate of 127.0.0.1 that vouches for itself, its key behind it in the file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "offramp test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    folder.mkdir()
    (folder / "server.pem").write_bytes(made.public_bytes(Encoding.PEM) + secret)
    return folder / "server.pem"


@contextlib.contextmanager
def ending_tls(socket_path: str, certificate: Path) -> Iterator[int]:
    """A port that takes TLS and passes on what it carries to a server that speaks none."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    loop = asyncio.new_event_loop()

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await source.read(65536):
                sink.write(piece)
        sink.close()

    async def serve(client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        reader, writer = await asyncio.open_unix_connection(socket_path)
        await asyncio.gather(copy(client, writer), copy(reader, answer))

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server.sockets[0].getsockname()[1]
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    server.close()
    for each in asyncio.all_tasks(loop):
        each.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of a Redis behind TLS, and the certificate that it shows."""
    certificate = self_signed(tmp_path / "tls")
    with (
        EmbeddedRedis(tmp_path / "redis") as redis,
        ending_tls(redis.url.removeprefix("unix://"), certificate) as port,
    ):
        yield port, certificate


def test_a_release_travels_encrypted(server: tuple[int, Path], tmp_path: Path) -> None:
    port, certificate = server
    url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
    registry = RedisRegistry(url, "demo")
    bench = Bench(registry, tmp_path)
    bench.serve(3)
    ack = bench.worker().poll_once()
    assert (ack.state, ack.generation) == (AckState.ACK, 1)
    assert [each.generation for each in registry.acks()] == [1]
    registry.close()


@pytest.mark.parametrize("speaks_tls", [True, False])
def test_a_server_that_nobody_vouches_for_is_not_spoken_to(
    server: tuple[int, Path], tmp_path: Path, speaks_tls: bool
) -> None:
    port, _ = server
    other = self_signed(tmp_path / "other")
    scheme = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={other}"
    registry = RedisRegistry(scheme if speaks_tls else f"redis://127.0.0.1:{port}/0", "demo", 0.5)
    with pytest.raises(RegistryUnavailableError, match="REDIS_URL"):
        registry.head()
    ack = Bench(registry, tmp_path).worker().poll_once()
    assert (ack.state, ack.generation) == (AckState.STALE, 0)
    registry.close()
