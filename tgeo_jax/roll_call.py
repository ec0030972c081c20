"""Who is there, before JAX connects the processes: it would end without saying who is missing.

Process 0 listens where its coordination service will be; the others come and say their number. When
all have come, or the time is over, process 0 tells everybody who is missing.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time

from tgeo_jax.errors import ConfigError

_PAUSE = 0.2  # seconds between two attempts to reach process 0
_SAYING = 5.0  # seconds that one which has connected may take to say its number
_VERDICT = re.compile(r"all|missing \d+( and \d+)*|twice \d+")


def hold(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns when all processes of a run are there.

    Args:
        coordinator: host:port of process 0.
        num_processes: of the run.
        process_id: of this one.
        timeout: seconds to wait.

    Raises:
        ConfigError: some are missing, process 0 cannot be reached or cannot listen there, or two
            processes have one number.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if process_id == 0:
        said = _listen(coordinator, int(port), num_processes, deadline)
    else:
        said = _come(host.strip("[]"), int(port), process_id, timeout)
    if said == "all":
        return
    if said and not _VERDICT.fullmatch(said):
        raise ConfigError(
            f"--coordinator={coordinator}: another program answers there ({said[:60]!r}) and not "
            f"process 0 of this run, for {timeout:g} s; choose another port"
        )
    if not said:
        raise ConfigError(
            f"--coordinator={coordinator}: process {process_id} of {num_processes} found no "
            f"process 0 there within {timeout:g} s; is it running, and can its port be reached? "
            "(--start_timeout)"
        )
    kind, _, numbers = said.partition(" ")
    if kind == "twice":
        raise ConfigError(f"--process_id={numbers}: two processes say that they are this one")
    raise ConfigError(
        f"--num_processes={num_processes}: not all were there within {timeout:g} s: process "
        f"{numbers} did not come; start every process with its own --process_id, or wait longer by "
        "--start_timeout"
    )


def _listen(coordinator: str, port: int, num_processes: int, deadline: float) -> str:
    missing, said = set(range(1, num_processes)), "all"
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(
                socket.create_server(("", port), family=family, dualstack_ipv6=both)
            )
        except OSError as error:
            raise ConfigError(
                f"--coordinator={coordinator}: process 0 cannot listen on port {port} ({error}); "
                "choose another one"
            ) from error
        came: dict[int, socket.socket] = {}
        while missing and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                break
            connection.settimeout(_SAYING)
            line = _line(connection)
            if not line.isdigit():  # a health check, a port scanner
                continue
            number = int(line)
            # One that was started again may come twice, if the first is gone.
            if number not in missing and not (number in came and _is_gone(came[number])):
                came[-1], said = connection, f"twice {number}"
                break
            came[number] = connection
            missing.discard(number)
            if not missing:  # all have come; some may have gone again
                missing = {number for number, one in came.items() if _is_gone(one)}
        if missing and said == "all":
            said = f"missing {' and '.join(map(str, sorted(missing)))}"
        for connection in came.values():
            with contextlib.suppress(OSError):  # it has given up by itself
                connection.sendall(f"{said}\n".encode())
                connection.recv(1)  # until it has closed: the port is free at once
    return said


def _come(host: str, port: int, process_id: int, timeout: float) -> str:
    """What process 0 says; else what another program said there last, or nothing."""
    deadline, other = time.monotonic() + timeout, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(f"{process_id}\n".encode())
                # Process 0 may have come later than this one, and waits as long from there on.
                connection.settimeout(timeout + _SAYING)
                said = _line(connection)
            if _VERDICT.fullmatch(said):
                return said
            other = said or other  # a proxy, perhaps, before process 0 is there
        except OSError:
            pass
        time.sleep(_PAUSE)
    return other


def _is_gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:  # it is there, and waits
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_SAYING)


def _line(connection: socket.socket) -> str:
    """One line of ASCII; nothing if the other end says something else or nothing."""
    found = b""
    with contextlib.suppress(OSError):
        while not found.endswith(b"\n") and len(found) < 10_000:
            more = connection.recv(256)
            if not more:
                return ""
            found += more
    return found.decode("ascii", "replace").strip()
