"""Ctrl-C and the interpreter's exit during calls: prompt, quiet, and without leftovers."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest
from programs import Program, Service, over_http


@pytest.fixture(scope="module")
def by_name() -> Iterator[Service]:
    with over_http("localhost") as service:
        yield service


LONG = """
TEXTS = [f"{i} " * 300 for i in range(5_000)] if client.config.backend == "local" else ["never"]
"""


class TestCtrlC:
    @pytest.mark.parametrize(
        "call",
        [
            "client.embed(TEXTS)",
            "asyncio.run(client.aembed(TEXTS))",
        ],
    )
    def test_ends_a_request_and_the_client_stays_usable(self, http: Service, call: str) -> None:
        self._interrupt(http, call)

    def test_ends_a_long_computation(self, local: Service) -> None:
        self._interrupt(local, "client.embed(TEXTS)")

    def test_a_second_one_ends_a_blocking_call_in_a_coroutine(self, http: Service) -> None:
        """asyncio handles the first one itself, once its loop is no longer blocked."""
        with http.start("""
            async def block():
                client.embed(["never"])
            try:
                asyncio.run(block())
            except KeyboardInterrupt:
                print("interrupted", right(1))
        """) as program:
            self._wait_for_the_call(program, http)
            program.interrupt()
            time.sleep(0.5)
            assert http.waiting
            program.interrupt()
            assert program.finish() == ["interrupted True"]

    def test_ends_each_of_two_calls(self, http: Service) -> None:
        with http.start("""
            for _ in range(2):
                try:
                    client.embed(["never"])
                except KeyboardInterrupt:
                    print("interrupted")
                    sys.stdin.readline()
            print(right(1))
        """) as program:
            for _ in range(2):
                self._wait_for_the_call(program, http)
                program.interrupt()
                assert program.line() == "interrupted"
                program.wait_until(lambda: not http.waiting)
                program.tell()
            assert program.finish() == ["True"]

    @pytest.mark.parametrize(
        "call", ["client.embed(['never'])", "asyncio.run(client.aembed(['never']))"]
    )
    def test_that_is_not_caught_ends_the_program(self, http: Service, call: str) -> None:
        """Pressed repeatedly: at any moment the program ends, with Python's own traceback."""
        with http.start(call) as program:
            self._wait_for_the_call(program, http)
            for _ in range(10):
                program.interrupt()
                time.sleep(0.001)
            _, err = program.process.communicate()
            assert program.process.returncode in (-signal.SIGINT, 1), err
            assert "KeyboardInterrupt" in err

    def _interrupt(self, service: Service, call: str) -> None:
        with service.start(f"""
            {LONG.strip()}
            right(0)
            print("ready")
            try:
                {call}
            except KeyboardInterrupt:
                print("interrupted", right(1))
            sys.stdin.readline()
        """) as program:
            assert program.line() == "ready"
            self._wait_for_the_call(program, service)
            program.interrupt()
            assert program.line() == "interrupted True"
            program.wait_until(lambda: not service.waiting)  # the server has noticed
            program.tell()
            assert program.finish() == []

    @staticmethod
    def _wait_for_the_call(program: Program, service: Service) -> None:
        if service.port:
            program.wait_until(lambda: bool(service.waiting))
        else:
            time.sleep(1)


class TestExit:
    @pytest.mark.parametrize(
        "start",
        [
            "threading.Thread(target=client.embed, args=(TEXTS,), daemon=True).start()",
            "parts = client.iter_embed(['text 0', *TEXTS]); next(parts)",
        ],
        ids=["a thread waits", "an iterator is open"],
    )
    def test_cancels_calls_in_progress(self, service: Service, start: str) -> None:
        self._end_during(service, start)

    @pytest.mark.parametrize(
        "start",
        [
            "threading.Thread(target=lambda: asyncio.run(call()), daemon=True).start()",
            "parts = client.aiter_embed(['text 0', *TEXTS]); asyncio.run(anext(parts))",
        ],
        ids=["a loop waits", "an iterator is open"],
    )
    def test_cancels_asynchronous_calls_in_progress(self, http: Service, start: str) -> None:
        self._end_during(http, start)

    def test_silently_ends_daemon_threads_that_keep_calling(self, http: Service) -> None:
        out = http.run("""
            def work():
                while True: right(1)
            right(0)
            for _ in range(8): threading.Thread(target=work, daemon=True).start()
            time.sleep(0.5)
        """)
        assert out == []

    def test_without_cleanup_leaves_nothing(self, http: Service) -> None:
        """`os._exit` skips our handlers: the operating system closes the connections."""
        with http.start("""
            threading.Thread(target=client.embed, args=(["never"],)).start()
            sys.stdin.readline()
            os._exit(0)
        """) as program:
            program.wait_until(lambda: bool(http.waiting))
            program.tell()
            assert program.finish() == []

    def test_of_a_thread_leaves_the_client_usable(self, http: Service) -> None:
        out = http.run("""
            def work():
                right(0)
                sys.exit(3)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            print(right(1))
        """)
        assert out == ["True"]

    def test_of_the_main_thread_leaves_other_threads_working(self, service: Service) -> None:
        out = service.run("""
            def work():
                threading.main_thread().join()
                print(all(right(i) for i in range(10)))
            threading.Thread(target=work).start()
        """)
        assert out == ["True"]

    def test_callbacks_may_still_embed(self, service: Service) -> None:
        out = service.run("""
            right(2)
            atexit.register(lambda: print("again", right(0)))
            atexit.register(lambda: print("first", right(1)))
        """)
        assert out == ["first True", "again True"]

    @staticmethod
    def _end_during(service: Service, start: str) -> None:
        with service.start(f"""
            {LONG.strip()}
            client = KalmClient(batch_size=1)
            async def call():
                await client.aembed(TEXTS)
            right(0)
            {start}
            sys.stdin.readline()
        """) as program:
            if service.port:
                program.wait_until(lambda: service.waiting == ["never"])
            program.tell()
            assert program.finish() == []


class TestHostNames:
    """They are resolved on threads, which must not delay the exit."""

    def test_are_resolved_after_the_main_thread_has_ended(self, by_name: Service) -> None:
        out = by_name.run("""
            def work():
                threading.main_thread().join()
                print(right(0), threads())
            threading.Thread(target=work).start()
        """)
        assert out == ["True ['MainThread', 'Thread-1 (work)', 'kalm-io']"]

    def test_the_exit_does_not_wait_for_a_name_server(self, by_name: Service) -> None:
        # To the main thread, and again if it comes just before that thread blocks.
        out = by_name.run("""
            import socket
            interrupted = threading.Event()
            def never_resolves(*_, **__):
                while not interrupted.wait(1):
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(3600)
            socket.getaddrinfo = never_resolves
            try:
                client.embed(["text 0"])
            except KeyboardInterrupt:
                interrupted.set()
                print(threads())
        """)
        assert out == ["['MainThread', 'kalm-dns', 'kalm-io']"]

    def test_that_are_unknown_are_a_connection_error(self, by_name: Service) -> None:
        out = by_name.run("""
            client = KalmClient(base_url="http://no-such-host.invalid", max_retries=0)
            try:
                client.embed(["text 0"])
            except Exception as error:
                print(type(error).__name__)
        """)
        assert out == ["ConnectionFailedError"]
