"""PSRQ's ranking network: attention by brute force, what parts may see, padding, losses, recommending, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.auto import AutoModelForRecommendation, register_auto_classes
from hf_genrec.models.psrq.configuration_psrq import PSRQConfig
from hf_genrec.models.psrq.cross_attention import prefix_interest
from hf_genrec.models.psrq.modeling_psrq import PSRQForRecommendation

SIZES, PARTS, NUM = (4, 3, 5, 3, 6, 4), (2, 2, 2), 40


def tokenizer_of(num: int = NUM, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> ItemTokenizer:
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, size, num) for size in sizes], 1)
    return ItemTokenizer.from_codes([f"i{i}" for i in range(num)], codes, codebook_sizes=sizes)


def model_of(tokenizer: ItemTokenizer, **options) -> PSRQForRecommendation:
    torch.manual_seed(0)
    settings = {"part_levels": PARTS, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 10}
    model = PSRQForRecommendation(PSRQConfig.from_tokenizer(tokenizer, **settings | options)).eval()
    model.set_catalogue(tokenizer.codes)
    return model


def tokens(tokenizer: ItemTokenizer, rows: list[list[int]]) -> torch.Tensor:
    return torch.as_tensor(tokenizer.item_token_table[np.array(rows)].reshape(len(rows), -1))


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_prefix_interest_is_the_softmax_of_every_prefix(scale: float) -> None:
    torch.manual_seed(1)
    scores, matches = torch.randn(7, 2, 5, 3) * scale, torch.randn(7, 2, 5, 3)
    scores[:2, 0] = -torch.inf  # left padding
    scores[5:, 1] = -torch.inf  # right padding
    rows = prefix_interest(scores, matches)
    assert rows.shape == (8, 2, 5, 3) and torch.isfinite(rows).all()
    for step in range(8):
        share = scores[:step].softmax(0).nan_to_num(0.0) if step else scores[:0]
        assert torch.allclose(rows[step], (share * matches[:step]).sum(0), atol=1e-5)


def test_prefix_interest_has_the_gradient_of_the_softmax() -> None:
    torch.manual_seed(1)
    scores, matches = (torch.randn(5, 1, 2, 2, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(prefix_interest, (scores, matches))


def test_logits_are_the_formula_item_by_item() -> None:
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    rows = [[3, 7, 7, 1]]
    logits = model(input_ids=tokens(tokenizer, rows)).logits
    assert logits.shape == (1, 5, NUM)
    query, match, bias = model.candidates(model._item_tokens())
    key, value = model.memories(model._item_tokens())
    slope = model.log_slope.exp()
    for step in range(5):
        history = rows[0][:step]
        for item in (0, 7, 39):
            expected = bias[item]
            for head in range(4):  # two modalities of two heads
                score = [
                    (query[item, head] @ key[one, head]) / 8**0.5 + slope[head] * place
                    for place, one in enumerate(history)
                ]
                share = torch.stack(score).softmax(0) if score else []
                for weight, one in zip(share, history):
                    expected = expected + weight * (match[item, head] @ value[one, head]) / 8**0.5
            assert torch.allclose(logits[0, step, item], expected, atol=1e-5)


def test_joint_codes_ask_and_modal_codes_answer() -> None:
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    history = tokens(tokenizer, [[3, 7, 1]])
    base = model(input_ids=history).logits
    other = history.view(1, 3, 6).clone()
    other[:, :, 4:] = torch.as_tensor(tokenizer.item_token_table[[5, 6, 8], 4:])  # other joint codes in the history
    assert torch.equal(model(input_ids=other.view(1, -1)).logits, base)
    other[:, 1, 0] = int(tokenizer.level_offsets[0]) + (int(tokenizer.codes[7, 0]) + 1) % 4
    assert not torch.allclose(model(input_ids=other.view(1, -1)).logits, base)
    codes = tokenizer.codes.copy()
    codes[:, :4] = 0  # other modal codes of the candidates
    model.set_catalogue(codes)
    assert torch.equal(model(input_ids=history).logits, base)


def test_one_part_is_target_attention_over_the_same_codes() -> None:
    tokenizer = tokenizer_of(sizes=(6, 7))
    model = model_of(tokenizer, part_levels=[2])
    assert model.config.num_modalities == 1 and [list(part) for part in model.config.parts] == [[0, 1]]
    counted = model_of(tokenizer_of(), part_levels=[2, 2])  # what stands behind the parts is of the joint one
    assert [list(part) for part in counted.config.parts] == [[0, 1], [2, 3, 4, 5]]
    assert torch.isfinite(model(input_ids=tokens(tokenizer, [[1, 2]])).logits).all()


# ------------------------------------------------------------------------------------------------------------- reading


def test_padding_on_either_side_and_company_change_nothing() -> None:
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    alone = model.start_decoding(tokens(tokenizer, [[3, 7, 1]])).logp_BN
    for side in ("left", "right"):
        ids, mask = torch.zeros(2, 30, dtype=torch.long), torch.zeros(2, 30, dtype=torch.long)
        where = slice(12, 30) if side == "left" else slice(0, 18)
        ids[0, where], mask[0, where] = tokens(tokenizer, [[3, 7, 1]])[0], 1
        ids[1], mask[1] = tokens(tokenizer, [[9, 9, 2, 4, 5]])[0], 1
        state = model.start_decoding(ids, mask)
        assert torch.allclose(state.logp_BN[:1], alone, atol=1e-5)
        logits = model(input_ids=ids, attention_mask=mask).logits
        last = logits[0, 5] if side == "left" else logits[0, 3]
        assert torch.allclose(last.log_softmax(-1), alone[0], atol=1e-5)


def test_long_histories_are_cut_and_empty_ones_have_scores() -> None:
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    long = list(range(25))
    cut = model.start_decoding(tokens(tokenizer, [long[-10:]])).logp_BN
    assert torch.allclose(model.start_decoding(tokens(tokenizer, [long])).logp_BN, cut, atol=1e-5)
    empty = model.start_decoding(torch.zeros(1, 0, dtype=torch.long)).logp_BN
    assert torch.allclose(empty[0], model.candidates(model._item_tokens())[2].log_softmax(-1), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ training


def labelled(tokenizer: ItemTokenizer) -> dict[str, torch.Tensor]:
    ids = tokens(tokenizer, [[3, 7, 1, 12], [5, 5, 2, 0]])
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_softmax_loss_is_cross_entropy_over_the_catalogue() -> None:
    tokenizer = ItemTokenizer.from_codes(
        [f"i{i}" for i in range(NUM)], np.stack(np.unravel_index(np.arange(NUM), (8, 8)), 1), codebook_sizes=(8, 8)
    )
    model = model_of(tokenizer, part_levels=[1, 1], loss="softmax")
    ids = tokens(tokenizer, [[3, 7, 1, 12], [5, 5, 2, 0]])
    labels = ids.clone()
    labels[:, :2] = -100
    logits = model(input_ids=ids).logits[:, 1:4]
    expected = F.cross_entropy(logits.reshape(6, NUM), torch.tensor([7, 1, 12, 5, 2, 0]))
    assert torch.allclose(model(input_ids=ids, labels=labels).loss, expected, atol=1e-5)
    summed = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(12)).loss  # 6 items of 2 tokens
    assert torch.allclose(summed, expected, atol=1e-5)


def test_bce_loss_counts_each_drawn_item_but_the_target() -> None:
    tokenizer = tokenizer_of(num=8)
    model = model_of(tokenizer, loss="bce", num_negatives=50)
    batch = {"input_ids": tokens(tokenizer, [[3, 7, 1]]), "labels": tokens(tokenizer, [[3, 7, 1]])}
    batch["labels"][:, :12] = -100  # the last item is the only target
    torch.manual_seed(5)
    loss = model(**batch).loss
    torch.manual_seed(5)
    drawn = torch.randint(8, (50,))
    logits = model(input_ids=batch["input_ids"][:, :12]).logits[0, 2]
    target = next(i for i in range(8) if np.array_equal(tokenizer.codes[i], tokenizer.codes[1]))
    expected = F.softplus(-logits[target]) + F.softplus(logits[drawn[drawn != target]]).sum()
    assert torch.allclose(loss, expected, atol=1e-4)


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_every_weight_learns(loss: str) -> None:
    tokenizer = tokenizer_of()
    model = model_of(tokenizer, loss=loss).train()
    model(**labelled(tokenizer)).loss.backward()
    assert all(float(weight.grad.abs().sum()) > 0 for _, weight in model.named_parameters())


# -------------------------------------------------------------------------------------------------------- recommending


def test_recommend_ranks_by_the_scores_and_codes_add_up() -> None:
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    found = model.recommend([["i3", "i7"]], tokenizer=tokenizer, k=5, exclude_seen=True)[0]
    scores = model.start_decoding(tokens(tokenizer, [[3, 7]])).logp_BN[0]
    scores[[3, 7]] = -torch.inf
    assert torch.allclose(
        torch.tensor([one.score for one in found]), scores.sort(descending=True).values[:5], atol=1e-5
    )
    assert all(one.score == pytest.approx(float(scores[int(one.item_id[1:])]), abs=1e-5) for one in found)
    state = model.start_decoding(tokens(tokenizer, [[3, 7]]))
    codes = torch.as_tensor(tokenizer.codes[11]).long()
    total = sum(
        model.score_codes(state, codes[:level].view(1, 1, level), level)[0, 0, codes[level]] for level in range(6)
    )
    same = (torch.as_tensor(tokenizer.codes).long() == codes).all(1)
    assert torch.allclose(total, state.logp_BN[0, same].logsumexp(0), atol=1e-4)


def test_files_round_trip(tmp_path: Path) -> None:
    register_auto_classes()
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path)
    assert isinstance(loaded, PSRQForRecommendation) and loaded.recommendation_config.decoding == "dense"
    ids = tokens(tokenizer, [[3, 7, 1]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_bad_settings_are_named() -> None:
    tokenizer = tokenizer_of()
    for options, message in (
        ({"part_levels": [4, 4]}, "together at most the 6 levels"),
        ({"part_levels": []}, "must be positive"),
        ({"hidden_size": 15}, "not a multiple"),
        ({"loss": "bpr"}, "loss must be one of"),
        ({"num_negatives": 0}, "at least 1"),
    ):
        with pytest.raises(IncompatibleComponentsError, match=message):
            PSRQConfig.from_tokenizer(tokenizer, **{"part_levels": PARTS} | options)
    model = model_of(tokenizer)
    with pytest.raises(IncompatibleComponentsError, match="no whole items"):
        model(input_ids=torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(IncompatibleComponentsError, match="set_catalogue"):
        model.set_catalogue(tokenizer.codes[:5])
    wrong = {"input_ids": tokens(tokenizer, [[1, 2]]), "labels": tokens(tokenizer, [[1, 2]])}
    wrong["labels"][0, 6:] = torch.as_tensor(tokenizer.level_offsets)
    model.set_catalogue(np.where(tokenizer.codes == 0, 1, tokenizer.codes))
    with pytest.raises(IncompatibleComponentsError, match="no item of the catalogue has"):
        model(**wrong)
