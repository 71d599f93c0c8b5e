"""The models that come with the package: a small pair for trying everything out, see their model card."""

from pathlib import Path


def tiny_pair() -> tuple[Path, Path]:
    """Folders of the bundled pair, (target, draft): Hugging Face checkpoints that share one tokenizer."""
    here = Path(__file__).resolve().parent / "tiny-pair"
    return here / "target", here / "draft"
