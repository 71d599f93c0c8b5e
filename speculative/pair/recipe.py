"""What a run trains: shapes, data windows, rates and step counts, all fixed by the command line before it starts."""

from dataclasses import asdict, dataclass, replace

from tokenmill.errors import ConfigurationError
from tokenmill.speculative.pair.model import Shape


@dataclass(frozen=True)
class Recipe:
    """One training run; equal recipes on equal text, device and thread count give bit-equal weights.

    Attributes:
        target: Shape of the model that is served.
        draft: Shape of the model that guesses for it; the same vocabulary.
        steps: Steps of the target, and of the draft before distillation; distillation takes half as many.
        seed: Seeds the initial weights and the order of the data.
        window: Tokens per training sequence.
        batch: Sequences per step.
        matrix_rate: Peak learning rate of Muon.
        other_rate: Peak learning rate of AdamW (embedding, norms).
        weight_decay: Muon's decoupled weight decay.
        momentum: Muon's momentum.
        distillation_rate: Both peak rates are multiplied by this in the distillation stage.
    """

    target: Shape
    draft: Shape
    steps: int
    seed: int = 0
    window: int = 1024
    batch: int = 2
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    distillation_rate: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ConfigurationError(f"steps={self.steps} is below 2; the draft's distillation takes half of them")
        if not 0 <= self.seed < 2**31:
            raise ConfigurationError(f"seed={self.seed} is outside 0..2147483647; choose one inside")
        if self.target.vocabulary != self.draft.vocabulary:
            raise ConfigurationError(
                f"target and draft have {self.target.vocabulary} and {self.draft.vocabulary} token ids; "
                "speculation needs one vocabulary"
            )

    @property
    def distillation_steps(self) -> int:
        """Steps of the draft on the target's distributions."""
        return self.steps // 2

    def as_dict(self) -> dict[str, object]:
        """Plain nested values, for records and for comparing runs."""
        return asdict(self)


#: 3.4M and 0.9M weights: 9 MB in bfloat16 together with the tokenizer, heads of 64 as vLLM's kernels want them.
FULL = Recipe(
    target=Shape(hidden=256, layers=3, heads=4, kv_heads=2, feed_forward=768, vocabulary=4096),
    draft=Shape(hidden=128, layers=2, heads=2, kv_heads=1, feed_forward=384, vocabulary=4096),
    steps=1200,
)
#: Seconds instead of minutes: shows that every stage works, and teaches next to nothing.
MINIATURE = replace(
    FULL,
    target=Shape(hidden=64, layers=2, heads=2, kv_heads=1, feed_forward=128, vocabulary=512, head_dim=32),
    draft=Shape(hidden=32, layers=1, heads=1, kv_heads=1, feed_forward=64, vocabulary=512, head_dim=32),
    steps=30,
    window=128,
)
SIZES = {"full": FULL, "miniature": MINIATURE}
