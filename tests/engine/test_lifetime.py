"""No process stays behind, shown with real processes that stand in for a server's tree (vLLM's own tree is
killed in tests/end_to_end)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

#: A launcher with one spawned child; both ignore SIGTERM when told so. Prints the child's process id.
TREE = """
import multiprocessing, os, signal, sys, time
from tokenmill.engine.vllm import lifetime
lifetime.GRACE_SECONDS = 0.5

def child(deaf):
    lifetime.follow_parent_process()
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(120)

if __name__ == "__main__":
    deaf = sys.argv[1] == "deaf"
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lifetime.watch_supervisor()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(deaf,))
    process.start()
    process.join()
"""


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie, which an init that reaps late would leave for a while."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float = 20) -> bool:
    """Waits for a process to end."""
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


class Tree:
    """A running tree: the launcher, its child's id and the supervisor's end of the pipe."""

    def __init__(self, folder: Path, manner: str) -> None:
        script = folder / "tree.py"
        script.write_text(TREE, encoding="utf-8")
        read, self.write = os.pipe()
        self.launcher = subprocess.Popen(
            [sys.executable, str(script), manner],
            env=os.environ | {"TOKENMILL_PARENT_FD": str(read)},
            pass_fds=(read,),
            stdout=subprocess.PIPE,
            text=True,
        )
        os.close(read)
        assert self.launcher.stdout is not None
        self.child = int(self.launcher.stdout.readline())

    def close(self) -> None:
        """Ends whatever a failed test left."""
        os.close(self.write)
        for pid in (self.launcher.pid, self.child):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()
        assert self.launcher.stdout is not None
        self.launcher.stdout.close()


@pytest.fixture(params=["polite", "deaf"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tree]:
    running = Tree(tmp_path, request.param)
    yield running
    running.close()


def test_the_pipe_closes(tree: Tree) -> None:
    """As when the supervisor is killed: the kernel closes its end."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), tree.write)
    tree.launcher.wait(timeout=20)
    assert gone(tree.child)


def test_the_launcher_is_killed(tree: Tree) -> None:
    tree.launcher.kill()
    tree.launcher.wait(timeout=20)
    assert gone(tree.child)


def test_the_tree_is_its_own_group(tree: Tree) -> None:
    """Ending the group must not reach the supervisor."""
    assert os.getpgid(tree.child) == os.getpgid(tree.launcher.pid) == tree.launcher.pid
    assert os.getpgid(0) != tree.launcher.pid
