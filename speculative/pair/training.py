"""The run: tokenizer, target, draft, draft distilled from the target; any of them goes on where a kill left it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tokenizers
import torch
from torch import Tensor

from tokenmill.speculative.pair import tokenizer as pair_tokenizer
from tokenmill.speculative.pair.corpus import Corpus
from tokenmill.speculative.pair.data import Batches, encode
from tokenmill.speculative.pair.loss import distillation_loss, next_token_loss
from tokenmill.speculative.pair.model import Llama, Shape
from tokenmill.speculative.pair.optimizer import Muon
from tokenmill.speculative.pair.progress import Reporter
from tokenmill.speculative.pair.recipe import Recipe
from tokenmill.speculative.pair.state import RunState, write_atomically

#: (hidden states of the model in training, input ids [batch, window], labels [batch, window]) to the loss.
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Gradients longer than this are shortened to it.
_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Machine:
    """Where and in what precision to compute.

    Attributes:
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: Of the matrix products; weights and optimizer state are float32 always.
        threads: CPU threads; the sums of a product depend on their number.
    """

    device: torch.device
    dtype: torch.dtype
    threads: int

    def as_dict(self) -> dict[str, object]:
        """Plain values, for the fingerprint of a run."""
        return {
            "device": self.device.type,
            "precision": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
        }

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """Inside, torch uses this thread count and only algorithms that give the same bits every time."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict)
            torch.set_num_threads(threads)

    def hidden_states(self, model: Llama, ids: Tensor) -> Tensor:
        """The model's last hidden states in this machine's precision."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return model.hidden_states(ids)


@dataclass(frozen=True)
class Trained:
    """The outcome of a run: both models in float32 on the CPU, their tokenizer, and passes over the text."""

    target: Llama
    draft: Llama
    tokenizer: tokenizers.Tokenizer
    passes: float


def train_pair(
    recipe: Recipe, corpus: Corpus, machine: Machine, state: RunState, reporter: Reporter, checkpoint_seconds: float
) -> Trained:
    """Trains tokenizer, target and draft, or what is left of them.

    Args:
        recipe: Shapes and steps.
        corpus: The text; only its `train` part is read.
        machine: Device, precision and threads.
        state: The run on disk, begun.
        reporter: Where progress is shown.
        checkpoint_seconds: Time between two saved states.
    """
    with machine.deterministic():
        tokenizer = _tokenizer(recipe, corpus, state, reporter)
        stream = encode(corpus.part("train"), tokenizer)
        batches = Batches(stream, recipe.window, recipe.batch, recipe.seed)
        reporter.say(f"text: {len(stream)} tokens; {recipe.steps} steps are {batches.passes(recipe.steps):.2f} passes")
        stages = _Stages(recipe, machine, state, reporter, batches, checkpoint_seconds)

        target = stages.model(recipe.target)
        stages.run("target", target, recipe.steps, 1.0, _plain(target, machine))
        target.requires_grad_(False)

        draft = stages.model(recipe.draft)
        stages.run("draft", draft, recipe.steps, 1.0, _plain(draft, machine))
        stages.run(
            "distilled", draft, recipe.distillation_steps, recipe.distillation_rate, _distilled(draft, target, machine)
        )
    return Trained(target.cpu(), draft.cpu(), tokenizer, batches.passes(recipe.steps))


def _tokenizer(recipe: Recipe, corpus: Corpus, state: RunState, reporter: Reporter) -> tokenizers.Tokenizer:
    path = state.folder / "tokenizer.json"
    if path.exists():
        return tokenizers.Tokenizer.from_file(str(path))
    vocabulary = recipe.target.vocabulary
    reporter.say(f"tokenizer: learning {vocabulary} tokens from {corpus.size('train') / 1e6:.1f} MB")
    tokenizer = pair_tokenizer.train((document.text for document in corpus.part("train")), vocabulary)
    write_atomically(path, lambda partial: tokenizer.save(str(partial)))
    return tokenizer


def _plain(model: Llama, machine: Machine) -> Objective:
    def objective(hidden: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        return next_token_loss(hidden, model.output_weight, labels, machine.dtype)

    return objective


def _distilled(model: Llama, teacher: Llama, machine: Machine) -> Objective:
    def objective(hidden: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = machine.hidden_states(teacher, ids)
        return distillation_loss(hidden, model.output_weight, wanted, teacher.output_weight, machine.dtype)

    return objective


@dataclass(frozen=True)
class _Stages:
    """What all stages of a run share."""

    recipe: Recipe
    machine: Machine
    state: RunState
    reporter: Reporter
    batches: Batches
    checkpoint_seconds: float

    def model(self, shape: Shape) -> Llama:
        return Llama(shape, self.recipe.seed).to(self.machine.device)

    def run(self, name: str, model: Llama, steps: int, rate: float, objective: Objective) -> None:
        """Trains the model in place, unless the stage is finished already: then loads its weights."""
        finished = self.state.result(name)
        if finished is not None:
            model.load_state_dict(finished)
            return
        optimizers = self._optimizers(model, rate)
        peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        begun = self.state.progress(name)
        first = 0
        if begun is not None:
            first = begun["step"]
            model.load_state_dict(begun["model"])
            for optimizer, saved in zip(optimizers, begun["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.reporter.begin(name, steps, first)
        started = saved_at = time.monotonic()
        for step in range(first, steps):
            _set_rates(optimizers, peaks, 1 - step / steps)
            sequences = self.batches.at(step).to(self.machine.device)
            ids, labels = sequences[:, :-1], sequences[:, 1:]
            loss = objective(self.machine.hidden_states(model, ids), ids, labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            now = time.monotonic()
            if now - saved_at >= self.checkpoint_seconds:
                saved_at = now
                parts = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
                self.state.save_progress(name, step + 1, parts)
            speed = (step + 1 - first) * ids.numel() / (now - started)
            self.reporter.update(step + 1, f"loss {loss.item():.3f}  {speed:,.0f} tokens/s")
        self.state.save_result(name, model.state_dict())

    def _optimizers(self, model: Llama, rate: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        recipe = self.recipe
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in inside]
        muon = Muon(matrices, recipe.matrix_rate * rate, recipe.momentum, recipe.weight_decay, self.machine.dtype)
        adam = torch.optim.AdamW(others, lr=recipe.other_rate * rate, betas=(0.9, 0.95), weight_decay=0.0)
        return muon, adam


def _set_rates(optimizers: tuple[torch.optim.Optimizer, ...], peaks: list[float], left: float) -> None:
    """Linear decay: the peak rate times the share of the steps that is left."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, peak in zip(groups, peaks, strict=True):
        group["lr"] = peak * left
