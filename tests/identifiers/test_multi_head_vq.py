"""Multi-head VQ-VAE: losses by hand, independent heads, identities with k-means and RQ-VAE, collisions, save and resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, TrainingArguments

from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.identifiers.collisions import resolve_collisions
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.quantizers.configuration_multi_head_vq import MultiHeadVQConfig
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.kmeans import kmeans
from hf_genrec.identifiers.quantizers.multi_head_vq import MultiHeadVQModel
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
from hf_genrec.identifiers.quantizers.training import train_multi_head_vq, train_rq_vae

HEADS = [16, 8, 4]


def noise(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def blobs(num: int = 600, dim: int = 24, clusters: int = 12, seed: int = 0) -> torch.Tensor:
    label = torch.randint(0, clusters, (num,), generator=torch.Generator().manual_seed(seed + 1))
    return noise(clusters, dim, seed)[label] * 2 + 0.5 * noise(num, dim, seed + 2) + 3


def small(update: str = "ema", **options) -> MultiHeadVQConfig:
    settings = {"input_size": 24, "hidden_sizes": [32], "latent_size": 6, "codebook_sizes": HEADS}
    return MultiHeadVQConfig(**{**settings, "codebook_update": update, **options})


def model_of(config: MultiHeadVQConfig, x: torch.Tensor, seed: int = 0) -> MultiHeadVQModel:
    torch.manual_seed(seed)
    return MultiHeadVQModel(config).initialise_codebooks(x, seed=seed).eval()


def identity_model(sizes: list[int], width: int, **options) -> MultiHeadVQModel:
    """Encoder and decoder pass the features through: the quantizer alone is left."""
    total = width * len(sizes)
    config = MultiHeadVQConfig(
        input_size=total, hidden_sizes=[], latent_size=width, codebook_sizes=sizes, standardise="none", **options
    )
    model = MultiHeadVQModel(config)
    for half in (model.encoder, model.decoder):
        nn.init.eye_(half[0].weight)
        nn.init.zeros_(half[0].bias)
    return model


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_loss_codes_and_reconstruction_by_hand(update: str) -> None:
    x = blobs()
    model = model_of(small(update, commitment_weight=0.3, quantization_weight=0.7), x)
    with torch.no_grad():
        output = model(features=x)
        standard = (x - x.mean(0)) / x.std(0, unbiased=False)
        latents = model.encoder(standard)
        assert latents.shape == (600, 18)
        parts, expected = [], 0.0
        for head, codebook in enumerate(model.codebooks):
            part = latents[:, 6 * head : 6 * head + 6]
            codes = torch.cdist(part.double(), codebook.double()).argmin(1)
            assert torch.equal(output.codes[:, head], codes)
            expected = expected + (0.3 + (update == "gradient")) * (part - codebook[codes]).pow(2).sum(1).mean()
            parts.append(codebook[codes])
        decoded = model.decoder(torch.cat(parts, 1))
    torch.testing.assert_close(output.reconstruction_loss, (decoded - standard).pow(2).mean())
    torch.testing.assert_close(output.quantization_loss, expected / 24)
    torch.testing.assert_close(output.loss, output.reconstruction_loss + 0.7 * expected / 24)
    torch.testing.assert_close(model.decode(output.codes), output.reconstruction, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.encode(x), output.codes)


def test_heads_do_not_depend_on_each_other() -> None:
    """No residual order: another codebook at one head changes that head's codes only, and its gradient stays there."""
    x = blobs()
    model = model_of(small("gradient"), x)
    before = model.encode(x)
    with torch.no_grad():
        model.levels[0].codebook.copy_(noise(16, 6, 9))
    after = model.encode(x)
    assert not torch.equal(after[:, 0], before[:, 0]) and torch.equal(after[:, 1:], before[:, 1:])
    _, _, loss = model.levels[1](model.transform(x)[:, 6:12])
    loss.backward()
    touched = {name for name, value in model.named_parameters() if value.grad is not None and bool(value.grad.any())}
    assert touched == {"levels.1.codebook"}
    # a residual quantizer fails this: its later codes change with the earlier codebook
    residual = RQVAEModel(RQVAEConfig(input_size=24, hidden_sizes=[32], latent_size=6, codebook_sizes=HEADS))
    residual.initialise_codebooks(x).eval()
    first = residual.encode(x)
    with torch.no_grad():
        residual.levels[0].codebook.copy_(noise(16, 6, 9))
    assert not torch.equal(residual.encode(x)[:, 1:], first[:, 1:])


def test_the_start_is_kmeans_on_each_sub_vector() -> None:
    x = noise(400, 8)
    model = identity_model([10, 6], 4).initialise_codebooks(x, seed=3)
    generator = torch.Generator().manual_seed(3)
    for head, size in enumerate((10, 6)):
        result = kmeans(x[:, 4 * head : 4 * head + 4], size, generator=generator)
        torch.testing.assert_close(model.codebooks[head], result.centroids_CD)
        assert torch.equal(model.encode(x)[:, head], result.codes_N)


def test_one_head_is_an_rq_vae_of_one_level() -> None:
    x = blobs()
    settings = {"input_size": 24, "hidden_sizes": [16], "latent_size": 6, "codebook_sizes": [16]}
    training = {"seed": 2, "max_steps": 20, "batch_size": 128, "learning_rate": 1e-3, "progress": False}
    ours = train_multi_head_vq(x, MultiHeadVQConfig(**settings), **training)
    theirs = train_rq_vae(x, RQVAEConfig(**settings), **training)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_padded_codebooks_serve_the_collision_policy() -> None:
    """The sum of the padded code vectors is the quantized latent, and colliding items move to the nearest free code."""
    x = blobs(num=300)
    model = model_of(small(codebook_sizes=[8, 8, 8]), x)
    codes, latents = model.encode(x), model.transform(x)
    books = model.padded_codebooks()
    quantized = sum(book[codes[:, head]] for head, book in enumerate(books))
    parts = torch.cat([book[codes[:, head]] for head, book in enumerate(model.codebooks)], 1)
    torch.testing.assert_close(quantized, parts)
    assert len(codes.unique(dim=0)) < 300
    unique, sizes = resolve_collisions(codes, (8, 8, 8), "next_nearest", codebooks=books, features=latents)
    assert sizes == (8, 8, 8) and len(np.unique(unique, axis=0)) == 300
    moved = np.flatnonzero((unique != codes.numpy()).any(1))
    assert 0 < len(moved) < 300
    last_only = (unique[moved][:, :2] == codes.numpy()[moved][:, :2]).all(1)
    assert last_only.any()
    nearest_free = 0
    for item in moved[last_only]:  # the nearest last code whose full code somebody else does not hold by right
        distance = (latents[item, 12:] - model.codebooks[2]).pow(2).sum(1)
        better = (distance < distance[unique[item, 2]]).nonzero().flatten().tolist()
        others = {tuple(row) for index, row in enumerate(unique.tolist()) if index != item}
        assert all((*unique[item, :2].tolist(), code) in others for code in better)
        nearest_free += 1
    assert nearest_free == int(last_only.sum())


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_training_learns_repeats_and_uses_all_codes(update: str) -> None:
    x = blobs(num=1000, clusters=40)
    config = small(update, codebook_sizes=[32, 32, 32])
    torch.manual_seed(11)
    state = torch.get_rng_state()
    options = {"max_steps": 150, "batch_size": 256, "learning_rate": 3e-3, "progress": False}
    model = train_multi_head_vq(x, config, seed=4, **options)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    with torch.no_grad():
        before, after = model_of(config, x, seed=4)(features=x), model(features=x)
    assert float(after.reconstruction_loss) < 0.7 * float(before.reconstruction_loss)
    again = train_multi_head_vq(x.numpy(), config, seed=4, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    health = identifier_health(model.encode(x), (32, 32, 32), x)
    assert min(health.utilisation) >= 0.9 and min(health.perplexity) >= 12, health
    # parallel: every code alone says something about the neighbourhood, not only the first
    for head in range(3):
        alone = identifier_health(model.encode(x)[:, [head]], (32,), x)
        assert alone.neighbour_hit_rate > 3 * alone.neighbour_hit_chance


def test_saved_models_give_identical_codes_through_the_auto_classes(tmp_path: Path) -> None:
    x = blobs()
    model = train_multi_head_vq(x, small(), max_steps=15, progress=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, MultiHeadVQModel) and isinstance(AutoConfig.from_pretrained(tmp_path), MultiHeadVQConfig)
    assert torch.equal(loaded.encode(x), model.encode(x))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_resume_is_exact(tmp_path: Path) -> None:
    x, config = blobs(), small(dead_code_interval=3, dropout=0.1)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        disable_tqdm=True,
        seed=1,
        max_steps=20,
        save_steps=10,
        per_device_train_batch_size=64,
        report_to="none",
        dataloader_pin_memory=False,
    )
    whole = train_multi_head_vq(x, config, args, seed=1)
    resumed = train_multi_head_vq(x, config, args, seed=1, resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_bad_input_is_named() -> None:
    x = blobs()
    with pytest.raises(TrainingError, match="multi-head VQ-VAE: 10 items cannot fill a codebook of 16"):
        MultiHeadVQModel(small()).initialise_codebooks(x[:10])
    model = model_of(small(), x)
    with pytest.raises(IncompatibleComponentsError, match=r"\(items, 24\) as in MultiHeadVQConfig.input_size"):
        model.encode(noise(3, 5))
    for width in (1, 2, 4):  # half a code stands for nothing here
        with pytest.raises(IncompatibleComponentsError, match=r"codes must be \(N, 3\)"):
            model.decode(np.zeros((2, width), dtype=int))
    with pytest.raises(TrainingError, match=r"multi-head VQ-VAE loss is .* at step"):
        train_multi_head_vq(x, small("gradient"), max_steps=50, learning_rate=1e30, progress=False)
    for options in ({"codebook_sizes": []}, {"latent_size": 0}, {"codebook_update": "adam"}, {"ema_decay": 1.0}):
        with pytest.raises(Exception, match=next(iter(options))):
            small(**options)


# ------------------------------------------------------------------------------------------- gate and heads of a block


def test_a_gate_starts_as_no_gate_and_learns() -> None:
    x = blobs()
    plain, gated = model_of(small(), x), model_of(small(gate=True), x)
    gated.load_state_dict(
        {name.replace("decoder.", "decoder.1."): value for name, value in plain.state_dict().items()}, strict=False
    )
    gate = gated.decoder[0]
    assert float(gate.weight.abs().sum()) == 0
    a, b = plain(features=x), gated(features=x)
    assert torch.allclose(a.reconstruction, b.reconstruction, atol=1e-6) and float(a.loss) == pytest.approx(
        float(b.loss)
    )
    assert torch.allclose(plain.decode(plain.encode(x)), gated.decode(gated.encode(x)), atol=1e-6)
    b.loss.backward()
    assert float(gate.weight.grad.abs().sum()) > 0
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))  # all weight on the first head
    vectors = noise(4, 18)
    assert torch.allclose(gate(vectors)[:, :6], 3 * vectors[:, :6]) and float(gate(vectors)[:, 6:].abs().max()) < 1e-12


def test_a_head_sees_its_own_blocks_only(tmp_path: Path) -> None:
    x = blobs()
    config = small(gate=True, block_sizes=[16, 8], head_blocks=[[0], [1], [0, 1]])
    model = model_of(config, x)
    codes = model.encode(x)
    changed = x.clone()
    changed[:, 16:] = 9 * noise(len(x), 8, 5)
    other = model.encode(changed)
    assert torch.equal(codes[:, 0], other[:, 0]) and not torch.equal(codes[:, 1], other[:, 1])
    assert not torch.equal(codes[:, 2], other[:, 2])
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again.encode(x), codes) and torch.equal(again.decode(codes), model.decode(codes))


def test_blocks_that_do_not_fit() -> None:
    for options in ({"block_sizes": [16, 4]}, {"block_sizes": [16, 8], "head_blocks": [[0], [2], [0]]}):
        with pytest.raises(Exception, match=r"block_sizes|head_blocks"):
            small(**options)
    with pytest.raises(Exception, match="head_blocks"):
        small(block_sizes=[16, 8], head_blocks=[[0], [1]])
