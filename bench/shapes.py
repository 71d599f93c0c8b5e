"""Linear layers that are worth measuring, as (K, N): input and output features."""

import re

from tokenmill.errors import ConfigurationError

Shape = tuple[int, int]

#: Fused projections as vLLM runs them (Llama 3, Dubey et al., 2024), and sizes that are no multiple of anything.
NAMED: dict[str, tuple[Shape, ...]] = {
    "square": ((4096, 4096),),
    "wide": ((4096, 14336),),
    "llama-3-8b": ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
    "llama-3-70b": ((8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)),
    "odd": ((10944, 2048), (1536, 8960), (192, 576)),
}


def parse(text: str) -> tuple[Shape, ...]:
    """Shapes from `K x N` pairs and names, separated by commas: `4096x4096,wide`.

    Raises:
        ConfigurationError: A part is neither.
    """
    shapes: list[Shape] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        pair = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if pair:
            shapes.append((int(pair[1]), int(pair[2])))
        elif part in NAMED:
            shapes.extend(NAMED[part])
        else:
            raise ConfigurationError(f"--shapes {part}: give KxN such as 4096x14336, or one of {', '.join(NAMED)}")
    if not shapes:
        raise ConfigurationError(f"--shapes names none; give KxN such as 4096x14336, or one of {', '.join(NAMED)}")
    return tuple(dict.fromkeys(shapes))


def parse_rows(text: str, flag: str = "--m") -> tuple[int, ...]:
    """Positive integers from `1,4,16`; `flag` is named in the error.

    Raises:
        ConfigurationError: A part is no positive integer.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise ConfigurationError(f"{flag} {text}: give positive integers separated by commas, such as 1,4,16")
    return tuple(dict.fromkeys(int(part) for part in parts))
