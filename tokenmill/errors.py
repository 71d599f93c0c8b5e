"""Every error that Tokenmill raises on purpose.

    TokenmillError
    ├── ConfigurationError        a setting, a flag or a configuration file is wrong
    ├── InputError (ValueError)   an argument of a public function is wrong: shape, dtype, device, range
    ├── CheckpointError           a checkpoint on disk is damaged, incomplete or of an unknown format
    ├── UnsupportedError          no implementation can do this problem; carries every refusal
    └── MissingDependencyError (ImportError)   an optional package is absent; carries the pip command

A message states the value that was found, the limit it broke and the remedy, in one line:
``K=4100 is not a multiple of group_size=128; pad K or pass group_size=-1``.
The command line prints it and exits with status 2; a library caller catches `TokenmillError`.
"""

from collections.abc import Mapping


class TokenmillError(Exception):
    """Base of all errors raised on purpose."""


class ConfigurationError(TokenmillError):
    """A setting, a command-line flag or a configuration file is wrong."""


class InputError(TokenmillError, ValueError):
    """An argument of a public function is outside what the function accepts."""


class CheckpointError(TokenmillError):
    """A checkpoint is damaged, incomplete or of an unknown format; nothing of it was loaded."""


class UnsupportedError(TokenmillError):
    """No implementation can do what was asked.

    Args:
        what: The operation and problem, as the user would name them.
        refusals: Implementation name to the reason it refused, in the order they were asked.
    """

    def __init__(self, what: str, refusals: Mapping[str, str]) -> None:
        self.what = what
        self.refusals = dict(refusals)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refusals.items())
        super().__init__(f"{what}: no implementation can do this ({reasons or 'none is registered'})")


class MissingDependencyError(TokenmillError, ImportError):
    """An optional package is not installed.

    Args:
        package: The distribution that is missing.
        extra: The extra of Tokenmill that brings it.
        purpose: What needs it.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {package}, which is not installed; pip install "tokenmill[{extra}]"')
