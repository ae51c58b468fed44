"""The quantizer family: each option off is the plain model, each limit is the nearest code, each variant trains."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.quantizers.assignment import (
    code_distances,
    harden,
    rotate_through,
    sinkhorn,
    sinkhorn_codes,
    soft_weights,
    straight_through,
)
from hf_genrec.identifiers.quantizers.codebook_level import SimVQLevel
from hf_genrec.identifiers.quantizers.configuration_fsq import FSQConfig
from hf_genrec.identifiers.quantizers.configuration_multi_head_vq import MultiHeadVQConfig
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.fsq import FSQ, FSQModel
from hf_genrec.identifiers.quantizers.kmeans import nearest
from hf_genrec.identifiers.quantizers.multi_head_vq import MultiHeadVQModel
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
from hf_genrec.identifiers.quantizers.training import FeatureDataset, train_multi_head_vq, train_rq_vae

VARIANTS = {
    "simvq": {"codebook_update": "simvq"},
    "soft": {"codebook_update": "gradient", "assignment": "soft"},
    "gumbel": {"codebook_update": "gradient", "assignment": "gumbel"},
    "gumbel_ema": {"assignment": "gumbel"},
    "sinkhorn": {"assignment": "sinkhorn", "sinkhorn_epsilon": 0.05},
    "sinkhorn_last": {"assignment": ["nearest", "nearest", "sinkhorn"], "sinkhorn_epsilon": 0.05},
    "rotation": {"gradient_path": "rotation"},
    "shared_tail": {"shared_codebooks": "tail"},
    "shared_all": {"shared_codebooks": "all", "codebook_sizes": [16, 16, 16]},
    "prefix": {"random_prefix": 1.0},
    "together": {
        "codebook_update": "gradient",
        "assignment": ["nearest", "gumbel", "gumbel"],
        "gradient_path": "rotation",
        "shared_codebooks": "tail",
        "random_prefix": 0.5,
    },
}


def noise(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def blobs(num: int = 600, dim: int = 24, clusters: int = 40, seed: int = 0) -> torch.Tensor:
    label = torch.randint(0, clusters, (num,), generator=torch.Generator().manual_seed(seed + 1))
    return noise(clusters, dim, seed)[label] * 2 + 0.5 * noise(num, dim, seed + 2) + 3


def small(**options) -> RQVAEConfig:
    settings = {"input_size": 24, "hidden_sizes": [32], "latent_size": 8, "codebook_sizes": [16, 8, 8]}
    return RQVAEConfig(**{**settings, **options})


def model_of(config: RQVAEConfig, x: torch.Tensor, seed: int = 0) -> RQVAEModel:
    torch.manual_seed(seed)
    return RQVAEModel(config).initialise_codebooks(x, seed=seed)


def step(model: RQVAEModel, x: torch.Tensor, seed: int = 0, **options) -> tuple:
    """One training forward and backward; returns the output and the encoder's first gradient."""
    torch.manual_seed(seed)
    model.train().zero_grad()
    output = model(features=x, **options)
    output.loss.backward()
    return output, model.encoder[0].weight.grad.clone()


def same_step(first: RQVAEModel, second: RQVAEModel, x: torch.Tensor, exact: bool = True, **options) -> None:
    (out_1, grad_1), (out_2, grad_2) = step(first, x), step(second, x, **options)
    assert torch.equal(out_1.codes, out_2.codes)
    close = torch.equal if exact else lambda a, b: torch.allclose(a, b, atol=1e-6, rtol=1e-4)
    assert close(out_1.loss, out_2.loss) and close(grad_1, grad_2) and close(out_1.quantized, out_2.quantized)


# -------------------------------------------------------------------------------------------------------------- config


def test_the_configuration_says_what_does_not_fit(tmp_path: Path) -> None:
    config = small(assignment=("nearest", "gumbel", "gumbel"), shared_codebooks="tail", random_prefix=1)
    config.save_pretrained(tmp_path)
    assert RQVAEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.level_assignments == ["nearest", "gumbel", "gumbel"] and config.codebook_of_level == [0, 1, 1]
    assert small().level_assignments == ["nearest"] * 3 and small().codebook_of_level == [0, 1, 2]
    wrong = [
        ("assignment", {"assignment": "argmax"}),
        ("assignment", {"assignment": ["nearest", "soft"]}),
        ("assignment", {"shared_codebooks": "tail", "assignment": ["nearest", "soft", "nearest"]}),
        ("codebook_sizes", {"shared_codebooks": "tail", "codebook_sizes": [8, 8, 4]}),
        ("codebook_sizes", {"shared_codebooks": "all"}),
        ("shared_codebooks", {"shared_codebooks": "head"}),
        ("gradient_path", {"gradient_path": "reflection"}),
        ("sinkhorn_epsilon", {"sinkhorn_epsilon": 0.0}),
        ("sinkhorn_iterations", {"sinkhorn_iterations": 0}),
        ("random_prefix", {"random_prefix": 1.5}),
        ("assignment_temperature", {"assignment_temperature": -0.1}),
        ("assignment_temperature_steps", {"assignment_temperature_steps": -1}),
    ]
    for name, options in wrong:
        with pytest.raises(Exception, match=name):
            small(**options)
    with pytest.raises(Exception, match="scalar_levels"):
        FSQConfig(scalar_levels=[[5, 2]])


# --------------------------------------------------------------------------------------------------------------- SimVQ


def test_simvq_with_the_identity_map_is_the_gradient_rule() -> None:
    x = blobs()
    plain, simvq = (model_of(small(codebook_update=update), x) for update in ("gradient", "simvq"))
    assert all(isinstance(level, SimVQLevel) for level in simvq.levels)
    assert all(torch.equal(a, b) for a, b in zip(plain.codebooks, simvq.codebooks))
    same_step(plain, simvq, x)
    # the map's gradient is basis^T times the codebook's: every point moves all codes
    for one, other in zip(plain.levels, simvq.levels):
        torch.testing.assert_close(other.map.grad, other.basis.t() @ one.codebook.grad, atol=1e-6, rtol=1e-4)


def test_simvq_moves_unused_codes_and_keeps_its_basis() -> None:
    x = blobs()
    model = train_rq_vae(x, small(codebook_update="simvq"), max_steps=30, progress=False)
    start = model_of(small(codebook_update="simvq"), x)
    torch.manual_seed(0)
    for level, first in zip(model.levels, start.levels):
        assert torch.equal(level.basis, first.basis) and not torch.equal(level.map, torch.eye(8))
    level = start.levels[0]
    with torch.no_grad():
        level.basis[0] = 50.0  # nobody uses it
        before = level.codebook.clone()
        level.map.add_(0.01)
    assert bool((level.codebook[0] != before[0]).all())
    assert level.reset_dead_codes(noise(20, 8)) == 0 and int(level.usage.sum()) == 0


# ----------------------------------------------------------------------------------------------------- soft assignment


def test_soft_and_gumbel_at_temperature_zero_are_the_nearest_code() -> None:
    x = blobs()
    cold = {"assignment_temperature": 0.0, "assignment_temperature_end": 0.0}
    for update in ("ema", "gradient"):
        for assignment in ("soft", "gumbel"):
            plain = model_of(small(codebook_update=update), x)
            same_step(plain, model_of(small(codebook_update=update, assignment=assignment, **cold), x), x)
    # and the limit is reached from above, noise included
    distance = code_distances(noise(200, 4), noise(9, 4, 1))
    torch.manual_seed(0)
    for gumbel in (False, True):
        codes, _ = harden(soft_weights(distance, 1e-7, gumbel))
        assert torch.equal(codes, distance.argmin(1))
        one_hot = nn.functional.one_hot(codes, 9).float()
        assert float((soft_weights(distance, 1e-7, gumbel) - one_hot).abs().max()) < 0.5


def test_soft_weights_by_hand_and_gumbel_frequencies() -> None:
    distance = torch.tensor([[1.0, 2.0, 3.0]])  # mean 2
    expected = torch.softmax(torch.tensor([-0.5, -1.0, -1.5]) / 0.4, 0)
    torch.testing.assert_close(soft_weights(distance, 0.4)[0], expected)
    torch.manual_seed(0)
    codes, _ = harden(soft_weights(distance.expand(20000, 3), 0.4, gumbel=True))
    frequency = torch.bincount(codes, minlength=3) / 20000
    assert float((frequency - expected).abs().max()) < 0.015  # 4 standard errors are .014


def test_soft_assignment_passes_the_gradient_through_weights_and_codes() -> None:
    x, book = noise(50, 4).requires_grad_(), noise(6, 4, 1).requires_grad_()
    target = noise(50, 4, 2)
    codes, weight = harden(soft_weights(code_distances(x, book), 0.3))
    assert torch.equal(weight.detach(), nn.functional.one_hot(codes, 6).float())
    (weight @ book - target).pow(2).sum().backward()
    x_2, book_2 = x.detach().clone().requires_grad_(), book.detach().clone().requires_grad_()
    soft = soft_weights(code_distances(x_2, book_2), 0.3)
    hard = nn.functional.one_hot(codes, 6).float()
    outer = 2 * (hard @ book_2.detach() - target)  # d loss / d vector, at the hard vector
    ((soft @ book_2.detach() * outer).sum() + (hard @ book_2 * outer).sum()).backward()
    torch.testing.assert_close(x.grad, x_2.grad)
    torch.testing.assert_close(book.grad, book_2.grad)
    assert float(x.grad.abs().sum()) > 0


def test_temperature_cools_on_a_line_and_survives_saving(tmp_path: Path) -> None:
    x = blobs()
    options = {"assignment_temperature": 0.5, "assignment_temperature_end": 0.1, "assignment_temperature_steps": 4}
    model = model_of(small(assignment="gumbel", **options), x)
    seen = []
    for _ in range(6):
        seen.append(model.levels[0].temperature)
        step(model, x)
    assert seen == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    at_once = model_of(small(assignment="gumbel", **{**options, "assignment_temperature_steps": 0}), x)
    assert at_once.levels[0].temperature == pytest.approx(0.1)
    model.save_pretrained(tmp_path)
    assert RQVAEModel.from_pretrained(tmp_path).levels[0].temperature == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["gumbel", "soft", "sinkhorn"])
def test_evaluation_takes_the_nearest_code_and_changes_nothing(name: str) -> None:
    x = blobs()
    model = model_of(small(**VARIANTS[name]), x).eval()
    plain = RQVAEModel(small(codebook_update=model.config.codebook_update)).eval()
    plain.load_state_dict(model.state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert torch.equal(model(features=x).codes, plain(features=x).codes)
    assert torch.equal(model.encode(x), plain.encode(x))
    assert torch.equal(model.train().encode(x), plain.encode(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ Sinkhorn


def test_sinkhorn_marginals_limits_and_both_forms() -> None:
    cost = code_distances(noise(60, 3), noise(8, 3, 1)).double()
    plan = sinkhorn(cost, 0.5, 500)
    torch.testing.assert_close(plan.sum(1), torch.full((60,), 1 / 60, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 1 / 8, dtype=torch.float64), atol=1e-6, rtol=0)
    # plan = diag(u) exp(-cost / eps) diag(v): the logs differ from -cost / eps by a row and a column term only
    left = (plan.log() + cost / 0.5).double()
    left = left - left[:1] - left[:, :1] + left[:1, :1]
    assert float(left.abs().max()) < 1e-9
    torch.testing.assert_close(sinkhorn(cost, 1e9), torch.full_like(cost, 1 / 480))  # entropy alone: uniform
    shifted = sinkhorn(cost + noise(60, 1, 2).double() * 5, 0.5, 500)
    torch.testing.assert_close(shifted, plan)
    # the logarithmic form (a large cost in units of epsilon) agrees with the fast one
    wide = torch.cat([cost, torch.full((60, 1), 400.0, dtype=torch.float64)], 1)
    slow, fast = sinkhorn(wide, 0.5, 30), sinkhorn(wide, 0.75, 30)
    assert float((wide - wide.min(1, keepdim=True).values).max()) / 0.75 < 600 < 400 / 0.5
    for epsilon, found in ((0.5, slow), (0.75, fast)):
        scaled = (wide - wide.min(1, keepdim=True).values) / epsilon
        u = torch.zeros(60, dtype=torch.float64)
        for _ in range(30):
            v = -math.log(9) - torch.logsumexp(u[:, None] - scaled, 0)
            u = -math.log(60) - torch.logsumexp(v - scaled, 1)
        torch.testing.assert_close(found, (u[:, None] + v - scaled).exp(), atol=1e-12, rtol=1e-5)
    with pytest.raises(TrainingError, match="epsilon"):
        sinkhorn(cost, 0.0)
    with pytest.raises(TrainingError, match="NaN"):
        sinkhorn(cost.fill_(float("nan")), 1.0)


def test_sinkhorn_is_argmin_on_balanced_separated_data_and_balances_the_rest() -> None:
    centres = torch.eye(6) * 10
    x = centres.repeat_interleave(20, 0) + 0.3 * noise(120, 6)
    for epsilon in (0.1, 0.003, 1e-5):
        assert torch.equal(sinkhorn_codes(x, centres, epsilon), nearest(x, centres))
    skewed = torch.cat([centres[:1].expand(100, 6), centres[1:].repeat_interleave(4, 0)]) + 0.3 * noise(120, 6)
    load = torch.bincount(nearest(skewed, centres), minlength=6)
    balanced = torch.bincount(sinkhorn_codes(skewed, centres, 0.003, 200), minlength=6)
    assert int(load.max()) == 100 and int(balanced.max()) <= 30 and int(balanced.min()) >= 10


def test_sinkhorn_balances_training_batches_and_the_last_level_on_request() -> None:
    x = blobs(num=512, clusters=5)  # fewer clusters than codes: the plain assignment is uneven
    plain, balanced = (
        model_of(small(assignment=name, sinkhorn_epsilon=0.02), x).train() for name in ("nearest", "sinkhorn")
    )
    with torch.no_grad():
        loads = [torch.bincount(model(features=x).codes[:, 0], minlength=16) for model in (plain, balanced)]
    assert int(loads[1].max()) < int(loads[0].max()) and int(loads[1].max()) < 2 * 512 / 16
    model = plain.eval()
    usual, spread = model.encode(x), model.encode(x, last_level="sinkhorn")
    assert torch.equal(usual[:, :2], spread[:, :2])
    spread_load, usual_load = (torch.bincount(codes[:, 2], minlength=8) for codes in (spread, usual))
    assert float(spread_load.float().var()) < 0.3 * float(usual_load.float().var())
    with pytest.raises(IncompatibleComponentsError, match="last_level"):
        model.encode(x, last_level="random")


# ------------------------------------------------------------------------------------------------------ gradient paths


def test_rotation_forward_is_the_value_and_backward_the_rotation() -> None:
    value, through = noise(30, 5), noise(30, 5, 1).requires_grad_()
    turned = rotate_through(value, through)
    torch.testing.assert_close(turned, value, atol=1e-5, rtol=1e-5)
    outer = noise(30, 5, 2)
    (turned * outer).sum().backward()
    scale = value.norm(dim=1) / through.detach().norm(dim=1)
    # a rotation keeps length and the angle to the vector it turned
    torch.testing.assert_close(through.grad.norm(dim=1), scale * outer.norm(dim=1), atol=1e-4, rtol=1e-4)
    cosine = nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(through.grad, through.detach()), cosine(outer, value), atol=1e-4, rtol=1e-4)
    equal = noise(4, 5, 3).requires_grad_()
    (rotate_through(equal.detach(), equal) * outer[:4]).sum().backward()
    torch.testing.assert_close(equal.grad, outer[:4], atol=1e-5, rtol=1e-5)  # nothing to turn: straight through
    for value, through in (
        (torch.zeros(1, 3), noise(1, 3)),
        (noise(1, 3), torch.zeros(1, 3)),
        (-noise(1, 3), noise(1, 3)),
    ):
        through.requires_grad_()
        rotate_through(value, through).sum().backward()
        assert bool(torch.isfinite(through.grad).all())
    torch.testing.assert_close(straight_through(value, through), value)


def test_rotation_changes_gradients_only() -> None:
    x = blobs()
    (out_1, grad_1), (out_2, grad_2) = (
        step(model_of(small(gradient_path=path), x), x) for path in ("straight_through", "rotation")
    )
    assert torch.equal(out_1.codes, out_2.codes)
    torch.testing.assert_close(out_1.loss, out_2.loss, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(grad_1, grad_2, rtol=1e-2)


# ---------------------------------------------------------------------------------------------------- shared codebooks


@pytest.mark.parametrize("update", ["gradient", "ema", "simvq"])
def test_a_shared_tail_is_one_codebook(update: str, tmp_path: Path) -> None:
    x = blobs()
    model = model_of(small(codebook_update=update, shared_codebooks="tail"), x)
    assert len(model.levels) == 2 and len(model.codebooks) == 3 and model.codebook_sizes == (16, 8, 8)
    names = [name for name, _ in model.named_parameters() if "levels" in name]
    assert len(names) == {"gradient": 2, "ema": 0, "simvq": 2}[update]
    with torch.no_grad():
        target = model.levels[1].basis if update == "simvq" else model.levels[1].codebook
        target.add_(1.0)
    assert torch.equal(model.codebooks[1], model.codebooks[2])
    model = train_rq_vae(x, small(codebook_update=update, shared_codebooks="tail"), max_steps=10, progress=False)
    model.save_pretrained(tmp_path)
    loaded = RQVAEModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(x), model.encode(x)) and len(loaded.levels) == 2
    codes = model.encode(x)
    books = model.codebooks
    residual = model.transform(x)
    for level in range(3):
        assert torch.equal(codes[:, level], nearest(residual, books[level]))
        residual = residual - books[level][codes[:, level]]
    torch.testing.assert_close(model.decode(codes[:, :2]).shape, x.shape)


def test_a_shared_codebook_learns_from_all_its_levels_at_once() -> None:
    x = blobs()
    config = small(shared_codebooks="all", codebook_sizes=[8, 8], ema_decay=0.0, dead_code_interval=0)
    model = model_of(config, x).train()
    before, latents = model.codebooks[0].clone(), model.transform(x)
    codes = model(features=x).codes
    assert int(model.levels[0].steps) == 1 and int(model.levels[0].usage.sum()) == 1200
    residual = latents - before[codes[:, 0]]
    points, owner = torch.cat([latents, residual]), torch.cat([codes[:, 0], codes[:, 1]])
    for code in owner.unique().tolist():
        torch.testing.assert_close(model.codebooks[0][code], points[owner == code].mean(0), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ random prefix


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_full_prefixes_are_off_and_short_ones_decode_the_prefix(update: str) -> None:
    x = blobs()
    same_step(
        *(model_of(small(codebook_update=update), x) for _ in range(2)), x, prefix_lengths=torch.full((len(x),), 3)
    )
    model = model_of(small(codebook_update=update), x).eval()
    lengths = torch.arange(len(x)) % 3 + 1
    output = model(features=x, prefix_lengths=lengths)
    for length in (1, 2, 3):
        own = lengths == length
        decoded = model.decode(output.codes[own, :length])
        torch.testing.assert_close(output.reconstruction[own], decoded, atol=1e-4, rtol=1e-4)
    assert torch.equal(output.quantized, model(features=x).quantized)  # contrast sees all codes
    for wrong in (torch.zeros(len(x), dtype=torch.long), torch.full((len(x),), 4), torch.ones(3, dtype=torch.long)):
        with pytest.raises(IncompatibleComponentsError, match=r"1\.\.3"):
            model(features=x, prefix_lengths=wrong)


def test_random_prefixes_are_drawn_evenly_in_training_only() -> None:
    model = RQVAEModel(small(random_prefix=0.5)).train()
    torch.manual_seed(0)
    lengths = model._prefix_lengths(None, 30000)
    share = torch.bincount(lengths, minlength=4) / 30000
    assert share.tolist() == pytest.approx([0, 1 / 6, 1 / 6, 2 / 3], abs=0.012)
    assert model.eval()._prefix_lengths(None, 10) is None
    off, state = RQVAEModel(small()).train(), torch.get_rng_state()
    assert off._prefix_lengths(None, 10) is None and torch.equal(torch.get_rng_state(), state)
    parallel = MultiHeadVQModel(MultiHeadVQConfig(input_size=8, hidden_sizes=[], latent_size=2, codebook_sizes=[4, 4]))
    with pytest.raises(IncompatibleComponentsError, match="no prefixes"):
        parallel(features=noise(5, 8), prefix_lengths=torch.ones(5, dtype=torch.long))


def test_prefix_training_makes_short_prefixes_better_and_errors_monotone() -> None:
    x = blobs()
    errors = {}
    for share in (0.0, 1.0):
        model = train_rq_vae(x, small(random_prefix=share), max_steps=150, batch_size=128, progress=False)
        codes = model.encode(x)
        errors[share] = [float((model.decode(codes[:, :length]) - x).pow(2).mean()) for length in (1, 2, 3)]
    assert errors[1.0][0] < errors[0.0][0]
    assert all(longer < shorter for shorter, longer in pairwise(errors[1.0]))


# ------------------------------------------------------------------------------------------------- outputs for losses


def test_outputs_are_the_views_that_losses_need() -> None:
    x = blobs()
    model = model_of(small(codebook_update="gradient"), x).eval()
    output = model(features=x)
    torch.testing.assert_close(output.quantized, sum(output.code_vectors), atol=1e-5, rtol=1e-5)
    output.quantized.sum().backward(retain_graph=True)
    assert model.encoder[0].weight.grad is not None and model.levels[0].codebook.grad is None
    model.zero_grad()
    output.code_vectors[1].sum().backward()
    assert model.levels[1].codebook.grad is not None and model.encoder[0].weight.grad is None
    distances = model.level_distances(output.latents)
    for level, distance_BC in enumerate(distances):
        assert distance_BC.shape == (600, model.codebook_sizes[level]) and distance_BC.requires_grad
        assert torch.equal(distance_BC.argmin(1), output.codes[:, level])


# ---------------------------------------------------------------------------------------------------------------- FSQ


@pytest.mark.parametrize("sizes", [[3], [5, 4], [8, 6, 5], [7, 5, 5, 5]])
def test_fsq_codes_and_vectors_are_a_bijection(sizes: list[int]) -> None:
    grid = FSQ(sizes)
    total = int(torch.tensor(sizes).prod())
    codes = torch.arange(total)
    vectors = grid.vectors(codes)
    assert torch.equal(grid.codes(vectors), codes) and len(vectors.unique(dim=0)) == total
    assert float(vectors.min()) == -1 and float(vectors.max()) <= 1
    for dimension, size in enumerate(sizes):
        values = vectors[:, dimension].unique()
        assert len(values) == size and 0.0 in values
        torch.testing.assert_close(values.diff(), torch.full((size - 1,), 1 / (size // 2)))
    # round trip: a latent whose squashed value is the grid point gets that code back, and so does anything near it
    middle = torch.tensor(sizes) // 2
    half = (torch.tensor(sizes) - 1) * (1 - 1e-3) / 2
    offset = (torch.tensor(sizes) % 2 == 0).float() / 2
    inside = ((vectors * middle + offset) / half).clamp(-1 + 1e-6, 1 - 1e-6)
    latents = torch.atanh(inside) - torch.atanh(offset / half)
    found, quantized = grid.quantize(latents)
    assert torch.equal(found, codes) and torch.equal(quantized, vectors)
    spread = grid.quantize(noise(4000, len(sizes)) * 20)[0]  # far outside: never out of range
    assert int(spread.min()) >= 0 and int(spread.max()) < total
    with pytest.raises(IncompatibleComponentsError, match="3 or more"):
        FSQ([*sizes, 2])


def test_fsq_gradient_is_that_of_the_squashing() -> None:
    grid, z = FSQ([5, 4]), noise(50, 2).requires_grad_()
    codes, vectors = grid.quantize(z)
    outer = noise(50, 2, 1)
    (vectors * outer).sum().backward()
    other = z.detach().clone().requires_grad_()
    (grid.bound(other) / 2 * outer).sum().backward()
    torch.testing.assert_close(z.grad, other.grad)
    grids = grid.vectors(torch.arange(20))  # rounding = nearest grid point in the squashed space, scalar by scalar
    assert torch.equal(codes, torch.cdist(grid.bound(z.detach()).double(), (grids * 2).double()).argmin(1))


def trainer_of(model: nn.Module, x: torch.Tensor, folder: Path, steps: int) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=128,
        learning_rate=3e-3,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        seed=1,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=args, train_dataset=FeatureDataset(x), data_collator=lambda batch: batch)


def test_fsq_trains_uses_its_codes_and_survives_saving(tmp_path: Path) -> None:
    x = blobs(num=1000)
    torch.manual_seed(0)
    config = FSQConfig(input_size=24, hidden_sizes=[32], scalar_levels=[[5, 4], [4, 3], [5, 3]])
    assert config.codebook_sizes == [20, 12, 15]
    model = FSQModel(config).initialise_codebooks(x, seed=0)
    with torch.no_grad():
        before, used = model.eval()(features=x), identifier_health(model.encode(x), model.codebook_sizes, x)
    trainer_of(model, x, tmp_path, 200).train()
    with torch.no_grad():
        after, now = model.eval()(features=x), identifier_health(model.encode(x), model.codebook_sizes, x)
    assert float(after.loss) < 0.6 * float(before.loss) and float(after.loss) == float(after.reconstruction_loss)
    assert min(now.utilisation) >= 0.9 and sum(now.perplexity) > sum(used.perplexity)
    assert torch.equal(model.encode(x), after.codes)
    torch.testing.assert_close(model.decode(after.codes), after.reconstruction, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    loaded = FSQModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encode(x), model.encode(x))
    assert loaded.config.scalar_levels == config.scalar_levels and loaded.config.codebook_sizes == [20, 12, 15]
    assert [tuple(book.shape) for book in loaded.codebooks] == [(20, 2), (12, 2), (15, 2)]
    with pytest.raises(IncompatibleComponentsError, match=r"\(N, 3\)"):
        model.decode(after.codes[:, :2])
    with pytest.raises(IncompatibleComponentsError, match="cannot balance"):
        model.encode(x, last_level="sinkhorn")


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_and_uses_more_codes(name: str, tmp_path: Path) -> None:
    """From codes that lie together, of which few points reach more than some, the codes fill and the loss falls."""
    x = blobs(num=1000)
    torch.manual_seed(0)
    model = RQVAEModel(small(**{"dead_code_interval": 10, "assignment_temperature_steps": 50, **VARIANTS[name]}))
    model.scaler.fit(x)
    for level in model.levels:
        start = 0.2 * torch.randn_like(level.codebook)
        start[:, 0] += 1.5
        level.load_codebook(start, torch.full((len(start),), 1 / len(start)))
    with torch.no_grad():
        before, used = model.eval()(features=x), identifier_health(model.encode(x), model.codebook_sizes, x)
    trainer_of(model, x, tmp_path, 120).train()
    with torch.no_grad():
        after, now = model.eval()(features=x), identifier_health(model.encode(x), model.codebook_sizes, x)
    assert float(after.reconstruction_loss) < 0.8 * float(before.reconstruction_loss)
    assert sum(now.utilisation) > sum(used.utilisation)
    assert sum(now.perplexity) > 1.1 * sum(used.perplexity)
    assert min(now.utilisation) >= 0.8


@pytest.mark.parametrize("name", ["simvq", "gumbel", "sinkhorn", "rotation"])
def test_multi_head_models_take_the_same_options(name: str) -> None:
    x = blobs()
    config = MultiHeadVQConfig(
        input_size=24, hidden_sizes=[32], latent_size=6, codebook_sizes=[16, 8, 8], **VARIANTS[name]
    )
    model = train_multi_head_vq(x, config, max_steps=60, batch_size=128, learning_rate=3e-3, progress=False)
    assert min(identifier_health(model.encode(x), (16, 8, 8), x).utilisation) >= 0.8


@pytest.mark.parametrize("name", ["gumbel", "together"])
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    x, config = blobs(), small(dead_code_interval=3, dropout=0.1, **VARIANTS[name])
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        save_steps=6,
        per_device_train_batch_size=64,
        report_to="none",
        disable_tqdm=True,
        seed=1,
        dataloader_pin_memory=False,
    )
    whole = train_rq_vae(x, config, args, seed=1)
    resumed = train_rq_vae(x, config, args, seed=1, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
