"""ETEGRec: equal to TIGER with its terms off, the terms themselves, packed against single prefixes, saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.quantizers.configuration_multi_head_vq import MultiHeadVQConfig
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.multi_head_vq import MultiHeadVQModel
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.auto import AutoModelForRecommendation, register_auto_classes
from hf_genrec.models.etegrec.configuration_etegrec import EtegrecConfig
from hf_genrec.models.etegrec.modeling_etegrec import EtegrecForConditionalGeneration, prefix_means
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
ITEMS = 12


def quantizer_of(vectors: torch.Tensor) -> RQVAEModel:
    torch.manual_seed(3)
    config = RQVAEConfig(
        input_size=6, hidden_sizes=[8], latent_size=4, codebook_sizes=[4, 4], codebook_update="gradient"
    )
    return RQVAEModel(config).initialise_codebooks(vectors).eval()


def case(attach: bool = True, **options):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(ITEMS, 6, generator=generator)
    codes = np.stack([np.arange(ITEMS) // 4, np.arange(ITEMS) % 4, np.zeros(ITEMS, int)], axis=1)
    tokenizer = ItemTokenizer.from_codes([f"i{n}" for n in range(ITEMS)], codes, codebook_sizes=[4, 4, 2])
    torch.manual_seed(0)
    values = {"causal_encoder": True, "dropout_rate": 0.0} | SIZES | options
    model = EtegrecForConditionalGeneration(EtegrecConfig.from_tokenizer(tokenizer, **values))
    model.set_catalogue(tokenizer.codes)
    if attach:
        model.attach_quantizer(quantizer_of(vectors), vectors)
    return model, tokenizer, vectors


def packed_batch(tokenizer) -> dict[str, torch.Tensor]:
    from hf_genrec.data.collators import PackedPrefixCollator

    return PackedPrefixCollator(tokenizer)([{"items": np.array([0, 5, 7, 2])}, {"items": np.array([3, 4])}])


@pytest.mark.parametrize("attach", [True, False])
def test_without_its_terms_it_is_tiger(attach) -> None:
    """Both weights 0, or nothing attached: the loss and its gradients are TIGER's, bit for bit, dropout included."""
    off = {"sequence_alignment_weight": 0, "preference_alignment_weight": 0} if attach else {}
    model, tokenizer, _ = case(attach, dropout_rate=0.3, **off)
    torch.manual_seed(0)
    tiger = TigerForConditionalGeneration(
        TigerConfig.from_tokenizer(tokenizer, causal_encoder=True, dropout_rate=0.3, **SIZES)
    )
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in tiger.state_dict().items())
    losses = []
    for one in (model, tiger):
        torch.manual_seed(7)
        loss = one.train()(**packed_batch(tokenizer)).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    grads = dict(model.named_parameters())
    for name, parameter in tiger.named_parameters():
        assert torch.equal(parameter.grad, grads[name].grad), name


def test_terms_by_hand() -> None:
    model, tokenizer, vectors = case(sequence_alignment_weight=1.0, preference_alignment_weight=1.0)
    batch = packed_batch(tokenizer)
    loss = model.train()(**batch).loss
    terms = model.phase_losses()
    assert loss.item() == pytest.approx(terms["ce"] + terms["sia"] + terms["psa"], abs=1e-5)

    # one prefix per sample: what each target of the two windows sees
    prefixes, targets = [[0], [0, 5], [0, 5, 7], [3]], [5, 7, 2, 4]
    quantizer, model = model.quantizer.eval(), model.eval()
    pooled, first = [], []
    with torch.no_grad():
        for prefix in prefixes:
            ids = torch.tensor(tokenizer.item_token_table[prefix].reshape(1, -1))
            states = model.encoder(input_ids=ids).last_hidden_state
            pooled.append(states.mean(1))
            start = torch.zeros(1, 1, dtype=torch.long)
            first.append(model.decoder(input_ids=start, encoder_hidden_states=states).last_hidden_state[:, 0])
        sia = 0.0
        own, theirs = model.sequence_adapter(torch.cat(pooled)), quantizer.transform(vectors[targets])
        for level in quantizer.codebooks:
            p, q = ((-torch.cdist(x, level).pow(2)).log_softmax(-1) for x in (own, theirs))
            sia += float(((p - q) * (p.exp() - q.exp())).sum(-1).mean())
            own, theirs = (x - level[torch.cdist(x, level).argmin(1)] for x in (own, theirs))
        found = F.normalize(model.preference_adapter(torch.cat(first)), dim=1)
        rebuilt = quantizer.scaler(quantizer(features=vectors[targets]).reconstruction)
        logits = found @ F.normalize(rebuilt, dim=1).T / 0.07
        diagonal = torch.arange(4)
        psa = float((F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2)
    assert terms["sia"] == pytest.approx(sia, rel=1e-4)
    assert terms["psa"] == pytest.approx(psa, rel=1e-4)


def test_a_prefix_alone_has_the_terms_of_the_packed_one() -> None:
    """The same four targets, packed or one per sample: the same loss."""
    model, tokenizer, _ = case(sequence_alignment_weight=1.0, preference_alignment_weight=1.0)
    packed = model.train()(**packed_batch(tokenizer)).loss
    rows = [np.array(row) for row in ([0], [0, 5], [0, 5, 7], [3])]
    batch = tokenizer.encode_item_indices(rows, return_tensors="pt")
    labels = torch.tensor(tokenizer.item_token_table[[5, 7, 2, 4]])
    single = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    assert float(packed) == pytest.approx(float(single), rel=1e-4)


def test_loss_share_under_gradient_accumulation() -> None:
    model, tokenizer, _ = case()
    batch = packed_batch(tokenizer)
    labels = int((batch["labels"] != -100).sum())
    whole = model.train()(**batch).loss
    half = model(**batch, num_items_in_batch=torch.tensor(2 * labels)).loss
    assert float(half) == pytest.approx(float(whole) / 2, rel=1e-5)


def test_sia_is_zero_when_the_sequence_is_the_item() -> None:
    model, tokenizer, vectors = case(sequence_alignment_weight=1.0, preference_alignment_weight=0.0)
    latents = model.quantizer.transform(vectors)[[5, 7, 2, 4]]
    model.sequence_adapter.forward = lambda pooled: latents  # zE = z
    model.train()(**packed_batch(tokenizer))
    assert model.phase_losses()["sia"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("side", ["tokenizer", "recommender"])
def test_divergence_falls_in_training_and_the_other_side_gets_no_gradient(side) -> None:
    model, tokenizer, _ = case(sequence_alignment_weight=1.0, preference_alignment_weight=1.0)
    model.start_phase(side)
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    owned = {id(parameter) for parameter in model.quantizer.parameters()}
    assert all((id(parameter) in owned) == (side == "tokenizer") for parameter in learning)
    optimizer = torch.optim.Adam(learning, lr=0.01)
    batch, seen = packed_batch(tokenizer), []
    for _ in range(40):
        model.start_phase(side)  # begins a new mean
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(model.phase_losses()["sia"])
    assert seen[-1] < 0.5 * seen[0]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert any(float(p.grad.abs().sum()) > 0 for p in learning)


def test_the_frozen_side_is_in_evaluation_mode() -> None:
    model, _, _ = case(dropout_rate=0.5)
    model.start_phase("tokenizer")
    model.train()
    assert model.quantizer.training and not model.encoder.training and not model.decoder.training
    model.start_phase("recommender")
    assert not model.quantizer.training and model.encoder.training
    assert not model.eval().encoder.training


def test_alignment_off_while_warming_up() -> None:
    model, tokenizer, _ = case(sequence_alignment_weight=1.0)
    model.start_phase("recommender", aligned=False)
    batch = packed_batch(tokenizer)
    assert torch.equal(model.train()(**batch).loss, model.eval()(**batch).loss)


def test_saved_model_has_its_tokenizer_side(tmp_path) -> None:
    register_auto_classes()
    model, tokenizer, vectors = case()
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path)
    new = torch.randn(5, 6)
    assert torch.equal(loaded.encode_items(new), model.encode_items(new))
    assert torch.equal(loaded.item_vectors, vectors)
    histories = [["i0", "i5"], ["i3"]]
    assert loaded.recommend(histories, tokenizer=tokenizer, k=4) == model.recommend(histories, tokenizer=tokenizer, k=4)
    loaded.set_catalogue(tokenizer.codes)
    batch = packed_batch(tokenizer)
    assert torch.equal(loaded.train()(**batch).loss, model.train()(**batch).loss)


def test_prefix_means_without_a_mask() -> None:
    states = torch.randn(2, 5, 3)
    lengths = torch.tensor([[1, 4], [5, 0]])
    means = prefix_means(states, None, lengths)
    assert torch.allclose(means[0, 1], states[0, :4].mean(0), atol=1e-6)
    assert torch.allclose(means[1, 0], states[1].mean(0), atol=1e-6)


def test_errors_name_the_fix() -> None:
    model, _, vectors = case(attach=False)
    with pytest.raises(IncompatibleComponentsError, match="call attach_quantizer"):
        model.start_phase("tokenizer")
    with pytest.raises(IncompatibleComponentsError, match="call attach_quantizer"):
        model.encode_items(vectors)
    with pytest.raises(IncompatibleComponentsError, match="unknown side"):
        model.start_phase("both")
    other = MultiHeadVQModel(MultiHeadVQConfig(input_size=6, codebook_sizes=[4, 4], latent_size=4))
    with pytest.raises(IncompatibleComponentsError, match="to rq_vae"):
        model.attach_quantizer(other, vectors)
    with pytest.raises(IncompatibleComponentsError, match="item vectors have shape"):
        model.attach_quantizer(quantizer_of(vectors), vectors[:3])
    config = RQVAEConfig(input_size=6, codebook_sizes=[5], latent_size=4)
    with pytest.raises(IncompatibleComponentsError, match="first levels of the codes"):
        model.attach_quantizer(RQVAEModel(config), vectors)
    with pytest.raises(IncompatibleComponentsError, match="preference_temperature"):
        EtegrecConfig(preference_temperature=0)
