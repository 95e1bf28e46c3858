"""AdamW on float32 and bfloat16 weights, moments of 32 and 8 bits, and stochastic rounding."""

import copy
import io
import math
import sys
from importlib.util import find_spec

import pytest
import torch

from prefloop.errors import UserError
from prefloop.training import optim
from prefloop.training.adamw import CHUNK, FEWEST, AdamW, require_bitsandbytes, round_stochastically

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
THERE = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
BITS = [32, pytest.param(8, marks=THERE)]
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_weights(dtype=torch.float32):
    """A matrix whose moments may be kept in 8 bits, and a vector."""
    return [
        torch.nn.Parameter(drawn(64, 80).to(dtype)),
        torch.nn.Parameter(drawn(33, seed=1)),
    ]


def groups_of(parameters):
    return [
        {"params": parameters[:1], "weight_decay": 0.1},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]


def steps(optimizer, parameters, numbers):
    for number in numbers:
        for place, p in enumerate(parameters):
            p.grad = drawn(*p.shape, seed=100 * number + place, scale=0.1).to(p.dtype)
        optimizer.step()


def rounder(seed=0):
    return torch.Generator().manual_seed(seed)


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_of_many_roundings_is_the_number(sign):
    """bfloat16 numbers near 1 are 2^-7 apart, near 1000 they are 4, denormal ones 2^-133."""
    cases = {1 + 2**-9: 2**-7, 1001.0: 4.0, 3e-5: 2**-23, 1 + 2**-16: 2**-7, 2.0**-140: 2.0**-133}
    draws = 40_000
    for x, gap in cases.items():
        x = float(torch.tensor(x))
        got = round_stochastically(torch.full((draws,), sign * x), rounder()).double()
        low = math.floor(x / gap) * gap
        share = (x - low) / gap  # that must go away from zero
        assert set(got.abs().tolist()) <= {low, low + gap}
        error = gap * math.sqrt(share * (1 - share) / draws)
        assert 0 < abs(float(got.mean()) - sign * x) <= 4 * error or share == 0


def test_what_bfloat16_holds_is_unmoved():
    exact = drawn(10_000, scale=100.0).bfloat16()
    special = torch.tensor([0.0, -0.0, 2.0**-133, -(2.0**-133), 3.3895e38, math.inf, -math.inf])
    for x in (exact, special.bfloat16()):
        got = round_stochastically(x.float(), rounder())
        assert got.dtype == torch.bfloat16
        assert torch.equal(got.view(torch.int16), x.view(torch.int16))


def test_nan_stays_nan():
    """Those with all bits set, too, which a carry would turn into zero."""
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000], dtype=torch.int32)
    assert round_stochastically(bits.view(torch.float32), rounder()).isnan().all()


def test_the_noise_of_neighbours_is_independent():
    """Four numbers share a draw of 64 bits: each goes up half the time, whatever the others do."""
    up = round_stochastically(torch.full((40_000,), 1 + 2**-8), rounder()).float() > 1
    table = up.view(-1, 4).double()
    assert (table.mean(0) - 0.5).abs().max() <= 4 * 0.5 / 100
    together = torch.corrcoef(table.T) - torch.eye(4)
    assert together.abs().max() <= 4 / 100


# --- the update ----------------------------------------------------------------------------------


def test_float32_is_torchs_own_to_the_bit():
    ours, theirs = some_weights(), some_weights()
    mine = AdamW(groups_of(ours), **SETTINGS)
    steps(mine, ours, range(4))
    steps(torch.optim.AdamW(groups_of(theirs), **SETTINGS, fused=True), theirs, range(4))
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


def test_8_bits_are_bitsandbytes_own_to_the_bit():
    """Through more than one chunk, the last of which ends within a block."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = (torch.nn.Parameter(drawn(CHUNK + 1000)) for _ in range(2))
    steps(AdamW([{"params": [ours], "weight_decay": 0.1}], bits=8, **SETTINGS), [ours], range(2))
    steps(bitsandbytes.optim.AdamW8bit([theirs], weight_decay=0.1, **SETTINGS), [theirs], range(2))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", BITS)
def test_bfloat16_weights_move_as_float32_ones_and_are_rounded_once(bits):
    """After one step each weight is one of the two neighbours of what float32 gives."""
    rough = some_weights(torch.bfloat16)
    exact = [torch.nn.Parameter(p.detach().float()) for p in rough]
    for parameters in (rough, exact):
        optimizer = AdamW(groups_of(parameters), bits=bits, **SETTINGS)
        for place, p in enumerate(parameters):
            p.grad = drawn(*p.shape, seed=place).bfloat16().to(p.dtype)
        optimizer.step()
    assert torch.equal(rough[1], exact[1])  # the vector is float32 in both
    got, want = rough[0].detach().double(), exact[0].detach().double()
    gap = 2.0 ** (torch.floor(torch.log2(want.abs())) - 7)
    assert ((got - want).abs() < gap).all()
    assert float(((got - want).abs() > gap / 2).double().mean()) > 0.1  # to the nearest: none
    error = float((gap / 2).square().sum().sqrt())  # bounds the deviation of the errors' sum
    assert abs(float((got - want).sum())) <= 4 * error


@pytest.mark.parametrize("bits", BITS)
def test_updates_too_small_for_bfloat16_are_not_lost(bits):
    """With a constant gradient AdamW moves by lr a step: 100 x 1e-4, where 1 has 2^-8 below it."""
    weights = torch.nn.Parameter(torch.ones(FEWEST, dtype=torch.bfloat16))
    optimizer = AdamW([{"params": [weights]}], bits=bits, **(SETTINGS | {"lr": 1e-4}))
    for _ in range(100):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    one = 2.0**-8 * math.sqrt(0.01 / 2.0**-8 * (1 - 1e-4 / 2.0**-8))  # deviation of a weight
    assert abs(float(weights.detach().double().mean()) - 0.99) <= 4 * one / math.sqrt(FEWEST)


@TYPES
@pytest.mark.parametrize("bits", BITS)
def test_moments_take_the_bytes_that_are_promised(dtype, bits):
    weights = some_weights(dtype)
    optimizer = AdamW(groups_of(weights), bits=bits, **SETTINGS)
    steps(optimizer, weights, [0])
    matrix, vector = (optimizer.state[p] for p in weights)
    size = sum(t.nbytes for t in matrix.values() if isinstance(t, torch.Tensor))
    blocks = 64 * 80 // 256
    assert size == (2 * 64 * 80 + 2 * 4 * blocks if bits == 8 else 8 * 64 * 80 + 4)
    assert vector["exp_avg"].dtype == torch.float32  # too few for 8 bits
    assert [p.dtype for p in weights] == [dtype, torch.float32]


@TYPES
@pytest.mark.parametrize("bits", BITS)
def test_a_loaded_state_leads_to_the_same_bits(dtype, bits):
    whole = some_weights(dtype)
    optimizer = AdamW(groups_of(whole), bits=bits, seed=3, **SETTINGS)
    steps(optimizer, whole, [0, 1])
    halfway, file = copy.deepcopy(whole), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    steps(optimizer, whole, [2, 3])
    file.seek(0)
    again = AdamW(groups_of(halfway), bits=bits, seed=3, **SETTINGS)
    again.load_state_dict(torch.load(file, weights_only=True))
    steps(again, halfway, [2, 3])
    for left, right in zip(whole, halfway, strict=True):
        assert torch.equal(left, right)


def test_the_seed_decides_the_rounding():
    found = []
    for seed in (0, 0, 1):
        weights = some_weights(torch.bfloat16)
        steps(AdamW(groups_of(weights), seed=seed, **SETTINGS), weights, [0])
        found.append(weights[0].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_parameter_without_gradient_stays():
    weights = some_weights(torch.bfloat16)
    before = copy.deepcopy(weights)
    weights[1].grad = torch.ones(33)
    AdamW(groups_of(weights), **SETTINGS).step()
    assert torch.equal(weights[0], before[0])
    assert not torch.equal(weights[1], before[1])


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    require_bitsandbytes("adamw")
    with pytest.raises(
        UserError, match=r"--optimizer adamw8bit needs bitsandbytes .*'prefloop\[quant\]'"
    ):
        require_bitsandbytes("adamw8bit")


# --- clipping ------------------------------------------------------------------------------------


def test_the_norm_of_bfloat16_gradients_is_float32s():
    """1,000 ones and 3 of 10: sqrt(1300); as a bfloat16 number it would be 36."""
    weights = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (1000, 3)]
    for p, value in zip(weights, (1.0, 10.0), strict=True):
        p.grad = torch.full_like(p, value)
    assert float(optim.clip_gradients(weights, 0.0)) == pytest.approx(1300**0.5, rel=1e-6)
    assert set(weights[1].grad.tolist()) == {10.0}  # 0 leaves them
    assert float(optim.clip_gradients(weights, 1300**0.5 / 4)) == pytest.approx(1300**0.5, rel=1e-6)
    assert set(weights[0].grad.tolist()) == {0.25}
    assert set(weights[1].grad.tolist()) == {2.5}
    with_float32 = [*weights, torch.nn.Parameter(torch.zeros(2))]
    with_float32[2].grad = torch.tensor([3.0, 4.0])
    expected = (1300 / 16 + 25) ** 0.5
    assert float(optim.clip_gradients(with_float32, 0.0)) == pytest.approx(expected, rel=1e-6)
