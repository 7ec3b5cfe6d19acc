"""Forked, spawned and pooled processes."""

from __future__ import annotations

import pytest
from programs import SOON, Service


def test_a_child_forked_after_the_first_call_works_and_so_does_its_parent(service: Service) -> None:
    out = service.run("""
        print(right(0))
        print(ended_well(fork(lambda: right(1) and threads()[-1] == "kalm-io")))
        print(right(2), threads()[0], threads()[-1])
    """)
    assert out == ["True", "True", "True MainThread kalm-io"]


def test_parent_and_children_have_connections_of_their_own(http: Service) -> None:
    http.peers.clear()
    out = http.run("""
        client = KalmClient(max_concurrency=1)
        right(0)
        def child():
            return right(1) and ended_well(fork(grandchild)) and right(2)
        def grandchild():
            return right(3)
        print(ended_well(fork(child)), right(4))
    """)
    assert out == ["True True"]
    parent, child, grandchild, child_again, parent_again = http.peers
    assert child == child_again
    assert parent == parent_again  # a child's exit leaves its parent's connections open
    assert len({parent, child, grandchild}) == 3


def test_a_child_does_not_keep_its_parents_connections_open(http: Service) -> None:
    with http.start("""
        right(0)
        read, write = os.pipe()
        child = fork(lambda: os.read(read, 1) and right(1))
        client.close()
        print("closed")
        sys.stdin.readline()
        os.write(write, b"!")
        print(ended_well(child))
    """) as program:
        assert program.line() == "closed"
        program.wait_until(lambda: not http.connections(), SOON)
        program.tell()
        assert program.finish() == ["True"]


def test_a_child_that_calls_nothing_exits_quietly(http: Service) -> None:
    out = http.run("""
        right(0)
        print(ended_well(fork(lambda: True)), right(1))
        print(ended_well(fork(lambda: client.close() is None and gc.collect() >= 0)), right(2))
    """)
    assert out == ["True True", "True True"]


def test_forks_work_in_threads_and_during_the_exit(http: Service) -> None:
    """These children end at once, since the work in progress is their parent's."""
    out = http.run("""
        from concurrent.futures import ThreadPoolExecutor
        from kalm_integrations import event_loop
        def child(i):
            def work():
                thread = threading.Thread(target=lambda: os._exit(not right(i)))
                thread.start()
                thread.join()
            return ended_well(fork(work))
        right(0)
        with ThreadPoolExecutor(4) as pool:
            print(all(pool.map(child, range(8))), right(1))
        event_loop._stop_at_exit()
        print(child(2))
    """)
    assert out == ["True True", "True"]


def test_every_process_gets_its_own_vectors_when_forked_during_calls(http: Service) -> None:
    out = http.run("""
        right(0)
        wrong, stop = [], threading.Event()
        def work(first):
            while not stop.is_set():
                wrong.extend(i for i in range(first, first + 5) if not right(i))
        workers = [threading.Thread(target=work, args=(first,)) for first in (0, 5, 10, 15)]
        for worker in workers: worker.start()
        children = []
        for _ in range(5):
            time.sleep(0.02)
            children.append(fork(lambda: all(right(i) for i in range(20))))
        print([ended_well(child) for child in children])
        stop.set()
        for worker in workers: worker.join()
        print(wrong, threads()[0])
    """)
    assert out == ["[True, True, True, True, True]", "[] MainThread"]


def test_a_child_forked_during_the_first_call_of_another_thread_works(http: Service) -> None:
    """The modules that the call imports are complete in the child."""
    out = http.run("""
        first = threading.Thread(target=client.warm_up)
        first.start()
        children = []
        for _ in range(4):
            time.sleep(0.03)
            children.append(fork(lambda: right(1)))
        print([ended_well(child) for child in children])
        first.join()
        print(right(2))
    """)
    assert out == ["[True, True, True, True]", "True"]


def test_a_childs_exit_does_not_end_a_request_of_its_parent(http: Service) -> None:
    with http.start("""
        right(0)
        threading.Thread(target=client.embed, args=(["never"],), daemon=True).start()
        sys.stdin.readline()
        child = fork(lambda: right(1) and gc.collect() >= 0)
        print(ended_well(child), right(2))
        sys.stdin.readline()
    """) as program:
        program.wait_until(lambda: http.waiting == ["never"])
        program.tell()
        assert program.line() == "True True"
        assert http.waiting == ["never"]
        program.tell()
        assert program.finish() == []


@pytest.mark.parametrize(
    ("backend", "method"), [("http", "fork"), ("http", "spawn"), ("local", "fork")]
)
def test_a_pickled_adapter_works_in_a_pool_of_processes(
    request: pytest.FixtureRequest, backend: str, method: str
) -> None:
    service: Service = request.getfixturevalue(backend)
    out = service.run(f"""
        import logging
        from concurrent.futures import ProcessPoolExecutor
        from kalm_integrations import KalmModalEmbeddings
        embeddings = KalmModalEmbeddings()
        texts = [f"text {{i}}" for i in range(12)]
        embeddings.embed_query(texts[0])
        context = multiprocessing.get_context({method!r})
        # Workers that load their engines may take a while, and would log it.
        with ProcessPoolExecutor(2, context, logging.disable) as pool:
            vectors = list(pool.map(embeddings.embed_query, texts))
        print([is_of(vector, i) for i, vector in enumerate(vectors)].count(True))
        print(is_of(embeddings.embed_query(texts[1]), 1))
    """)
    assert out == ["12", "True"]
