"""RQ-VAE: losses by hand, update rules, identities with k-means, no collapse, Trainer, exact save and resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.identifiers.features import text_features
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
from hf_genrec.identifiers.quantizers.training import FeatureDataset, train_rq_vae


def noise(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def blobs(num: int = 600, dim: int = 24, clusters: int = 12, seed: int = 0) -> torch.Tensor:
    label = torch.randint(0, clusters, (num,), generator=torch.Generator().manual_seed(seed + 1))
    return noise(clusters, dim, seed)[label] * 2 + 0.5 * noise(num, dim, seed + 2) + 3


def small(update: str = "ema", **options) -> RQVAEConfig:
    settings = {"input_size": 24, "hidden_sizes": [32], "latent_size": 8, "codebook_sizes": [16, 8, 4]}
    return RQVAEConfig(**{**settings, "codebook_update": update, **options})


def model_of(config: RQVAEConfig, x: torch.Tensor, seed: int = 0) -> RQVAEModel:
    torch.manual_seed(seed)
    return RQVAEModel(config).initialise_codebooks(x, seed=seed).eval()


def identity_model(update: str, dim: int, sizes: list[int], **options) -> RQVAEModel:
    """Encoder and decoder pass the features through: the quantizer alone is left."""
    config = RQVAEConfig(
        input_size=dim,
        hidden_sizes=[],
        latent_size=dim,
        codebook_sizes=sizes,
        codebook_update=update,
        standardise="none",
        **options,
    )
    model = RQVAEModel(config)
    for half in (model.encoder, model.decoder):
        nn.init.eye_(half[0].weight)
        nn.init.zeros_(half[0].bias)
    return model


# -------------------------------------------------------------------------------------------------------------- config


def test_config_is_strict_and_round_trips(tmp_path: Path) -> None:
    config = small("gradient", commitment_weight=0.5)
    config.save_pretrained(tmp_path)
    assert RQVAEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert (
        small(codebook_sizes=(16, 8, 4), codebook_update="gradient", commitment_weight=0.5).to_dict()
        == config.to_dict()
    )
    assert config.num_levels == 3 and RQVAEConfig().commitment_weight == 0.25
    wrong = [
        {"latent_size": "eight"},
        {"codebook_sizes": 16},
        {"hidden_sizes": ["wide"]},
        {"standardise": 3},
        {"codebook_sizes": []},
        {"codebook_sizes": [4, 0]},
        {"hidden_sizes": [-1]},
        {"codebook_update": "adam"},
        {"standardise": "rows"},
        {"ema_decay": 1.0},
        {"commitment_weight": -1.0},
    ]
    for options in wrong:
        with pytest.raises(Exception, match=next(iter(options))):
            small(**options)


# -------------------------------------------------------------------------------------------------- forward and losses


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_loss_codes_and_reconstruction_by_hand(update: str) -> None:
    x = blobs()
    config = small(update, commitment_weight=0.3, quantization_weight=0.7)
    model = model_of(config, x)
    with torch.no_grad():
        output = model(features=x)
        standard = (x - x.mean(0)) / x.std(0, unbiased=False)
        latents = model.encoder(standard)
        residual, quantized, expected = latents.clone(), torch.zeros_like(latents), 0.0
        for level, codebook in enumerate(model.codebooks):
            codes = torch.cdist(residual.double(), codebook.double()).argmin(1)
            assert torch.equal(output.codes[:, level], codes)
            distance = (residual - codebook[codes]).pow(2).sum(1).mean()
            expected = expected + (0.3 + (update == "gradient")) * distance
            residual, quantized = residual - codebook[codes], quantized + codebook[codes]
        decoded = model.decoder(quantized)
        reconstruction_loss = (decoded - standard).pow(2).mean()
    torch.testing.assert_close(output.reconstruction_loss, reconstruction_loss)
    torch.testing.assert_close(output.quantization_loss, expected / 24)
    torch.testing.assert_close(output.loss, reconstruction_loss + 0.7 * expected / 24)
    torch.testing.assert_close(output.reconstruction, decoded * x.std(0, unbiased=False) + x.mean(0))
    torch.testing.assert_close(model.decode(output.codes), output.reconstruction, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.encode(x), output.codes)
    torch.testing.assert_close(model.transform(x), output.latents)
    assert isinstance(model(features=x, return_dict=False), tuple) and model(features=x, return_loss=False).loss is None


def test_gradients_reach_what_they_should() -> None:
    x = blobs(64)
    for update in ("ema", "gradient"):
        model = model_of(small(update), x).train()
        model(features=x).loss.backward()
        assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.encoder.parameters())
        assert all(float(p.grad.abs().sum()) > 0 for p in model.decoder.parameters())
        names = {name for name, _ in model.named_parameters() if "codebook" in name}
        assert len(names) == (0 if update == "ema" else 3)
    # codebook gradient = sum over its points of 2 (e - r) / (B E): nothing leaks in from elsewhere
    model.zero_grad()
    output = model.eval()(features=x)
    output.loss.backward()
    residual = output.latents.detach()
    for level, layer in enumerate(model.levels):
        expected = torch.zeros_like(layer.codebook)
        expected.index_add_(
            0, output.codes[:, level], 2 * (layer.codebook[output.codes[:, level]] - residual) / 64 / 24
        )
        torch.testing.assert_close(layer.codebook.grad, expected.detach(), atol=1e-6, rtol=1e-4)
        residual = residual - layer.codebook[output.codes[:, level]].detach()


def test_reconstruction_gradient_passes_straight_through() -> None:
    model = identity_model("ema", 3, [4], commitment_weight=0.0).eval()
    model.levels[0].load_codebook(noise(4, 3), torch.full((4,), 0.25))
    x = noise(10, 3, 1).requires_grad_()
    output = model(features=x)
    output.loss.backward()
    quantized = model.codebooks[0][output.codes[:, 0]]
    # d mean (x_hat - x)^2 / dx with x_hat = q + (z - sg z): the decoder path gives +, the target gives -
    torch.testing.assert_close(x.grad, torch.zeros_like(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(output.reconstruction, quantized)


# --------------------------------------------------------------------------------------------------------- update rules


def test_ema_without_memory_is_the_batch_mean() -> None:
    x = noise(200, 3)
    model = identity_model("ema", 3, [8, 4], ema_decay=0.0, dead_code_interval=0)
    model.levels[0].load_codebook(noise(8, 3, 1), torch.full((8,), 1 / 8))
    far = torch.cat([noise(3, 3, 2), torch.full((1, 3), 99.0)])
    model.levels[1].load_codebook(far, torch.full((4,), 1 / 4))
    before = [book.clone() for book in model.codebooks]
    codes = model.train()(features=x).codes
    residual = x
    for level in range(2):
        for code in range(len(before[level])):
            members = codes[:, level] == code
            expected = residual[members].mean(0) if members.any() else before[level][code]  # unused: stays
            torch.testing.assert_close(model.codebooks[level][code], expected, atol=1e-5, rtol=1e-5)
        residual = residual - before[level][codes[:, level]]
    assert not (codes[:, 1] == 3).any()


def test_ema_with_memory_is_the_recursion() -> None:
    model = identity_model("ema", 2, [3], ema_decay=0.9, dead_code_interval=0).train()
    model.levels[0].load_codebook(noise(3, 2, 5), torch.full((3,), 1 / 3))
    share, total = model.levels[0].share.clone(), model.levels[0].sum.clone()
    for step in range(4):
        x = noise(50, 2, 10 + step)
        codes = model(features=x).codes[:, 0]
        for code in range(3):
            share[code] = 0.9 * share[code] + 0.1 * (codes == code).float().mean()
            total[code] = 0.9 * total[code] + 0.1 * x[codes == code].sum(0) / 50
    torch.testing.assert_close(model.codebooks[0], total / share[:, None], atol=1e-5, rtol=1e-5)


def test_identity_encoder_and_no_memory_is_kmeans() -> None:
    x = noise(400, 4)
    model = identity_model("ema", 4, [10], ema_decay=0.0, dead_code_interval=0)
    model.initialise_codebooks(x, seed=3, iterations=1)
    for _ in range(60):
        model.train()(features=x)
    lloyd = ResidualKMeans([10], seed=3, iterations=60).fit(x)
    torch.testing.assert_close(model.codebooks[0], lloyd.codebooks[0] + x.mean(0), atol=1e-3, rtol=0)
    initial = identity_model("ema", 4, [10, 6]).initialise_codebooks(x, seed=3)
    residual = ResidualKMeans([10, 6], seed=3).fit(x)  # the same start, up to the centring
    assert (initial.encode(x) == residual.encode(x)).float().mean() > 0.99


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_come_back(update: str) -> None:
    x = noise(256, 3)
    model = identity_model(update, 3, [16], dead_code_interval=2)
    model.levels[0].load_codebook(torch.cat([noise(2, 3, 1), torch.full((14, 3), 50.0)]), torch.full((16,), 1 / 16))
    assert len(model.encode(x).unique()) <= 2
    model.train()(features=x)
    assert len(model.encode(x).unique()) <= 2
    model(features=x)  # the second step looks for dead codes
    assert len(model.encode(x).unique()) == 16
    assert int(model.levels[0].usage.sum()) == 0 and int(model.levels[0].steps) == 2
    asleep = identity_model(update, 3, [16], dead_code_interval=0)
    asleep.levels[0].load_codebook(torch.cat([noise(2, 3, 1), torch.full((14, 3), 50.0)]), torch.full((16,), 1 / 16))
    for _ in range(5):
        asleep.train()(features=x)
    assert len(asleep.encode(x).unique()) <= 2


def test_a_batch_smaller_than_the_dead_codes() -> None:
    model = identity_model("ema", 3, [16], dead_code_interval=1).train()
    model(features=noise(2, 3))
    assert torch.isfinite(model.codebooks[0]).all()


def test_evaluation_and_encoding_change_nothing() -> None:
    x = blobs()
    model = model_of(small(dropout=0.5, dead_code_interval=1), x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(features=x)
    codes = model.train().encode(x)
    assert model.training and torch.equal(model.encode(x, batch_size=7), codes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------- standardisation and input


@pytest.mark.parametrize("mode", ["column", "global", "none"])
def test_standardisation(mode: str) -> None:
    x = blobs() * torch.linspace(1, 5, 24)
    x[:, 3] = 2.0
    model = model_of(small(standardise=mode), x)
    scaled = model.scaler(x)
    torch.testing.assert_close(model.scaler.invert(scaled), x, atol=1e-4, rtol=1e-4)
    if mode == "none":
        assert torch.equal(scaled, x)
        return
    torch.testing.assert_close(scaled.mean(0), torch.zeros(24), atol=1e-5, rtol=0)
    variance = scaled.var(0, unbiased=False)
    if mode == "column":
        torch.testing.assert_close(variance, (torch.arange(24) != 3).float(), atol=1e-4, rtol=0)
    else:
        assert float(variance.mean()) == pytest.approx(1, abs=1e-4) and float(variance.max() / variance.min()) > 5


def test_bad_input_is_named() -> None:
    x = blobs()
    with pytest.raises(TrainingError, match="10 items cannot fill a codebook of 16"):
        RQVAEModel(small()).initialise_codebooks(x[:10])
    model = model_of(small(), x)
    with pytest.raises(IncompatibleComponentsError, match=r"\(items, 24\)"):
        model.encode(noise(3, 5))
    with pytest.raises(IncompatibleComponentsError, match=r"1\.\.3"):
        model.decode(np.zeros((2, 4), dtype=int))
    broken = x.clone()
    broken[5, 0] = float("inf")
    with pytest.raises(TrainingError, match="row 5"):
        train_rq_vae(broken, small(), max_steps=1, progress=False)


# ----------------------------------------------------------------------------------------------------- save and Trainer


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_saved_models_give_identical_codes(tmp_path: Path, update: str) -> None:
    x = blobs()
    model = train_rq_vae(x, small(update), max_steps=15, progress=False)
    model.save_pretrained(tmp_path)
    loaded, info = RQVAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.encode(x), model.encode(x))
    saved, restored = model.state_dict(), loaded.state_dict()
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[name], restored[name]) and saved[name].dtype == restored[name].dtype for name in saved)
    persistent = {name for name, _ in loaded.named_buffers()}
    assert persistent <= set(restored)  # a buffer that is not saved holds garbage after loading
    loaded.save_pretrained(tmp_path / "again")
    first, second = tmp_path / "model.safetensors", tmp_path / "again" / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()


def test_auto_classes_open_it_once_registered(tmp_path: Path) -> None:
    AutoConfig.register("rq_vae", RQVAEConfig, exist_ok=True)
    AutoModel.register(RQVAEConfig, RQVAEModel, exist_ok=True)
    x = blobs()
    model = model_of(small(), x)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, RQVAEModel) and torch.equal(loaded.encode(x), model.encode(x))


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_training_learns_repeats_and_leaves_the_global_random_state(update: str) -> None:
    x = blobs()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    model = train_rq_vae(x, small(update), seed=4, max_steps=60, batch_size=128, progress=False)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    with torch.no_grad():
        before, after = model_of(small(update), x, seed=4)(features=x), model(features=x)
    assert float(after.reconstruction_loss) < 0.7 * float(before.reconstruction_loss)
    again = train_rq_vae(x.numpy(), small(update), seed=4, max_steps=60, batch_size=128, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    other = train_rq_vae(x, small(update), seed=5, max_steps=60, batch_size=128, progress=False)
    assert not torch.equal(model.encode(x), other.encode(x))


def test_the_standard_output_stays_clean(capsys: pytest.CaptureFixture) -> None:
    for progress in (True, False):
        train_rq_vae(blobs(), small(), max_steps=2, progress=progress)
        captured = capsys.readouterr()
        assert captured.out == "" and ("2/2" in captured.err) == progress


def arguments(folder: Path, **options) -> TrainingArguments:
    settings = {"max_steps": 20, "per_device_train_batch_size": 64, "learning_rate": 1e-3, "report_to": "none"}
    return TrainingArguments(output_dir=str(folder), disable_tqdm=True, seed=1, **{**settings, **options})


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_resume_is_exact(tmp_path: Path, update: str) -> None:
    x, config = blobs(), small(update, dead_code_interval=3, dropout=0.1)
    args = arguments(tmp_path, save_steps=10)
    whole = train_rq_vae(x, config, args, seed=1)
    assert args.remove_unused_columns  # the caller's object is left alone
    resumed = train_rq_vae(x, config, args, seed=1, resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_a_plain_trainer_trains_it(tmp_path: Path) -> None:
    x = blobs()
    model = model_of(small(), x)
    before = float(model(features=x).loss.detach())
    trainer = Trainer(model=model, args=arguments(tmp_path, save_strategy="no"), train_dataset=FeatureDataset(x[:, :]))
    assert not trainer.model_accepts_loss_kwargs  # the loss is a mean: Trainer must divide by accumulation steps
    trainer.data_collator = lambda batch: (
        batch if isinstance(batch, dict) else {"features": torch.stack([row["features"] for row in batch])}
    )
    trainer.args.remove_unused_columns = False
    trainer.train()
    assert float(model.eval()(features=x).loss.detach()) < before


def test_a_loss_that_is_not_finite_stops_training() -> None:
    with pytest.raises(TrainingError, match=r"RQ-VAE loss is .* at step"):
        train_rq_vae(blobs(), small("gradient"), max_steps=50, learning_rate=1e30, progress=False)


# ------------------------------------------------------------------------------------------------------------- collapse


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_no_collapse_on_clusters(update: str) -> None:
    x = blobs(num=1000, clusters=40)
    model = train_rq_vae(x, small(update, codebook_sizes=[32, 32, 32]), max_steps=150, batch_size=256, progress=False)
    health = identifier_health(model.encode(x), (32, 32, 32), x)
    assert min(health.utilisation) >= 0.9, health
    assert min(health.perplexity) >= 16
    assert health.neighbour_hit_rate > 5 * health.neighbour_hit_chance


@pytest.mark.slow
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_no_collapse_on_movielens_text(ml100k_dir: Path, minilm_dir: Path, update: str) -> None:
    rows = [line.split("\t") for line in (ml100k_dir / "ml-100k.item").read_text("utf-8").splitlines()[1:]]
    features = text_features([f"{title} ({year}) {genres}" for _, title, year, genres in rows], progress=False)
    for seed in range(5):
        config = RQVAEConfig(input_size=features.shape[1], codebook_update=update)
        model = train_rq_vae(features, config, seed=seed, max_steps=400, progress=False)
        health = identifier_health(model.encode(features), config.codebook_sizes, features)
        assert min(health.utilisation) >= 0.9, (seed, str(health))
        assert health.items_sharing < 150, (seed, str(health))  # 36 films have the same text as another
