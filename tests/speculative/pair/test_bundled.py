"""The pair that ships with the package: small, complete, trained, and loadable by our code and by transformers."""

from pathlib import Path

import pytest
import torch

from tokenmill.models import tiny_pair
from tokenmill.speculative.pair import checkpoint
from tokenmill.speculative.pair.corpus import Document, calibration_text
from tokenmill.speculative.pair.evaluate import bits_per_byte
from tokenmill.speculative.pair.recipe import FULL


def test_it_is_small_and_has_its_card() -> None:
    target, draft = tiny_pair()
    assert target.parent == draft.parent
    files = [path for path in target.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000
    assert (target.parent / "MODEL_CARD.md").read_text().startswith("# A tiny draft/target pair")
    assert (target / "tokenizer.json").read_bytes() == (draft / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("which", [0, 1], ids=["target", "draft"])
def test_it_is_trained(which: int) -> None:
    """An untrained model of this vocabulary pays 3 bits a byte; the limit leaves room for other Pythons."""
    model = checkpoint.load(tiny_pair()[which])
    assert model.model.shape == (FULL.target, FULL.draft)[which]
    text = calibration_text("held_out", 30_000)
    assert bits_per_byte(model.model, model.tokenizer, [Document("x", text, "held_out")], 512) < 2.2


@torch.no_grad()
def test_transformers_reads_it_alike() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in tiny_pair():
        assert_same_logits(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer("def f():\n    pass").input_ids) == "def f():\n    pass"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert chat == "<|user|>\nHi<|end|>\n"
        assert tokenizer.decode(tokenizer(chat).input_ids, skip_special_tokens=True) == "\nHi\n"


def assert_same_logits(folder: Path, theirs: torch.nn.Module) -> None:
    """Within what two orders of summation in float32 differ by."""
    ids = torch.arange(40).remainder(37)[None] + 100
    wanted = theirs(ids).logits
    torch.testing.assert_close(
        checkpoint.load(folder).model(ids), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
    )
