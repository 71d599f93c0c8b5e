"""The model card that a run writes beside the pair: how it was made, what was measured, what it cannot do."""

from collections.abc import Mapping

from tokenmill.speculative.pair.evaluate import Figures
from tokenmill.speculative.pair.model import Shape
from tokenmill.speculative.pair.recipe import Recipe

FILE = "MODEL_CARD.md"
#: What the sample in the card continues.
PROMPT = 'def read_lines(path):\n    """Return the lines'


def render(recipe: Recipe, figures: Figures, origin: Mapping[str, object], sample: str) -> str:
    """The card as Markdown.

    Args:
        recipe: What was trained.
        figures: What was measured on the finished checkpoints.
        origin: Name to value of everything needed to repeat the run.
        sample: The target's greedy continuation of `PROMPT`.
    """
    made = "\n".join(f"- {name}: `{value}`" for name, value in origin.items())
    bits = "\n".join(
        f"| bits per byte, held-out {kind} | {figures.target_bits[kind]:.3f} | {figures.draft_bits[kind]:.3f} |"
        for kind in figures.target_bits
    )
    positions = "\n".join(f"| {place} | {share:.3f} |" for place, share in enumerate(figures.acceptance, start=1))
    return f"""# A tiny draft/target pair

Two Llama models that share a byte-level BPE vocabulary of {recipe.target.vocabulary} tokens. They were trained from
nothing but the source files of a Python standard library (Python Software Foundation License) and from questions and
answers cut out of those files: "What does X do?" (its docstring) and "Write the function X" (its source).

| | target | draft |
|---|---|---|
| layers, hidden width, feed-forward width | {_dimensions(recipe.target)} | {_dimensions(recipe.draft)} |
| query heads, key/value heads, head width | {_heads(recipe.target)} | {_heads(recipe.draft)} |
{bits}

The draft was first trained like the target, then on the target's distributions (distillation).

## What it can do

Continue Python-shaped text, answer in the chat format, and so exercise a whole system on real text: streaming,
batching, chat templates, speculative decoding with a draft model, INT4 quantization. It is small enough to start in
seconds on a CPU.

## What it cannot do

It knows nothing and understands nothing. Its code does not work, its answers are made up, and greedy output soon
repeats itself. It reads English and Python only. It was trained on windows of {recipe.window} tokens; the declared
limit of {2 * recipe.window} loads, with worse text beyond {recipe.window}. Do not judge a quantizer, a router or a
product by the *quality* of its text, and do not expect speculation with it to save time on a CPU: the target is so
small that a pass of the draft costs a large share of a pass of the target.

A greedy sample of the target, as it is:

```
{sample}
```

## Speculation

Share of rounds in which the draft's guess at a position, and every one before it, is the target's greedy token
(the target continuing held-out text, {len(figures.acceptance)} guesses a round):

| position | accepted |
|---|---|
{positions}

Mean tokens per pass of the target: {figures.tokens_per_round:.2f}.

## How it was made

{made}

The same command with the same Python, torch and thread count on the same kind of machine gives the same weights, bit
for bit. Files of the library were held out by a hash of their path; nothing in the table was measured on text that
the models had seen, except what the library itself repeats in several files. `tokenmill train-pair --measure FOLDER`
prints the figures again.
"""


def _dimensions(shape: Shape) -> str:
    return f"{shape.layers}, {shape.hidden}, {shape.feed_forward}"


def _heads(shape: Shape) -> str:
    return f"{shape.heads}, {shape.kv_heads}, {shape.head_dim}"
