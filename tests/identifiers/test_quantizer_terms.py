"""Loss terms of learned quantizers: weight 0 is the plain quantizer to the bit, each term does what its paper claims."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.losses import pair_nce
from hf_genrec.identifiers.quantizers.configuration_fsq import FSQConfig
from hf_genrec.identifiers.quantizers.configuration_multi_head_vq import MultiHeadVQConfig
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.fsq import FSQModel
from hf_genrec.identifiers.quantizers.multi_head_vq import MultiHeadVQModel
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
from hf_genrec.identifiers.quantizers.terms import ItemPairs, LossTerm, QuantizerWithTerms, Step
from hf_genrec.identifiers.quantizers.terms_codes import Diversity, Orthogonality, Uniqueness, UsageBalance
from hf_genrec.identifiers.quantizers.terms_contrast import (
    Collaborative,
    CooccurrenceContrast,
    Distillation,
    DistributionMatch,
    PrefixContrast,
    ReconstructionContrast,
)
from hf_genrec.identifiers.quantizers.training import train_fsq, train_rq_vae

NUM, DIM = 300, 24


def noise(num: int, dim: int, seed: int) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def manifold(num: int = NUM, dim: int = DIM, seed: int = 0) -> Tensor:
    """Points of a curved four-dimensional surface: neighbourhoods mean something."""
    return torch.tanh(noise(num, 4, seed) @ noise(4, 32, seed + 1)) @ noise(32, dim, seed + 2) / 5.6


def small(**options) -> RQVAEConfig:
    settings = {"input_size": DIM, "hidden_sizes": [32], "latent_size": 8, "codebook_sizes": [16, 16, 16]}
    return RQVAEConfig(**settings | options)


def fit(
    x: Tensor, terms: dict[str, LossTerm], steps: int = 120, seed: int = 0, lr: float = 3e-3, **options
) -> RQVAEModel:
    """Full-batch Adam, without the cost of Trainer."""
    torch.manual_seed(seed)
    kmeans_init = options.pop("kmeans_init", True)
    model = RQVAEModel(small(**options)).initialise_codebooks(x, seed=seed, kmeans_init=kmeans_init)
    whole = QuantizerWithTerms(model, {name: term for name, term in terms.items() if term.weight}, x, 1).train()
    optimiser = torch.optim.Adam(whole.parameters(), lr=lr)
    for _ in range(steps):
        loss = whole(x, torch.arange(len(x))).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def step_of(model, x: Tensor) -> Step:
    return Step(model, model(features=x), x, torch.arange(len(x)), x)


def chain(num: int = NUM) -> ItemPairs:
    """Items 2 i and 2 i + 1 co-occur, and no others."""
    first = np.arange(0, num, 2)  # pairs (0, 1), (2, 3), ...
    counts = sp.coo_matrix((np.ones(len(first)), (first, first + 1)), shape=(num, num))
    return ItemPairs(counts + counts.T)


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_weight_0_is_the_plain_rq_vae_bit_for_bit(update) -> None:
    x, options = manifold(), {"seed": 3, "max_steps": 12, "batch_size": 100, "progress": False}
    terms = {
        "collaborative": Collaborative(0.0, manifold(dim=8, seed=9)),
        "diversity": Diversity(0.0),  # with moving averages it would be refused
        "contrast": ReconstructionContrast(0.0),
    }
    plain = train_rq_vae(x, small(codebook_update=update), **options)
    without = train_rq_vae(x, small(codebook_update=update), terms=terms, **options)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name
    terms["collaborative"].weight = 0.1
    other = train_rq_vae(x, small(codebook_update=update), terms=terms, **options)
    assert not torch.equal(plain.encoder[0].weight, other.encoder[0].weight)


def test_the_loss_is_the_weighted_sum() -> None:
    x, cf = manifold(), manifold(dim=8, seed=9)
    torch.manual_seed(0)
    model = RQVAEModel(small()).initialise_codebooks(x).eval()
    terms = {"a": Collaborative(0.3, cf), "b": ReconstructionContrast(2.0, temperature=0.2)}
    output = QuantizerWithTerms(model, terms, x, 1).eval()(x, torch.arange(len(x)))
    plain = model(features=x)
    first = pair_nce(plain.quantized, cf, temperature=1.0, similarity="dot")
    second = pair_nce(model.scaler(plain.reconstruction), model.scaler(x), temperature=0.2)
    wanted = plain.loss + 0.3 * first + 2.0 * second
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert terms["a"].last_value == pytest.approx(float(first), rel=1e-6)


def test_reconstruction_weight() -> None:
    x = manifold()
    model = RQVAEModel(small(reconstruction_weight=0.0)).initialise_codebooks(x).eval()
    output = model(features=x)
    assert float(output.loss) == pytest.approx(float(output.quantization_loss))
    model.config.reconstruction_weight = 1.0
    output = model(features=x)
    assert torch.equal(output.loss, output.reconstruction_loss + output.quantization_loss)


def test_a_second_view_leaves_the_codebooks_alone() -> None:
    x = manifold()
    model = RQVAEModel(small()).initialise_codebooks(x).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(features=x, update_codebooks=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(features=x)
    assert not torch.equal(model.levels[0].codebook, before["levels.0.codebook"])


def test_passed_vectors_carry_gradient_to_the_encoder_and_to_trained_codebooks() -> None:
    x = manifold()
    for update, trained in (("ema", False), ("gradient", True)):
        model = RQVAEModel(small(codebook_update=update)).initialise_codebooks(x).train()
        output = model(features=x)
        passed = model.passed_vectors(output)
        assert all(torch.equal(a, b) for a, b in zip(passed, output.code_vectors))
        sum(vectors_BP.sum() for vectors_BP in passed).backward()
        assert float(model.encoder[0].weight.grad.abs().sum()) > 0
        assert (model.levels[1].codebook.grad is not None) == trained


# --------------------------------------------------------------------------------------------------------------- pairs


def test_partners_are_drawn_in_proportion_to_the_counts() -> None:
    torch.manual_seed(0)
    pairs = ItemPairs(sp.csr_matrix([[7.0, 3.0, 1.0, 0], [3.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 5.0]]))
    partners, known = pairs.draw(torch.zeros(4000, dtype=torch.int64))
    assert bool(known.all()) and set(partners.tolist()) == {1, 2}
    assert float((partners == 1).float().mean()) == pytest.approx(0.75, abs=0.03)
    partners, known = pairs.draw(torch.tensor([1, 2, 3]))
    assert partners.tolist() == [0, 0, 3] and known.tolist() == [True, True, False]
    with pytest.raises(TrainingError, match="co-occur"):
        ItemPairs(sp.identity(3))


def test_cooccurring_items_come_together_under_the_contrast() -> None:
    x = manifold()
    near = {}
    for weight in (0.0, 1.0):
        model = fit(x, {"i2i": CooccurrenceContrast(weight, chain())}, steps=80)
        with torch.no_grad():
            z = model(features=x).quantized
        near[weight] = float(torch.cosine_similarity(z[0::2], z[1::2]).mean())
    assert near[1.0] > near[0.0] + 0.2


def test_forge_is_the_mean_of_its_three_views() -> None:
    x = manifold()
    torch.manual_seed(0)
    model = RQVAEModel(small()).initialise_codebooks(x).eval()
    step, names = step_of(model, x), ("reconstruction", "input", "own_input")
    alone = [float(CooccurrenceContrast(1, chain(), views=[name])(step)) for name in names]
    together = CooccurrenceContrast(1, chain(), views=names, learn_temperature=True)
    assert float(together(step)) == pytest.approx(np.mean(alone), rel=1e-6)
    together(step).backward()
    assert float(together.log_temperature.grad.abs().min()) > 0
    with pytest.raises(IncompatibleComponentsError, match="views"):
        CooccurrenceContrast(1, chain(), views=["nothing"])


def test_prefix_contrast_draws_prefixes_together_and_needs_ordered_codes() -> None:
    x = manifold()
    near = {}
    for weight in (0.0, 1.0):
        first = step_of(fit(x, {"prefix": PrefixContrast(weight, chain())}, steps=60), x).output.code_vectors[0]
        near[weight] = float(torch.cosine_similarity(first[0::2], first[1::2]).mean())
    assert near[1.0] > near[0.0] + 0.3
    parallel = MultiHeadVQModel(
        MultiHeadVQConfig(input_size=DIM, hidden_sizes=[], latent_size=4, codebook_sizes=[4, 4])
    )
    with pytest.raises(IncompatibleComponentsError, match=r"'prefix'.*ordered"):
        QuantizerWithTerms(parallel, {"prefix": PrefixContrast(1.0, chain())}, x, 1)


# -------------------------------------------------------------------------------------------------------------- LETTER


def test_letter_cosine_with_collaborative_vectors_rises_with_alpha() -> None:
    x = manifold()
    cf = x[:, :8] + 0.5 * manifold(dim=8, seed=77)
    cosine = []
    for alpha in (0.0, 0.1, 1.0):
        model = fit(x, {"collaborative": Collaborative(alpha, cf)})
        with torch.no_grad():
            cosine.append(float(torch.cosine_similarity(model(features=x).quantized, cf).mean()))
    assert cosine[0] < cosine[1] < cosine[2] and cosine[2] > 0.5


def collapsed_counts(terms: dict[str, LossTerm]) -> Tensor:
    """Items per code after training codes that start far from all items: without a remedy the first winner takes all."""
    x = noise(NUM, 4, 0) + torch.tensor([4.0, 2.0, 2.0, 2.0])
    torch.manual_seed(0)
    sizes = {"input_size": 4, "hidden_sizes": [], "latent_size": 4, "codebook_sizes": [16]}
    model = RQVAEModel(small(**sizes, codebook_update="gradient", standardise="none", dead_code_interval=0))
    for half in (model.encoder, model.decoder):
        nn.init.eye_(half[0].weight)
        nn.init.zeros_(half[0].bias)
    whole = QuantizerWithTerms(model, terms, x, 1).train()
    optimiser = torch.optim.Adam(model.levels.parameters(), lr=2e-2)
    for _ in range(150):
        loss = whole(x, torch.arange(NUM)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return torch.bincount(model.eval().encode(x)[:, 0], minlength=16).float()


def test_letter_diversity_evens_out_a_collapsed_codebook() -> None:
    """Codes that nothing uses have no other gradient; a code that is used draws those of its cluster near."""
    plain = collapsed_counts({})
    diverse = collapsed_counts({"diversity": Diversity(1e-3, clusters=4, every=10)})
    assert float(diverse.var()) < 0.6 * float(plain.var())


def test_usage_balance_evens_out_a_collapsed_codebook() -> None:
    plain, even = collapsed_counts({}), collapsed_counts({"usage": UsageBalance(1.0)})
    assert int((plain > 0).sum()) < 8 and int((even > 0).sum()) == 16
    assert float(even.std()) < 0.3 * float(plain.std())


def test_diversity_refuses_codebooks_without_gradient() -> None:
    x = manifold()
    with pytest.raises(IncompatibleComponentsError, match=r"'diversity'.*gradient"):
        QuantizerWithTerms(RQVAEModel(small()), {"diversity": Diversity(1.0)}, x, 1)
    grid = FSQModel(FSQConfig(input_size=DIM, hidden_sizes=[], scalar_levels=[[3, 3]]))
    with pytest.raises(IncompatibleComponentsError, match="gradient"):
        QuantizerWithTerms(grid, {"diversity": Diversity(1.0)}, x, 1)


def test_diversity_makes_its_clusters_anew_each_epoch() -> None:
    x = manifold()
    model = RQVAEModel(small(codebook_update="gradient")).initialise_codebooks(x).train()
    term = Diversity(1.0, clusters=4)
    whole = QuantizerWithTerms(model, {"diversity": term}, x, steps_per_epoch=25)
    whole(x, torch.arange(NUM))
    sizes = torch.bincount(term.cluster_0)
    assert term.every == 25 and int(sizes.max() - sizes.min()) <= 1
    term.cluster_0.zero_()
    whole(x, torch.arange(NUM))
    assert int(term.cluster_0.max()) == 0  # the second step of the epoch keeps them
    term.steps.fill_(25)
    whole(x, torch.arange(NUM))
    assert int(term.cluster_0.max()) == 3


def test_collaborative_vectors_are_matched_to_the_latent() -> None:
    x, wide = manifold(), manifold(dim=20, seed=5)
    term = Collaborative(1.0, wide)
    QuantizerWithTerms(RQVAEModel(small()), {"c": term}, x, 1)
    assert term.vectors.shape == (NUM, 8)
    with pytest.raises(IncompatibleComponentsError, match="4 dimensions"):
        QuantizerWithTerms(RQVAEModel(small()), {"c": Collaborative(1.0, wide[:, :4])}, x, 1)


# ---------------------------------------------------------------------------------------------------------------- CoST


def _neighbours(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    return (unit @ unit.t()).fill_diagonal_(-2).topk(10).indices


def test_cost_keeps_more_neighbours_than_the_squared_error_alone() -> None:
    x = manifold(400)
    wanted, overlap, collisions = _neighbours(x), {}, {}
    for weight in (0.0, 0.1):
        shares, colliding = [], []
        for seed in (0, 1):
            model = fit(x, {"cost": ReconstructionContrast(weight)}, steps=150, seed=seed)
            with torch.no_grad():
                found = _neighbours(model(features=x).reconstruction)
            shares.append(float((wanted[:, :, None] == found[:, None]).any(2).float().mean()))
            colliding.append(identifier_health(model.encode(x), [16] * 3).collision_rate)
        overlap[weight], collisions[weight] = np.mean(shares), np.mean(colliding)
    assert overlap[0.1] > overlap[0.0] + 0.01
    assert collisions[0.1] < collisions[0.0] + 0.05  # at about equal collision rate


# --------------------------------------------------------------------------------------------------- HiD-VAE---------


def test_uniqueness_is_exactly_0_without_a_collision_and_lowers_the_collision_rate() -> None:
    x = manifold(150)
    x = torch.cat([x, x + 0.05 * noise(150, DIM, 9)])  # every item has a near twin
    model = RQVAEModel(small()).initialise_codebooks(x).eval()
    codes = model.encode(x).numpy()
    alone = torch.as_tensor(np.unique(codes, axis=0, return_index=True)[1])
    assert float(Uniqueness(1.0, margin=-1.0)(step_of(model, x[alone]))) == 0.0
    rate = {
        weight: identifier_health(
            fit(x, {"u": Uniqueness(weight, margin=0.5)}, steps=150).encode(x), [16] * 3
        ).collision_rate
        for weight in (0.0, 10.0)
    }
    assert rate[10.0] < rate[0.0] - 0.05


# ------------------------------------------------------------------------------------------------- parallel, alignment


def test_orthogonality_turns_heads_apart() -> None:
    x = manifold()
    config = MultiHeadVQConfig(input_size=DIM, hidden_sizes=[32], latent_size=6, codebook_sizes=[8, 8, 8])
    cosine = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = MultiHeadVQModel(config).initialise_codebooks(x).train()
        terms = {"orthogonality": Orthogonality(weight)} if weight else {}
        whole = QuantizerWithTerms(model, terms, x, 1)
        optimiser = torch.optim.Adam(whole.parameters(), lr=3e-3)
        for _ in range(60):
            loss = whole(x, torch.arange(NUM)).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        cosine[weight] = float(Orthogonality(1.0)(step_of(model.eval(), x)))
    assert cosine[1.0] < 0.6 * cosine[0.0]
    with pytest.raises(IncompatibleComponentsError, match="parallel heads"):
        QuantizerWithTerms(RQVAEModel(small()), {"o": Orthogonality(1.0)}, x, 1)


def test_distillation_and_mmd_are_0_where_latents_are_the_vectors() -> None:
    x = manifold()
    model = RQVAEModel(small()).initialise_codebooks(x).eval()
    step = step_of(model, x)
    own = step.quantized_BQ.detach()
    assert float(Distillation(1.0, own)(step)) == pytest.approx(0.0, abs=1e-6)
    assert float(DistributionMatch(1.0, own)(step)) == pytest.approx(0.0, abs=1e-6)
    other = manifold(dim=8, seed=31)
    before = float(Distillation(1.0, other)(step))
    trained = fit(x, {"kl": Distillation(1.0, other)}, steps=60)
    assert float(Distillation(1.0, other)(step_of(trained, x))) < before


# ------------------------------------------------------------------------------------------------------------- Trainer


def _arguments(folder, **options) -> TrainingArguments:
    settings = {"max_steps": 12, "per_device_train_batch_size": 100, "learning_rate": 3e-3, "report_to": "none"}
    settings |= {"save_strategy": "steps", "save_steps": 6, "disable_tqdm": True, "seed": 1}
    return TrainingArguments(output_dir=str(folder), **settings | options)


def test_a_resumed_run_with_terms_ends_with_the_same_bits(tmp_path) -> None:
    x, config = manifold(), small(codebook_update="gradient")

    def terms() -> dict[str, LossTerm]:
        i2i = CooccurrenceContrast(0.5, chain(), learn_temperature=True)
        return {"i2i": i2i, "diversity": Diversity(0.1, clusters=4, every=5)}

    whole_terms = terms()
    whole = train_rq_vae(x, config, _arguments(tmp_path / "a"), terms=whole_terms)
    assert (tmp_path / "a" / "checkpoint-6").is_dir()
    again_terms = terms()
    checkpoint = str(tmp_path / "a" / "checkpoint-6")
    again = train_rq_vae(x, config, _arguments(tmp_path / "b"), terms=again_terms, resume_from_checkpoint=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(whole_terms["i2i"].log_temperature, again_terms["i2i"].log_temperature)
    assert float(whole_terms["i2i"].log_temperature.exp()) != pytest.approx(0.07, rel=1e-4)


def test_fsq_trains_with_terms() -> None:
    x = manifold()
    config = FSQConfig(input_size=DIM, hidden_sizes=[32], scalar_levels=[[5, 3], [4, 4]])
    term = ReconstructionContrast(0.5)
    model = train_fsq(
        x, config, max_steps=100, batch_size=100, learning_rate=1e-2, progress=False, terms={"cost": term}
    )
    codes = model.encode(x)
    assert codes.shape == (NUM, 2) and int(codes[:, 0].max()) < 15 and not model.training
    error = float((model.decode(codes) - x).pow(2).mean() / x.var())
    assert error < 0.8 and term.last_value is not None
