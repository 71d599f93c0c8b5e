"""Requests worth serving: questions, code to be continued, and many requests behind one long beginning.

The text is Python's own library, cut to a number of tokens. Every round has its own prompts, so that nothing is in
the prefix cache but what the requests of a round share.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from tokenmill.errors import ConfigurationError
from tokenmill.speculative.pair.corpus import chat_pairs, part_of, source_files


@dataclass(frozen=True)
class Workload:
    """One kind of request.

    Attributes:
        name: In the rows.
        shared: Tokens that all prompts of a round begin with.
        own: Tokens of each prompt after them.
        output: Tokens to generate; exactly so many, end-of-text is ignored.
        chat: Prompts are of questions and answers instead of source code.
    """

    name: str
    shared: int
    own: int
    output: int
    chat: bool = False

    @property
    def length(self) -> int:
        """Tokens of a whole request; the text between tokens may retokenise to slightly more."""
        return self.shared + self.own + self.output

    def scaled(self, share: float) -> "Workload":
        """The same with lengths multiplied, at least one token each."""
        return replace(
            self,
            shared=round(self.shared * share),
            own=max(1, round(self.own * share)),
            output=max(2, round(self.output * share)),
        )


WORKLOADS = {
    one.name: one
    for one in (
        Workload("chat", 0, 512, 256, chat=True),
        Workload("code", 0, 2048, 256),
        Workload("shared-prefix", 4096, 128, 128),
    )
}


def chosen(names: str, share: float) -> tuple[Workload, ...]:
    """Workloads from `chat,code`, with their lengths multiplied by `share`.

    Raises:
        ConfigurationError: A name is unknown or the share is not positive.
    """
    if not share > 0:
        raise ConfigurationError(f"--scale {share} is not positive; 1 is the full length")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = sorted(set(wanted) - set(WORKLOADS))
    if unknown or not wanted:
        raise ConfigurationError(f"--workloads {names}: give some of {', '.join(WORKLOADS)}")
    return tuple(WORKLOADS[name].scaled(share) for name in wanted)


@cache
def _texts(chat: bool) -> tuple[str, ...]:
    """The held-out files of the library: their source, or questions about them with the answers."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for path in source_files(root):
        name = path.relative_to(root).as_posix()
        if part_of(name) == "held_out":
            source = path.read_text(encoding="utf-8", errors="replace")
            found.append("".join(chat_pairs(ast.parse(source), source, name)) if chat else source)
    texts = tuple(filter(None, found))
    if not texts:
        raise ConfigurationError(f"{root} holds no Python sources to make prompts of; install them with the library")
    return texts


def write_prompts(path: Path, workload: Workload, count: int, seed: int, tokenizer: Path) -> None:
    """Writes `count` prompts as JSON lines for vLLM's client, the same for the same seed.

    Args:
        path: The file.
        workload: Their lengths.
        count: Prompts.
        seed: Of the round.
        tokenizer: A checkpoint's folder.
    """
    rng = random.Random(f"{workload.name} {seed}")
    codec = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    beginning = _piece(codec, _texts(workload.chat), workload.shared, rng)
    lines = [
        {
            "prompt": beginning + _piece(codec, _texts(workload.chat), workload.own, rng),
            "output_tokens": workload.output,
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _piece(codec: Tokenizer, texts: Sequence[str], tokens: int, rng: random.Random) -> str:
    """That many tokens from a random place; texts follow each other where one is too short."""
    ids: list[int] = []
    while len(ids) < tokens:
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        ids += codec.encode(text[start : start + 16 * tokens], add_special_tokens=False).ids
    return str(codec.decode(ids[:tokens], skip_special_tokens=False))
