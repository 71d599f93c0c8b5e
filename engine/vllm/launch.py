"""Runs one vLLM OpenAI server under a supervisor: `python -m tokenmill.engine.vllm.launch MODEL [vLLM flags]`.

Every argument goes to `vllm serve` unchanged (tensor, pipeline and data parallel, Ray, several nodes and all
other flags are vLLM's). What is added: defaults for the CPU where neither flag nor environment decides, the
instruction-set limit, the plug-in, and the promise of `lifetime` that no process stays behind. SIGTERM is
vLLM's own: it drains for `--shutdown-timeout` seconds, then ends.

Exit status: 0 after SIGTERM or SIGINT, 2 for bad arguments, 1 for a server that failed; the last line on
standard error says why.
"""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenmill import env, platform
from tokenmill.engine.vllm import compat, compiler, hooks, isa, lifetime, linear_checkpoint
from tokenmill.errors import CheckpointError, TokenmillError
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.format import parse_config
from tokenmill.quant.json_file import read_json

if __name__ == "__mp_main__":  # a process that vLLM spawns imports this module before anything of vLLM
    isa.narrow()
    lifetime.follow_parent_process()

GIB = 1 << 30
#: The KV cache of a CPU server takes this part of the free memory, within these GiB, unless the user decides.
KV_CACHE_PART, KV_CACHE_LEAST, KV_CACHE_MOST = 8, 1, 16


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal or a failure ends it; returns the exit status."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        logging.getLogger("tokenmill").setLevel(env.LOG_LEVEL.get().upper())
        _serve(list(sys.argv[1:] if argv is None else argv))
    except TokenmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # also how vLLM answers SIGTERM while it starts
        return 0
    except Exception as error:
        logging.getLogger("tokenmill.launch").debug("the server failed", exc_info=True)
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _serve(argv: list[str]) -> None:
    isa.narrow()
    lifetime.watch_supervisor()
    hooks.chosen(env.HOOKS.get())  # a wrong name ends here, not in a warning
    if (status := env.STATUS_FILE.get()) is not None:
        status.unlink(missing_ok=True)
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

    subcommand, arguments = parse(argv)
    subcommand.validate(arguments)
    refuse_incomplete(arguments.model_tag or arguments.model)
    on_cpu = compat.on_cpu()
    uncompiled = compiler.asked_for(arguments, on_cpu=on_cpu)
    if on_cpu:
        os.environ.update(cpu_defaults(arguments))
        if (lack := compiler.why_not()) is not None:
            if uncompiled is None:
                uncompiled = lack
                logging.getLogger("tokenmill.launch").warning("the model runs uncompiled: %s", lack)
            compiler.disable()  # also then: vLLM has functions of its own that are compiled whatever the model does
            arguments.enforce_eager = True
    compiler.announce(uncompiled)
    subcommand.cmd(arguments)


def parse(argv: Sequence[str]) -> tuple[Any, Namespace]:
    """vLLM's `serve` subcommand and what it understands of the arguments; exits with its usage if it does not."""
    subcommand = compat.SERVE_SUBCOMMAND.resolve()()
    parser = compat.ARGUMENT_PARSER.resolve()(prog="tokenmill engine")
    subcommand.subparser_init(parser.add_subparsers(dest="subparser"))
    return subcommand, parser.parse_args(["serve", *argv])


def refuse_incomplete(model: str) -> None:
    """Ends the start before anything is loaded where an INT4 checkpoint is not whole, or of other sizes than it says.

    Also where a whole path leads nowhere: vLLM would take it for a model's name on a hub, and say that it is none.
    Reads headers only. What the values say is checked as each layer is packed; formats that are not ours are left to
    vLLM, and so are names of models that are no folders.

    Raises:
        CheckpointError: Which file is cut short, which tensor is missing or has a wrong dtype or shape.
    """
    folder = Path(model)
    if folder.is_absolute() and not folder.exists():
        raise CheckpointError(f"{model} does not exist; name a checkpoint's folder, or a model of a hub")
    if not (folder / "config.json").is_file():
        return
    quantization = read_json(folder / "config.json").get("quantization_config")
    try:
        scheme = parse_config(quantization) if isinstance(quantization, dict) else None
    except CheckpointError:
        return
    if scheme is not None:
        with closing(Checkpoint(folder)) as checkpoint:
            linear_checkpoint.check_files(sorted({info.file for info in checkpoint.tensors.values()}), scheme)


def cpu_defaults(arguments: Namespace) -> dict[str, str]:
    """Environment variables for a CPU server, for what neither the arguments nor the environment decide.

    Args:
        arguments: As parsed by `vllm serve`.

    Returns:
        `VLLM_CPU_KVCACHE_SPACE` in GiB (vLLM would take most of the memory); for a single worker
        `VLLM_ENABLE_V1_MULTIPROCESSING=0`, which saves a process and its start-up; and
        `VLLM_CPU_OMP_THREADS_BIND` to every core we may use (vLLM would give one worker a single core).
    """
    chosen: dict[str, str] = {}
    if getattr(arguments, "kv_cache_memory_bytes", None) is None:
        chosen["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib(platform.available_memory()))
    workers = arguments.tensor_parallel_size * arguments.pipeline_parallel_size * arguments.data_parallel_size
    if workers == 1 and arguments.distributed_executor_backend is None:
        chosen["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return {name: value for name, value in chosen.items() if not os.environ.get(name)}


def kv_cache_gib(free_bytes: int) -> int:
    """The KV cache's size in GiB for this much free memory in bytes."""
    return max(KV_CACHE_LEAST, min(KV_CACHE_MOST, free_bytes // KV_CACHE_PART // GIB))


def one_line(error: BaseException) -> str:
    """The first line of an error that says something, with its remedy where we know one."""
    if isinstance(error, OSError) and error.errno == 98:
        return "the port is in use; stop the other program or pass another --port"
    text = str(error)
    if isinstance(error, ValidationError):  # of one of vLLM's settings; its text begins with how many are wrong
        first = error.errors()[0]
        text = ": ".join((*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
