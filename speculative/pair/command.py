"""`tokenmill train-pair`: trains a draft/target pair from nothing but the running Python, or measures one."""

import argparse
import platform as python_platform
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from tokenmill import platform
from tokenmill.errors import ConfigurationError
from tokenmill.speculative.pair import card, checkpoint, evaluate
from tokenmill.speculative.pair.corpus import Corpus, read_library
from tokenmill.speculative.pair.progress import Reporter
from tokenmill.speculative.pair.recipe import SIZES, Recipe
from tokenmill.speculative.pair.state import FOLDER, RunState, write_atomically
from tokenmill.speculative.pair.training import Machine, train_pair


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenmill train-pair",
        description="Train a tiny target model and a draft model for it from the running Python's standard library, "
        "and measure both on held-out files. Needs no download. The result loads in vLLM and transformers.",
    )
    parser.add_argument("--out", type=Path, default=Path("tiny-pair"), help="output folder (default: %(default)s)")
    parser.add_argument("--library", type=Path, help="folder of Python files to learn from and to measure on "
                        "(default: the standard library of this Python)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data order (default: %(default)s)")
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="full: 3.4M and 0.9M weights, minutes; "
                        "miniature: a run of seconds that shows every stage (default: %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="steps of the target, and of the draft before its distillation, "
                        "which takes half as many (default: 1200 for size full)")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in the output folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default="auto",
                        help="of matrix products; auto: bfloat16 on a GPU or a CPU that has it")  # fmt: skip
    parser.add_argument("--threads", type=int, default=platform.physical_cores(),
                        help="CPU threads (default: %(default)s)")  # fmt: skip
    parser.add_argument("--checkpoint-seconds", type=float, default=30.0,
                        help="time between two saved states (default: %(default)s)")  # fmt: skip
    parser.add_argument("--measure", type=Path, metavar="PAIR", help="train nothing; measure the pair in this folder")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    console = Console(file=sys.stdout)
    if arguments.measure is not None:
        figures = _measure(arguments.measure, read_library(arguments.library))
        console.print(figures.as_text(), highlight=False, markup=False)
        return 0
    size = SIZES[arguments.size]
    recipe = replace(size, seed=arguments.seed, steps=size.steps if arguments.steps is None else arguments.steps)
    machine = _machine(arguments.device, arguments.precision, arguments.threads)
    if arguments.checkpoint_seconds < 0:
        raise ConfigurationError(f"--checkpoint-seconds={arguments.checkpoint_seconds} is negative; use 0 or more")
    with Reporter(console) as reporter:
        _run(arguments, recipe, machine, reporter)
    return 0


def _machine(device: str, precision: str, threads: int) -> Machine:
    """Resolves `auto`, and refuses what this machine has not."""
    if threads < 1:
        raise ConfigurationError(f"--threads={threads} is below 1; use 1 to {platform.physical_cores()}")
    found = platform.gpus()
    if device == "auto":
        device = "cuda" if found else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device={device!r} is not known; use auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= len(found):
        raise ConfigurationError(f"--device={device}: torch sees {len(found)} GPUs here; use --device cpu")
    if precision == "auto":
        fast = chosen.type == "cuda" or "avx512_bf16" in platform.isa_levels()
        precision = "bfloat16" if fast else "float32"
    return Machine(chosen, getattr(torch, precision), threads)


def _run(arguments: argparse.Namespace, recipe: Recipe, machine: Machine, reporter: Reporter) -> None:
    """Trains, writes and measures the pair; the model card, written last, marks it as finished."""
    out: Path = arguments.out
    if (out / card.FILE).exists():
        raise ConfigurationError(f"{out} already holds a finished pair; choose another --out or remove that folder")
    started = time.monotonic()
    reporter.say(
        f"train-pair: seed {recipe.seed}, {machine.device}, "
        f"{machine.as_dict()['precision']}, {machine.threads} threads, into {out}"
    )
    corpus = read_library(arguments.library)
    state = RunState(out / FOLDER, {**recipe.as_dict(), **machine.as_dict(), "text": corpus.digest})
    try:
        state.begin(resume=arguments.resume)
    except OSError as error:
        raise ConfigurationError(f"--out={out} cannot be written: {error.strerror}; choose another folder") from None
    trained = train_pair(recipe, corpus, machine, state, reporter, arguments.checkpoint_seconds)
    checkpoint.save(out / "target", trained.target, trained.tokenizer, recipe.window)
    checkpoint.save(out / "draft", trained.draft, trained.tokenizer, recipe.window)
    reporter.say("measuring on held-out text")
    figures = _measure(out, corpus)
    reporter.say(figures.as_text())
    library = arguments.library or f"standard library of Python {python_platform.python_version()}"
    origin = {
        "command": _command_line(arguments, recipe, machine),
        "steps of target, draft, distillation": f"{recipe.steps}, {recipe.steps}, {recipe.distillation_steps}",
        "passes over the text": f"{trained.passes:.2f}",
        "text": f"{library}, digest {corpus.digest}",
        "torch": torch.__version__,
    }
    sample = evaluate.continue_text(trained.target, trained.tokenizer, card.PROMPT, tokens=60)
    text = card.render(recipe, figures, origin, sample)
    write_atomically(out / card.FILE, lambda path: path.write_text(text, encoding="utf-8"))
    shutil.rmtree(state.folder)
    reporter.say(f"done: {out} in {(time.monotonic() - started) / 60:.1f} minutes; try: vllm serve {out}/target")


def _command_line(arguments: argparse.Namespace, recipe: Recipe, machine: Machine) -> str:
    """The command that repeats the run, every default spelled out; the output folder changes nothing."""
    words = ["tokenmill train-pair", f"--size {arguments.size} --seed {recipe.seed} --steps {recipe.steps}"]
    if arguments.library:
        words.append(f"--library {arguments.library}")
    where = machine.as_dict()
    words.append(f"--device {where['device']} --precision {where['precision']} --threads {where['threads']}")
    return " ".join(words)


def _measure(pair: Path, corpus: Corpus) -> evaluate.Figures:
    """Figures of a pair on disk, as it will be served: rounded to bfloat16."""
    target, draft = checkpoint.load(pair / "target"), checkpoint.load(pair / "draft")
    return evaluate.measure(target.model, draft.model, target.tokenizer, corpus, target.window)
