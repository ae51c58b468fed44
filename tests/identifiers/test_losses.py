"""Loss terms: values by hand, gradients, masks, limits, and the published losses as settings of one contrast."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.identifiers.losses import (
    gather_rows,
    near_duplicate_mask,
    pair_nce,
    prefix_concats,
    prefix_sums,
    same_target_mask,
)
from hf_genrec.identifiers.losses_codebook import (
    code_clusters,
    diversity,
    orthogonality,
    rotation_gap,
    tag_hierarchy,
    tag_supervision,
    uniqueness,
    usage_balance,
)
from hf_genrec.identifiers.losses_distribution import code_divergence, level_divergence, mmd
from hf_genrec.identifiers.quantizers.assignment import code_distances
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nce_by_loops(a, b, temperature, negatives=None, mask=None, cosine=True) -> list[float]:
    """The definition, term by term, in Python floats."""

    def similarity(u: Tensor, v: Tensor) -> float:
        dot = sum(float(x) * float(y) for x, y in zip(u, v))
        if not cosine:
            return dot
        return dot / math.sqrt(sum(float(x) ** 2 for x in u)) / math.sqrt(sum(float(x) ** 2 for x in v))

    terms = []
    for i in range(len(a)):
        rows = [] if negatives is None else (negatives if negatives.dim() == 2 else negatives[i])
        columns = [*b, *rows]
        kept = [j for j in range(len(columns)) if j == i or mask is None or not bool(mask[i, j])]
        total = sum(math.exp(similarity(a[i], columns[j]) / temperature) for j in kept)
        terms.append(-math.log(math.exp(similarity(a[i], columns[i]) / temperature) / total))
    return terms


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------------------------------ pair_nce


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("kind", ["none", "shared", "own"])
def test_pair_nce_is_its_definition(similarity: str, kind: str) -> None:
    a, b = noise(5, 3), noise(5, 3, seed=1)
    negatives = {"none": None, "shared": noise(4, 3, seed=2), "own": noise(5, 4, 3, seed=3)}[kind]
    width = 5 if kind == "none" else 9
    mask = noise(5, width, seed=4) > 0.5
    mask[1, 1] = True  # the own pair stays
    cosine = similarity == "cosine"
    terms = nce_by_loops(a, b, 0.3, negatives, mask, cosine)
    options = {"temperature": 0.3, "negatives": negatives, "mask": mask, "similarity": similarity}
    assert float(pair_nce(a, b, **options)) == pytest.approx(mean(terms), rel=1e-5)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    weighted = mean([float(w) * term for w, term in zip(weight, terms)])
    assert float(pair_nce(a, b, weight=weight, **options)) == pytest.approx(weighted, rel=1e-5)
    back = nce_by_loops(b, a, 0.3, None, mask[:, :5].t(), cosine)
    both = pair_nce(a, b, symmetric=True, **options)
    assert float(both) == pytest.approx((mean(terms) + mean(back)) / 2, rel=1e-5)
    if kind != "none":
        only = torch.cat([torch.ones(5, 5, dtype=torch.bool), mask[:, 5:]], 1)
        expected = mean(nce_by_loops(a, b, 0.3, negatives, only, cosine))
        assert float(pair_nce(a, b, in_batch=False, **options)) == pytest.approx(expected, rel=1e-5)


def test_pair_nce_limits() -> None:
    a, b = noise(6, 4), noise(6, 4, seed=1)
    assert float(pair_nce(a[:1], b[:1], temperature=0.1, symmetric=True)) == 0  # one pair: nothing to tell apart
    assert float(pair_nce(a, b, temperature=0.1, mask=torch.ones(6, 6, dtype=torch.bool))) == 0
    assert float(pair_nce(a, b, temperature=1e9)) == pytest.approx(math.log(6), rel=1e-5)
    # temperature -> 0: t * loss is the hinge on the best negative, and 0 for matching views
    cosine = F.normalize(a) @ F.normalize(b).t()
    best = cosine.masked_fill(torch.eye(6, dtype=torch.bool), -2).max(1).values
    hinge = (best - cosine.diagonal()).clamp_min(0).mean()
    assert float(1e-5 * pair_nce(a, b, temperature=1e-5)) == pytest.approx(float(hinge), abs=1e-4)
    assert float(pair_nce(a, a, temperature=1e-3)) == 0
    assert float(pair_nce(3 * a, b, temperature=0.2)) == pytest.approx(float(pair_nce(a, b, temperature=0.2)), rel=1e-5)
    assert float(pair_nce(a, b, temperature=0.5, similarity="dot")) == pytest.approx(
        float(F.cross_entropy(a @ b.t() / 0.5, torch.arange(6))), rel=1e-6
    )


def test_false_negatives_are_masked_by_target_and_by_similarity() -> None:
    a, b = noise(4, 3), noise(4, 3, seed=1)
    b[2] = b[0]
    targets = torch.tensor([7, 8, 7, 9])
    mask = same_target_mask(targets)
    assert mask.long().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    by_target = pair_nce(a, b, temperature=0.2, targets=targets, symmetric=True)
    torch.testing.assert_close(by_target, pair_nce(a, b, temperature=0.2, mask=mask, symmetric=True))
    assert float(by_target) < float(pair_nce(a, b, temperature=0.2, symmetric=True))
    expected = mean(nce_by_loops(a, b, 0.2, None, mask)) / 2 + mean(nce_by_loops(b, a, 0.2, None, mask)) / 2
    assert float(by_target) == pytest.approx(expected, rel=1e-5)
    near = near_duplicate_mask(b, 0.99)
    assert torch.equal(near, mask)
    # a masked column gets no gradient: row 2 pulls nothing when it is only a false negative
    view_b = b.clone().requires_grad_()
    pair_nce(a, view_b, temperature=0.2, targets=targets, weight=torch.tensor([1.0, 0, 0, 0])).backward()
    assert bool((view_b.grad[2] == 0).all()) and bool((view_b.grad[[0, 1, 3]] != 0).any(1).all())


def test_gradients_and_a_learned_temperature() -> None:
    a, b = noise(5, 3).double().requires_grad_(), noise(5, 3, seed=1).double().requires_grad_()
    negatives = noise(4, 3, seed=2).double().requires_grad_()
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    mask = noise(5, 9, seed=4) > 0.8

    def loss(a: Tensor, b: Tensor, negatives: Tensor, temperature: Tensor) -> Tensor:
        return pair_nce(a, b, temperature=temperature, negatives=negatives, mask=mask, symmetric=True)

    assert torch.autograd.gradcheck(loss, (a, b, negatives, temperature))


def test_bad_views_are_named() -> None:
    a = noise(4, 3)
    wrong = [
        ({"view_b": noise(4, 2)}, "two views of one shape"),
        ({"similarity": "l2"}, "similarity"),
        ({"negatives": noise(5, 2)}, r"negatives must be \(M, 3\)"),
        ({"mask": torch.zeros(3, 4, dtype=torch.bool)}, r"mask must be bool of shape \(4, 4\)"),
        ({"mask": torch.zeros(4, 4)}, "mask must be bool"),
        ({"targets": torch.zeros(3)}, r"targets must be \(4,\)"),
        ({"weight": torch.ones(4, 1)}, r"weight must be \(4,\)"),
        ({"in_batch": False}, "needs negatives"),
    ]
    for options, message in wrong:
        arguments = {"view_a": a, "view_b": a, "temperature": 0.1, **options}
        with pytest.raises(IncompatibleComponentsError, match=message):
            pair_nce(**arguments)
    with pytest.raises(TrainingError, match="temperature"):
        pair_nce(a, a, temperature=0.0)


# ----------------------------------------------------------------------------------- the published losses as settings


def rq_vae(**options) -> tuple[RQVAEModel, Tensor]:
    torch.manual_seed(0)
    settings = {"input_size": 12, "hidden_sizes": [16], "latent_size": 4, "codebook_sizes": [8, 8, 8]}
    x = noise(64, 12)
    config = RQVAEConfig(**{**settings, "codebook_update": "gradient", **options})
    return RQVAEModel(config).initialise_codebooks(x).eval(), x


def touched(model: RQVAEModel) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_letter_collaborative_alignment() -> None:
    """Cross-entropy of zq @ cf^T against the diagonal, without temperature; its gradient trains the encoder."""
    model, x = rq_vae()
    cf = noise(64, 4, seed=5)
    output = model(features=x)
    loss = pair_nce(output.quantized, cf, temperature=1.0, similarity="dot")
    torch.testing.assert_close(loss, F.cross_entropy(output.quantized @ cf.t(), torch.arange(64)))
    loss.backward()
    assert touched(model) == {"encoder"}
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    cosines = []
    for _ in range(60):
        optimiser.zero_grad()
        output = model(features=x)
        (output.loss + pair_nce(output.quantized, cf, temperature=1.0, similarity="dot")).backward()
        optimiser.step()
        cosines.append(float(F.cosine_similarity(output.quantized, cf).mean().detach()))
    assert cosines[-1] > cosines[0] + 0.3  # CHECK: cos(zq, cf) rises


def test_cost_reconstruction_identifies_its_input() -> None:
    model, x = rq_vae()
    output = model(features=x)
    loss = pair_nce(output.reconstruction, x, temperature=0.1)
    expected = mean(nce_by_loops(output.reconstruction[:6].detach(), x[:6], 0.1))
    six = pair_nce(output.reconstruction[:6], x[:6], temperature=0.1)
    assert float(six.detach()) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert touched(model) == {"encoder", "decoder"}
    assert float(pair_nce(x, x, temperature=1e-3)) < 1e-6  # a perfect reconstruction costs nothing


def test_item_item_contrasts_of_cosette_plum_and_forge() -> None:
    model, x = rq_vae()
    a, b = model(features=x[:32]), model(features=x[32:])
    plum = pair_nce(a.quantized, b.quantized, temperature=0.2, symmetric=True)
    torch.testing.assert_close(plum, pair_nce(b.quantized, a.quantized, temperature=0.2, symmetric=True))
    scale = torch.tensor(0.07).reciprocal().requires_grad_()  # FORGE: three symmetric terms with learned scales
    views = [(a.reconstruction, b.reconstruction), (a.reconstruction, x[32:]), (a.reconstruction, x[:32])]
    batch = torch.stack([pair_nce(u, v, temperature=1 / scale, symmetric=True) for u, v in views]).mean()
    mined = noise(32, 5, 12, seed=3)
    hard = torch.stack(
        [pair_nce(u, v, temperature=1 / scale, negatives=mined, in_batch=False) for u, v in views]
    ).mean()
    (0.75 * batch + 0.25 * hard + plum).backward()
    assert touched(model) == {"encoder", "decoder"} and float(scale.grad) != 0
    by_hand = 0.0
    for u, v in views:
        u, v = u.detach(), v.detach()
        by_hand += mean(nce_by_loops(u, v, 0.07)) / 6 + mean(nce_by_loops(v, u, 0.07)) / 6
    assert float(batch.detach()) == pytest.approx(by_hand, rel=1e-3)


def test_higr_prefix_sums_and_hid_vae_prefix_concats() -> None:
    model, x = rq_vae()
    a, b = model(features=x[:32]), model(features=x[32:])
    sums_a, sums_b = prefix_sums(a.code_vectors), prefix_sums(b.code_vectors)
    torch.testing.assert_close(sums_a[1], a.code_vectors[0] + a.code_vectors[1])
    torch.testing.assert_close(sums_a[2], a.quantized, atol=1e-5, rtol=1e-5)
    loss = sum(pair_nce(u, v, temperature=0.2) for u, v in zip(sums_a[:-1], sums_b[:-1]))
    loss.backward()
    assert model.levels[0].codebook.grad is not None and model.levels[1].codebook.grad is not None
    assert model.levels[2].codebook.grad is None  # the last level stays free
    concats = prefix_concats(a.code_vectors)
    assert [tuple(view.shape) for view in concats] == [(32, 4), (32, 8), (32, 12)]
    assert torch.equal(concats[2][:, 4:8], a.code_vectors[1])


def test_mmq_v2_richness_weights_damp_the_whole_term() -> None:
    a, b = noise(6, 3), noise(6, 3, seed=1)
    whole, half = (pair_nce(a, b, temperature=0.2, weight=torch.full((6,), w)) for w in (1.0, 0.5))
    torch.testing.assert_close(whole, pair_nce(a, b, temperature=0.2))
    torch.testing.assert_close(half, whole / 2)
    assert float(pair_nce(a, b, temperature=0.2, weight=torch.zeros(6))) == 0


# -------------------------------------------------------------------------------------------------------------- gather


def _gathered(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    a, b = noise(6, 3).chunk(world)[rank].requires_grad_(), noise(6, 3, seed=1).chunk(world)[rank].requires_grad_()
    targets = torch.tensor([1, 2, 3, 1, 4, 5]).chunk(world)[rank]
    loss = pair_nce(a, b, temperature=0.3, targets=targets, symmetric=True, gather=True)
    loss.backward()
    rows = gather_rows(targets)
    found = {"loss": loss.detach(), "a": a.grad, "b": b.grad, "rows": rows}
    save_file({name: value.contiguous() for name, value in found.items()}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_contrast_as_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_gathered, args=(2, port, str(tmp_path)), nprocs=2)
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    a, b = noise(6, 3).requires_grad_(), noise(6, 3, seed=1).requires_grad_()
    targets = torch.tensor([1, 2, 3, 1, 4, 5])
    loss = pair_nce(a, b, temperature=0.3, targets=targets, symmetric=True)
    loss.backward()
    assert all(torch.equal(part["rows"], targets) for part in parts)
    torch.testing.assert_close(torch.stack([part["loss"] for part in parts]).mean(), loss.detach())
    # each process's rows get the gradient of the sum of both losses; DistributedDataParallel halves it
    torch.testing.assert_close(torch.cat([part["a"] for part in parts]) / 2, a.grad)
    torch.testing.assert_close(torch.cat([part["b"] for part in parts]) / 2, b.grad)


def test_gather_without_processes_is_nothing() -> None:
    a, b = noise(5, 3), noise(5, 3, seed=1)
    assert gather_rows(a) is a
    assert torch.equal(pair_nce(a, b, temperature=0.1, gather=True), pair_nce(a, b, temperature=0.1))


# --------------------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize("form", ["variation", "entropy"])
def test_usage_balance_values_gradient_and_descent(form: str) -> None:
    even = 100 * (1 - torch.eye(4))
    assert float(usage_balance(even, form=form)) == pytest.approx(0, abs=1e-6)
    one_code = torch.cat([torch.zeros(4, 1), torch.full((4, 3), 100.0)], 1)
    assert float(usage_balance(one_code, temperature=0.01, form=form)) == pytest.approx(
        {"variation": 3.0, "entropy": 1.0}[form], rel=1e-5
    )
    # two codes, three points to one: n = (3, 1), mean 2: ((3-2)^2 + (1-2)^2) / 2 / 4 = 1/4; H = .5623 nats
    three = torch.tensor([[0.0, 100], [0, 100], [0, 100], [100, 0]])
    expected = {"variation": 0.25, "entropy": 1 - 0.562335 / math.log(2)}[form]
    assert float(usage_balance(three, temperature=0.01, form=form)) == pytest.approx(expected, rel=1e-4)
    assert float(usage_balance(noise(3, 1).abs(), form=form)) == 0  # one code


def balanced_codes(x: Tensor, start: Tensor, **options) -> Tensor:
    """Codes (C, D) after descending the balance term alone."""
    book = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([book], lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        usage_balance(code_distances(x, book), **options).backward()
        optimiser.step()
    return book.detach()


def test_usage_balance_has_gradient_and_evens_the_hard_counts_out() -> None:
    """Hard counts have no gradient (the trap). Soft ones have; alone they are also even where nothing is decided."""
    x, start = noise(300, 2), noise(6, 2, seed=1) * 0.1 + 1.0

    def spread(book: Tensor) -> float:
        hard = torch.bincount(code_distances(x, book).argmin(1), minlength=6)
        assert not hard.requires_grad
        return float(hard.float().std())

    for form in ("variation", "entropy"):
        sharp = balanced_codes(x, start, form=form, sharpness=0.5)
        assert spread(sharp) < 0.3 * spread(start)
        assert spread(sharp) < 0.5 * spread(balanced_codes(x, start, form=form))


def test_usage_balance_sharpness_is_the_mean_entropy() -> None:
    distance = torch.tensor([[1.0, 3.0], [3.0, 1.0]])  # mean 2, temperature 1/2: weights softmax(-1, -3)
    p = 1 / (1 + math.exp(-2))
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert float(usage_balance(distance, temperature=0.5, sharpness=0.7)) == pytest.approx(0.7 * entropy, rel=1e-5)


def test_usage_balance_bad_options() -> None:
    with pytest.raises(IncompatibleComponentsError, match="form"):
        usage_balance(noise(3, 3).abs(), form="gini")
    with pytest.raises(TrainingError, match="temperature"):
        usage_balance(noise(3, 3).abs(), temperature=0)


# ----------------------------------------------------------------------------------------------------------- diversity


@pytest.mark.parametrize(("codes", "clusters"), [(16, 4), (17, 4), (256, 10), (5, 5), (7, 1)])
def test_code_clusters_are_equal_within_one(codes: int, clusters: int) -> None:
    found = code_clusters(noise(codes, 3), clusters)
    size = torch.bincount(found, minlength=clusters)
    assert len(found) == codes and int(size.max()) - int(size.min()) == (0 if codes % clusters == 0 else 1)
    assert torch.equal(found, code_clusters(noise(codes, 3), clusters))


def test_code_clusters_find_balanced_groups_and_force_the_rest() -> None:
    centres = torch.tensor([[0.0, 0], [50, 0], [0, 50]])
    book = centres.repeat_interleave(4, 0) + noise(12, 2) * 0.1
    found = code_clusters(book, 3).view(3, 4)
    assert bool((found == found[:, :1]).all()) and len(found[:, 0].unique()) == 3
    uneven = torch.cat([book[:2], book[4:8], book[4:8] + 0.01, book[8:10]])  # 2, 8, 2
    assert torch.bincount(code_clusters(uneven, 3)).tolist() == [4, 4, 4]
    with pytest.raises(TrainingError, match="12 codes cannot form 13"):
        code_clusters(book, 13)


def test_diversity_by_hand_and_own_code_masked() -> None:
    book = noise(4, 3).requires_grad_()
    cluster = torch.tensor([0, 0, 1, 2])  # code 0 must find 1, code 1 must find 0; 2 and 3 are alone
    codes = torch.tensor([0, 1, 2, 3, 0])
    loss = diversity(book[codes], codes, book, cluster, temperature=0.5)
    terms = []
    for code, target in ((0, 1), (1, 0), (0, 1)):
        others = [c for c in range(4) if c != code]
        logits = {c: float(book[code] @ book[c]) / 0.5 for c in others}
        terms.append(-logits[target] + math.log(sum(math.exp(value) for value in logits.values())))
    assert float(loss.detach()) == pytest.approx(mean(terms), rel=1e-5)
    loss.backward()
    assert bool((book.grad != 0).any())
    alone = diversity(book[codes], codes, book, torch.arange(4))
    assert float(alone.detach()) == 0 and alone.requires_grad
    draws = {
        float(diversity(book, torch.arange(4), book, torch.zeros(4).long(), generator=g).detach())
        for g in (torch.Generator().manual_seed(seed) for seed in range(8))
    }
    assert len(draws) > 1  # with more than one mate the target is drawn


def test_diversity_separates_clusters() -> None:
    """Descending draws the codes of one cluster together against those of others."""
    book = noise(8, 4, seed=3).requires_grad_()
    cluster, codes = torch.arange(8) // 2, torch.arange(8)
    optimiser = torch.optim.Adam([book], lr=0.05)

    def cosine_gap() -> float:
        cosine = F.normalize(book.detach()) @ F.normalize(book.detach()).t()
        same = (cluster[:, None] == cluster).fill_diagonal_(False)
        other = cluster[:, None] != cluster
        return float(cosine[same].mean() - cosine[other].mean())

    before = cosine_gap()
    for _ in range(60):
        optimiser.zero_grad()
        diversity(book[codes], codes, book, cluster).backward()
        optimiser.step()
    assert cosine_gap() > before + 0.5


# ---------------------------------------------------------------------------------------------------------- separation


def test_orthogonality_by_hand() -> None:
    pair = torch.tensor([[[1.0, 0], [0, 3.0]], [[1.0, 0], [2.0, 0]], [[1.0, 0], [1.0, 1.0]]])
    assert float(orthogonality(pair)) == pytest.approx((0 + 1 + 0.5) / 3, rel=1e-6)
    three = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0]]])  # squared cosines 0, 1/2, 1/2
    assert float(orthogonality(three)) == pytest.approx(1 / 3, rel=1e-6)
    assert float(orthogonality(three[:, :1])) == 0
    outputs = noise(20, 3, 8).requires_grad_()
    optimiser = torch.optim.Adam([outputs], lr=0.05)
    before = float(orthogonality(outputs).detach())
    for _ in range(40):
        optimiser.zero_grad()
        orthogonality(outputs).backward()
        optimiser.step()
    assert float(orthogonality(outputs).detach()) < 0.05 * before
    with pytest.raises(IncompatibleComponentsError, match="items, experts"):
        orthogonality(noise(3, 4))


def test_rotation_gap_is_zero_for_rotations_only() -> None:
    rotation = torch.linalg.qr(noise(5, 5))[0]
    assert float(rotation_gap(rotation)) == pytest.approx(0, abs=1e-10)
    assert float(rotation_gap(2 * torch.eye(5))) == pytest.approx(9.0)  # (4 - 1)^2 on the diagonal
    matrix = noise(4, 4, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(rotation_gap, (matrix,))


# ---------------------------------------------------------------------------------------------------------------- tags


def test_tag_supervision_ce_focal_smoothing_and_missing_tags() -> None:
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    tags = torch.tensor([0, 2, -100])
    assert float(tag_supervision(logits, tags)) == pytest.approx((-math.log(0.7) - math.log(0.25)) / 2, rel=1e-5)
    focal = (0.3**2 * -math.log(0.7) + 0.75**2 * -math.log(0.25)) / 2
    assert float(tag_supervision(logits, tags, gamma=2.0)) == pytest.approx(focal, rel=1e-5)
    smooth = 0.9 * -math.log(0.7) + 0.1 / 3 * -(math.log(0.7) + math.log(0.2) + math.log(0.1))
    assert float(tag_supervision(logits[:1], tags[:1], label_smoothing=0.1)) == pytest.approx(smooth, rel=1e-5)
    both = tag_supervision(logits[:1], tags[:1], label_smoothing=0.1, gamma=2.0)
    assert float(both) == pytest.approx(0.3**2 * smooth, rel=1e-5)
    scores = noise(4, 3).requires_grad_()
    unknown = tag_supervision(scores, torch.full((4,), -100))
    unknown.backward()
    assert float(unknown.detach()) == 0 and float(scores.grad.abs().sum()) == 0
    certain = torch.tensor([[100.0, 0, 0]], requires_grad=True)  # p = 1: the focal factor must not make NaN
    tag_supervision(certain, torch.tensor([0]), gamma=0.5).backward()
    assert bool(torch.isfinite(certain.grad).all())
    inputs = noise(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tag_supervision(z, torch.tensor([0, 1, 2, 0]), gamma=2.0), (inputs,))


def test_tag_hierarchy_adds_its_levels() -> None:
    logits = [noise(5, 3), noise(5, 7, seed=1)]
    tags = torch.tensor([[0, 6], [1, 5], [2, -100], [0, 1], [1, 0]])
    weights = [0.5 / (1 + 0.5 * level) for level in range(2)]
    expected = sum(w * tag_supervision(z, tags[:, level]) for level, (w, z) in enumerate(zip(weights, logits)))
    torch.testing.assert_close(tag_hierarchy(logits, tags, weights=weights), expected)
    torch.testing.assert_close(tag_hierarchy(logits[:1], tags[:, :1]), tag_supervision(logits[0], tags[:, 0]))
    with pytest.raises(IncompatibleComponentsError, match="must agree"):
        tag_hierarchy(logits, tags[:, :1])


# ---------------------------------------------------------------------------------------------------------- uniqueness


def test_uniqueness_counts_colliding_pairs_only() -> None:
    latents = torch.tensor([[1.0, 0], [1.0, 0], [1.0, 1.0], [0, 1.0]], requires_grad=True)
    codes = torch.tensor([[1, 2], [1, 2], [1, 2], [1, 3]])
    root = math.sqrt(0.5)  # cosines of the colliding pairs: 1, .707, .707
    loss = uniqueness(latents, codes, margin=0.5)
    assert float(loss.detach()) == pytest.approx((0.5 + 2 * (root - 0.5)) / 3, rel=1e-5)
    assert float(uniqueness(latents, codes, margin=0.9).detach()) == pytest.approx(0.1 / 3, rel=1e-4)
    loss.backward()
    assert float(latents.grad[3].abs().sum()) == 0 and float(latents.grad[2].abs().sum()) > 0
    distinct = uniqueness(latents, torch.tensor([[1, 2], [1, 1], [2, 2], [1, 3]]), margin=-1.0)
    assert float(distinct.detach()) == 0 and distinct.requires_grad
    same_item = uniqueness(latents, codes, margin=0.5, items_B=torch.tensor([4, 4, 5, 6]))
    assert float(same_item.detach()) == pytest.approx(root - 0.5, rel=1e-5)  # the pair 0-1 is one item twice


# ------------------------------------------------------------------------------------------------------- distributions


def test_divergences_by_hand_and_their_gradients() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.1, 0.9]]), torch.tensor([[0.2, 0.8], [0.1, 0.9]])

    def kl(u: Tensor, v: Tensor) -> float:
        return sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(u, v))

    both = (kl(p[0], q[0]) + kl(q[0], p[0])) / 2  # the second row agrees
    assert float(code_divergence(p.log(), q.log())) == pytest.approx(both, rel=1e-5)
    torch.testing.assert_close(code_divergence(p.log(), q.log()), code_divergence(q.log() + 3, p.log()))
    one = code_divergence(p.log(), q.log(), symmetric=False)
    assert float(one) == pytest.approx(kl(q[0], p[0]) / 2, rel=1e-5)
    torch.testing.assert_close(one, F.kl_div(p.log(), q.log(), log_target=True, reduction="batchmean"))
    assert float(code_divergence(p.log(), p.log())) == 0
    assert float(code_divergence(p.log(), q.log(), temperature=1e6)) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(
        level_divergence([p.log(), p.log()], [q.log(), p.log()]), code_divergence(p.log(), q.log())
    )
    inputs = [noise(3, 4, seed=seed).double().requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(lambda u, v: code_divergence(u, v, temperature=0.7), inputs)
    for wrong in ([], [p]):
        with pytest.raises(IncompatibleComponentsError, match="levels"):
            level_divergence(wrong, [p, p])
    with pytest.raises(IncompatibleComponentsError, match="one shape"):
        code_divergence(p, q[:1])
    with pytest.raises(TrainingError, match="temperature"):
        code_divergence(p, q, temperature=0.0)


def test_etegrec_alignment_is_zero_for_the_item_itself_and_falls_in_training() -> None:
    model, x = rq_vae()
    item = [-distance.detach() for distance in model.level_distances(model(features=x).latents)]
    state = noise(64, 4, seed=7).requires_grad_()

    def sia() -> Tensor:
        return level_divergence([-distance for distance in model.level_distances(state)], item)

    itself = level_divergence([-d for d in model.level_distances(model(features=x).latents)], item)
    assert float(itself.detach()) == pytest.approx(0, abs=1e-6)
    before = float(sia().detach())
    optimiser = torch.optim.Adam([state], lr=0.1)
    for _ in range(40):
        optimiser.zero_grad()
        sia().backward()
        optimiser.step()
    assert float(sia().detach()) < 0.5 * before


def test_mmd_by_hand_limits_and_descent() -> None:
    one, other = torch.tensor([[0.0]]), torch.tensor([[2.0]])
    assert float(mmd(one, other, bandwidths=[1.0])) == pytest.approx(2 - 2 * math.exp(-2), rel=1e-6)
    two_kernels = 2 - math.exp(-2) - math.exp(-0.5)
    assert float(mmd(one, other, bandwidths=[1.0, 2.0])) == pytest.approx(two_kernels, rel=1e-6)
    x, y = noise(30, 3), noise(40, 3, seed=1)
    assert float(mmd(x, x)) == pytest.approx(0, abs=1e-6) and float(mmd(x, y + 2)) > 5 * float(mmd(x, y)) > 0
    x2 = torch.tensor([[0.0], [1.0]])
    unbiased = math.exp(-0.5) + math.exp(-0.5) - 2 * (math.exp(-2) + math.exp(-4.5) + math.exp(-0.5) + math.exp(-2)) / 4
    assert float(mmd(x2, x2 + 2, bandwidths=[1.0], unbiased=True)) == pytest.approx(unbiased, rel=1e-5)
    draws = [float(mmd(noise(20, 2, seed=s), noise(20, 2, seed=100 + s), unbiased=True)) for s in range(60)]
    assert abs(mean(draws)) < 3 * float(torch.tensor(draws).std()) / math.sqrt(60) and min(draws) < 0
    moving = (noise(30, 3, seed=2) + 3).requires_grad_()
    optimiser, before = torch.optim.Adam([moving], lr=0.1), float(mmd(moving, x).detach())
    for _ in range(60):
        optimiser.zero_grad()
        mmd(moving, x).backward()
        optimiser.step()
    assert float(mmd(moving, x).detach()) < 0.2 * before
    with pytest.raises(IncompatibleComponentsError, match="one width"):
        mmd(x, noise(4, 2))
    with pytest.raises(TrainingError, match="2 or more rows"):
        mmd(x[:1], y, unbiased=True)
    with pytest.raises(TrainingError, match="bandwidths"):
        mmd(x, y, bandwidths=[0.0])
