"""The plug-in that runs inside every vLLM process, and the launcher of a supervised vLLM server.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in the API server,
in the engine core and in every worker. Importing this package costs nothing; everything else is imported by
the call.
"""


def register() -> None:
    """Installs the hooks that `TOKENMILL_HOOKS` names into this process; may be called any number of times.

    Never raises: a hook that cannot be installed leaves vLLM's own behaviour in place, says so once in the log
    and keeps its reason in the status table (`tokenmill.engine.vllm.hooks.statuses`).
    """
    from tokenmill.engine.vllm import hooks, lifetime

    lifetime.follow_parent_process()
    hooks.install()
