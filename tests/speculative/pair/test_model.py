"""The Llama in plain torch against the one in transformers, and its loss and optimizer against their definitions."""

import pytest
import torch
from torch.nn import functional

from tokenmill.errors import ConfigurationError
from tokenmill.speculative.pair.loss import distillation_loss, next_token_loss
from tokenmill.speculative.pair.model import Llama, Shape, parameter_count
from tokenmill.speculative.pair.optimizer import Muon, orthogonalise
from tokenmill.speculative.pair.recipe import FULL

SHAPE = Shape(hidden=48, layers=2, heads=4, kv_heads=2, feed_forward=80, vocabulary=97, head_dim=16)


def filled(shape: Shape, seed: int) -> Llama:
    """A model without the zeros that training starts from."""
    model = Llama(shape, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.2, generator=generator)
    return model


@torch.no_grad()
def test_logits_equal_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = filled(SHAPE, 1)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE.as_config()))  # type: ignore[arg-type]
    theirs.load_state_dict({**ours.state_dict(), "lm_head.weight": ours.output_weight})
    ids = torch.randint(97, (3, 50), generator=torch.Generator().manual_seed(2))
    wanted = theirs(ids).logits
    torch.testing.assert_close(ours(ids), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_sizes_are_the_documented_ones() -> None:
    assert parameter_count(Llama(FULL.target, 0)) == 3_409_664
    assert parameter_count(Llama(FULL.draft, 0)) == 918_144


def test_seed_decides_the_weights() -> None:
    first, second, other = (Llama(SHAPE, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize(("change", "message"), [({"kv_heads": 3}, "heads=4 is not"), ({"head_dim": 15}, "is odd")])
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    fields = {**SHAPE.__dict__, **change}
    with pytest.raises(ConfigurationError, match=message):
        Shape(**fields)


@pytest.mark.parametrize("length", [1, 200, 256, 300])
def test_chunked_loss_and_gradients_equal_autograd_in_double(length: int) -> None:
    """Lengths below, at and beyond the size of a chunk; bounds of float32 sums over 300 rows."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(1, length, 24, generator=generator)
    weight = torch.randn(61, 24, generator=generator)
    labels = torch.randint(61, (1, length), generator=generator)
    teacher_hidden, teacher_weight = (
        torch.randn(1, length, 8, generator=generator),
        torch.randn(61, 8, generator=generator),
    )
    wanted = functional.softmax(teacher_hidden.double() @ teacher_weight.double().T, dim=-1)

    def check(ours: torch.Tensor, plain: torch.Tensor, inputs: list[torch.Tensor], doubles: list[torch.Tensor]) -> None:
        torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-6)
        for got, exact in zip(
            torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * plain, doubles), strict=True
        ):
            torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)

    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = (doubles[0] @ doubles[1].T).flatten(0, 1)
    check(
        next_token_loss(hidden, weight, labels, torch.float32),
        functional.cross_entropy(logits, labels.flatten()),
        inputs,
        doubles,
    )
    logits = (doubles[0] @ doubles[1].T).flatten(0, 1)
    check(
        distillation_loss(hidden, weight, teacher_hidden, teacher_weight, torch.float32),
        functional.cross_entropy(logits, wanted.flatten(0, 1)),
        inputs,
        doubles,
    )


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 16, 48), (1, 48, 16)])
def test_orthogonalise_evens_out_singular_values(shape: tuple[int, ...]) -> None:
    """The iteration's authors give about [0.7, 1.2] for values not tiny beside the largest; and the frame stays."""
    generator = torch.Generator().manual_seed(7)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalise(matrices)
    inner = left.mT @ result @ right.mT
    got = inner.diagonal(dim1=-2, dim2=-1)
    assert (inner - torch.diag_embed(got)).abs().max() < 1e-9
    big = values > 0.1 * values[..., :1]
    assert big.any()
    assert got[big].min() > 0.6
    assert got[big].max() < 1.3
    single = torch.stack([orthogonalise(matrix) for matrix in matrices])
    torch.testing.assert_close(result, single, rtol=1e-9, atol=1e-9)


def test_muon_agrees_with_torch_up_to_bfloat16() -> None:
    """torch.optim.Muon runs the iteration in bfloat16; five quintic steps on an 8-bit mantissa stay within 5%."""
    generator = torch.Generator().manual_seed(8)
    start = [torch.randn(24, 12, generator=generator), torch.randn(24, 12, generator=generator)]
    gradients = [[torch.randn(24, 12, generator=generator) for _ in start] for _ in range(3)]
    ours = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    optimizers = (
        Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1, dtype=torch.float32),
        torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1),
    )
    for step in gradients:
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for mine, other, begin in zip(ours, theirs, start, strict=True):
        assert (mine - other).norm() < 0.05 * (other - begin).norm()
