"""Connections and threads end with `close`, or with the last reference to a client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from programs import SOON, Service, over_http


@pytest.fixture(scope="module")
def https(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    options = {"ssl_keyfile": folder / "key.pem", "ssl_certfile": folder / "certificate.pem"}
    with over_http(**options) as service:
        service.environment["SSL_CERT_FILE"] = str(folder / "authority.pem")
        yield service


ENDS = {
    "closed": "client.close()",
    "closed by a loop": "asyncio.run(client.aclose())",
    "dropped in a cycle": "cycle = [client]; cycle.append(cycle); del client, cycle; gc.collect()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_closed_or_dropped_client_has_no_connection(http: Service, end: str) -> None:
    with http.start(f"""
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(8) as pool:
            print(all(pool.map(right, range(20))))
        sys.stdin.readline()
        {ENDS[end]}
        sys.stdin.readline()
        print(threads())
    """) as program:
        assert program.line() == "True"
        assert http.connections() > 0
        program.tell()
        program.wait_until(lambda: not http.connections(), SOON)
        program.tell()
        assert program.line() == "['MainThread', 'kalm-io']"
        assert program.finish() == []


def test_dropped_clients_leave_neither_connections_nor_threads(http: Service) -> None:
    http.peers.clear()
    with http.start("""
        for i in range(60):
            client = KalmClient()
            assert right(i % 20)
        print(threads())
        sys.stdin.readline()
    """) as program:
        most = 0
        while len(http.peers) < 60 and program.process.poll() is None:
            most = max(most, http.connections())
            time.sleep(0.05)
        assert program.line() == "['MainThread', 'kalm-io']"
        assert 0 < most < 20
        program.wait_until(lambda: http.connections() == 1, SOON)
        program.tell()
        assert program.finish() == []


def test_many_clients_share_one_thread(http: Service) -> None:
    out = http.run("""
        clients = [KalmClient() for _ in range(50)]
        for i, client in enumerate(clients):
            assert right(i % 20)
        print(threads())
    """)
    assert out == ["['MainThread', 'kalm-io']"]


def test_a_client_that_is_closed_and_used_again_keeps_no_session(http: Service) -> None:
    out = http.run("""
        for i in range(20):
            assert right(i)
            client.close()
        gc.collect()
        print(sum(isinstance(each, session.Session) for each in gc.get_objects()))
    """)
    assert out == ["0"]


@pytest.mark.parametrize("end", ["", "client.close()"])
def test_the_exit_is_quiet_over_tls(https: Service, end: str) -> None:
    out = https.run(f"""
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor(4) as pool:
            print(all(pool.map(right, range(20))))
        {end}
    """)
    assert out == ["True"]


def test_constructing_and_closing_opens_no_connection(http: Service) -> None:
    http.peers.clear()
    out = http.run("""
        with KalmClient(): pass
        async def main():
            async with KalmClient(): pass
        asyncio.run(main())
        del client
    """)
    assert (out, http.peers) == ([], [])
