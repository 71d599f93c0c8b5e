"""Registers public ops with torch, so that `torch.compile` and export see one opaque call with known shapes.

`torch.ops.tokenmill.<name>` always exists, also without the native library: the Python function behind it chooses
the implementation. Native code lives under `torch.ops.tokenmill_native` (see `extension`), is called by the
implementations only, and writes into buffers that they allocate.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY: Any = torch.library.Library("tokenmill", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines `torch.ops.tokenmill.<name>`.

    Args:
        schema: `name(Tensor x, int n) -> Tensor`, in torch's schema language.
        function: The public function; takes the schema's arguments.
        fake: Takes the same arguments as meta tensors and returns empty tensors of the right shape and dtype.
    """
    name = schema.partition("(")[0].strip()
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tokenmill::{name}", fake, lib=_LIBRARY)
