"""`tokenmill train-pair` from end to end in miniature: a finished pair, the same pair again, kills, bad input."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenmill.cli import main
from tokenmill.speculative.pair import checkpoint
from tokenmill.speculative.pair.chat import render
from tokenmill.speculative.pair.corpus import read_library
from tokenmill.speculative.pair.evaluate import measure

WEIGHTS = ("target/model.safetensors", "draft/model.safetensors", "target/tokenizer.json")


def assert_same_pair(one: Path, other: Path) -> None:
    for name in WEIGHTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_leaves_a_pair_and_its_card(pair: Path) -> None:
    for model in ("target", "draft"):
        assert sorted(path.name for path in (pair / model).iterdir()) == [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        assert all(value.dtype == torch.bfloat16 for value in load_file(pair / model / "model.safetensors").values())
    assert sorted(path.name for path in pair.iterdir()) == ["MODEL_CARD.md", "draft", "target"]


def test_the_card_states_what_is_measured(pair: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, draft = checkpoint.load(pair / "target"), checkpoint.load(pair / "draft")
    figures = measure(target.model, draft.model, target.tokenizer, read_library(library), target.window)
    card = (pair / "MODEL_CARD.md").read_text()
    assert f"source | {figures.target_bits['source']:.3f} | {figures.draft_bits['source']:.3f} |" in card
    assert f"| 1 | {figures.acceptance[0]:.3f} |" in card
    assert "--size miniature --seed 0 --steps 40" in card
    assert main(["train-pair", "--measure", str(pair), "--library", str(library)]) == 0
    assert figures.as_text() in capsys.readouterr().out


def test_training_taught_something(pair: Path, library: Path) -> None:
    """An untrained model gives every token the same chance; 40 steps learn how common each is."""
    target = checkpoint.load(pair / "target")
    held_out = [d for d in read_library(library).part("held_out") if not d.is_chat]
    tokens = sum(len(target.tokenizer.encode(document.text).ids) for document in held_out)
    untrained = tokens * 9 / sum(len(document.text.encode()) for document in held_out)  # log2(512) bits a token
    card = (pair / "MODEL_CARD.md").read_text()
    trained = float(card.split("held-out source | ")[1].split()[0])
    assert trained < 0.9 * untrained


@torch.no_grad()
def test_checkpoints_load_in_transformers_with_equal_logits(pair: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("target", "draft"):
        ours = checkpoint.load(pair / name)
        theirs = AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(pair / name)
        text = "def read(path):\n    with open(path) as file:\n"
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0].tolist() == ours.tokenizer.encode(text).ids
        wanted = theirs(ids).logits
        torch.testing.assert_close(ours.model(ids), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert theirs.generation_config.eos_token_id == [4, 0]


def test_the_template_renders_what_the_corpus_holds(pair: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    turns = [("system", "Be brief."), ("user", "What?"), ("assistant", "That.\n"), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render(turns)
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == render(turns) + "<|assistant|>\n"


@pytest.mark.slow
def test_the_seed_decides_the_pair(pair: Path, arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "--out", str(tmp_path / "same")]) == 0
    assert_same_pair(pair, tmp_path / "same")
    assert main([*arguments, "--seed", "1", "--out", str(tmp_path / "other")]) == 0
    for name in WEIGHTS[:2]:
        assert (pair / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_a_killed_run_goes_on_to_the_same_weights(pair: Path, arguments: list[str], tmp_path: Path) -> None:
    """Killed without warning in the target's stage and again in the draft's, then left to finish."""
    out = tmp_path / "pair"
    command = [sys.executable, "-m", "tokenmill", *arguments, "--out", str(out), "--checkpoint-seconds", "0"]
    for number, awaited in enumerate(("progress.pt", "target.pt")):
        with (tmp_path / "log").open("wb") as log:
            run = subprocess.Popen([*command, "--resume"][: len(command) + number], stdout=log, stderr=log)
        while not (out / "training" / awaited).exists():
            assert run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert (out / "training" / "progress.pt").exists()
    assert not (out / "training" / "distilled.pt").exists()
    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    assert_same_pair(pair, out)
    assert not (out / "training").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "1"], "steps=1 is below 2"),
        (["--seed", "-1"], "seed=-1 is outside 0..2147483647"),
        (["--threads", "0"], "--threads=0 is below 1"),
        (["--device", "abacus"], "--device='abacus' is not known; use auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device=cuda:99: torch sees"),
        (["--checkpoint-seconds", "-2"], "--checkpoint-seconds=-2.0 is negative"),
        (["--out", "/dev/null/pair"], "/dev/null/pair cannot be written: Not a directory"),
        (["--resume"], "holds no unfinished run; leave out --resume"),
        (["--library", "/nowhere"], "/nowhere holds 0 bytes of Python source"),
        (["--measure", "/nowhere"], "/nowhere/target holds no checkpoint of a pair"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], extra: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "pair"), *extra]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_finished_pair_is_not_overwritten(
    pair: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (pair / "target" / "model.safetensors").read_bytes()
    assert main([*arguments, "--out", str(pair)]) == 2
    assert "already holds a finished pair" in capsys.readouterr().err
    assert (pair / "target" / "model.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_is_named(
    pair: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "target").mkdir(exist_ok=True)
        for path in (pair / "target").iterdir():
            data = path.read_bytes()
            (tmp_path / "target" / path.name).write_bytes(data[: len(data) // 2] if path.name == name else data)
        assert main(["train-pair", "--measure", str(tmp_path), "--library", str(library)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "holds no checkpoint of a pair" in error
