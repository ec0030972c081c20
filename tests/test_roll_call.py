"""Who is there: threads in place of hosts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import threading
import time

import pytest

from tests.several import free_port
from tgeo_jax import roll_call
from tgeo_jax.errors import ConfigError


def _hold(count, processes, timeout=10.0, before=lambda port: None):
    """What the roll call says to each of some processes: None, or the error's text."""
    port = free_port()

    def one(process):
        try:
            return roll_call.hold(f"127.0.0.1:{port}", count, process, timeout)
        except ConfigError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        said = [pool.submit(one, processes[0])]
        before(port)  # while process 0 waits: once the others are there it listens no more
        said += [pool.submit(one, process) for process in processes[1:]]
        return [one.result() for one in said]


def _connect(port):
    for _ in range(500):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            time.sleep(0.02)
    raise AssertionError("process 0 never listened")


def test_all_go_on_when_all_are_there():
    assert _hold(4, [0, 1, 2, 3]) == [None] * 4


def test_everybody_who_came_is_told_who_did_not():
    said = _hold(4, [0, 2], timeout=1.0)
    for one in said:
        assert "--num_processes=4: not all were there within 1 s: process 1 and 3 did not" in one


def test_two_with_one_number_are_told():
    found = _hold(3, [0, 1, 1], timeout=2.0)
    assert "--process_id=1: two processes say that they are this one" in found[0]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_one_that_was_started_again_replaces_the_first(order):
    def crash(port):
        connection = _connect(port)
        connection.sendall(b"1\n")
        time.sleep(0.2)  # until it has been heard
        connection.close()

    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(roll_call.hold, f"127.0.0.1:{port}", 3, 0, 10.0)
        crash(port)
        others = []
        for index in order:
            others.append(pool.submit(roll_call.hold, f"127.0.0.1:{port}", 3, index, 10.0))
            time.sleep(0.2)
        assert [one.result() for one in (first, *others)] == [None] * 3


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n", b""])
def test_strangers_do_not_count(said, monkeypatch):
    monkeypatch.setattr(roll_call, "_SAYING", 0.3)
    kept = []

    def visit(port):
        kept.append(_connect(port))
        kept[0].sendall(said)

    assert _hold(2, [0, 1], before=visit) == [None, None]
    kept[0].close()


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"process 0 cannot listen on port .*choose another"):
            roll_call.hold(address, 2, 0, 1.0)


def test_another_program_on_the_port_is_told():
    def answer(server):
        with contextlib.suppress(OSError):  # closed by the test
            while True:
                with server.accept()[0] as connection:
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.0 400 Bad request\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"another program answers there \('HTTP/1.0 400"):
            roll_call.hold(address, 2, 1, 0.5)
        server.shutdown(socket.SHUT_RDWR)


def test_a_process_0_that_is_not_there_is_told():
    (said,) = _hold(2, [1], timeout=0.5)
    assert "process 1 of 2 found no process 0 there within 0.5 s" in said
