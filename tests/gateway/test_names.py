"""Names of backends, while the servers of names are slow, silent or of another mind."""

import asyncio
import socket
import threading
from typing import Any

import pytest

from tokenmill.engine.gateway.names import Names

FAST = 16


class Resolver:
    """Answers at once, but for names below `silent.example`, which wait until they are released."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.released = threading.Event()

    def __call__(self, host: str, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(host)
        if host.endswith("silent.example"):
            self.released.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{len(self.asked)}", 0))] * 2


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    made = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    return made


def test_names_that_nobody_answers_for_hold_up_no_others(resolver: Resolver) -> None:
    async def main() -> None:
        names = Names()
        silent = [asyncio.create_task(names.addresses(f"{number}.silent.example")) for number in range(FAST)]
        # Half of those who wait give up.
        given_up = [asyncio.create_task(names.addresses(f"{number}.silent.example")) for number in range(FAST)]
        await asyncio.sleep(0)
        for number in range(FAST):
            assert len(await names.addresses(f"{number}.example")) == 1
        for task in given_up:
            task.cancel()
        assert not any(task.done() for task in silent)
        resolver.released.set()
        for task in silent:
            with pytest.raises(socket.gaierror):
                await task

    asyncio.run(main())
    # Each was asked for once, however many waited.
    assert sorted(resolver.asked) == sorted(set(resolver.asked))
    assert len(resolver.asked) == 2 * FAST


def test_a_moment_without_threads_is_over_after_it(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        names = Names()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none_left)
            with pytest.raises(OSError, match="can't start new thread"):
                await names.addresses("a.example")
        async with asyncio.timeout(20):
            assert await names.addresses("a.example") == ["192.0.2.1"]

    asyncio.run(main())


def test_nothing_is_remembered(resolver: Resolver) -> None:
    async def main() -> None:
        names = Names()
        assert [await names.addresses("a.example") for _ in range(3)] == [["192.0.2.1"], ["192.0.2.2"], ["192.0.2.3"]]

    asyncio.run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%eth0"])
def test_an_address_is_its_own(resolver: Resolver, host: str) -> None:
    async def main() -> None:
        assert await Names().addresses(host) == [host]

    asyncio.run(main())
    assert not resolver.asked


def test_what_is_no_name_is_an_error() -> None:
    async def main() -> None:
        with pytest.raises((OSError, UnicodeError)):
            await Names().addresses("a" * 300 + ".example")

    asyncio.run(main())


def test_an_answer_that_comes_after_the_loops_end_is_dropped(resolver: Resolver) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(asyncio.create_task, Names().addresses("1.silent.example"))
        await asyncio.sleep(0.01)

    before = threading.active_count()
    asyncio.run(main())
    resolver.released.set()
    for thread in threading.enumerate():
        if thread.daemon and thread is not threading.current_thread():
            thread.join(5)
    assert threading.active_count() <= before
