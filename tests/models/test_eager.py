"""EAGER: packed training equals one target at a time, streams are independent, the guide is detached, files, errors."""

from __future__ import annotations

import eager_cases as cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.eager.blocks import Guide
from hf_genrec.models.eager.configuration_eager import EagerConfig
from hf_genrec.models.eager.modeling_eager import EagerForCausalLM
from hf_genrec.models.eager.streams import StreamTree

ROWS = [[3, 1, 4, 15, 9, 2], [6, 5, 8], [7, 7]]


@pytest.fixture(scope="module")
def tokenizer():
    return cases.make_tokenizer(cases.trees())


def item_log_probs(model, tokenizer, history: list[int], stream: int | None = None) -> torch.Tensor:
    """Log-probability (N,) of every item by one call of the decoder per item and level, no trie involved."""
    ids = tokenizer.encode_item_indices([np.array(history, dtype=np.int64)], return_tensors="pt")
    codes = torch.tensor(np.array(tokenizer.codes)).long()
    total = torch.zeros(len(codes))
    with torch.no_grad():
        state = model.start_decoding(ids["input_ids"], ids["attention_mask"])
        for one in range(model.config.num_streams) if stream is None else [stream]:
            own = codes[:, model.config.stream_columns(one)]
            for item in range(len(codes)):
                for level in range(own.shape[1]):
                    logp = model.score_stream(state, one, own[item, :level].view(1, 1, -1), level)
                    total[item] += logp[0, 0, own[item, level]]
    return total


def test_leaves_of_both_trees_are_balanced_within_one() -> None:
    for tree in cases.trees(32):
        clusters = torch.bincount(tree.codes_NL[:, 0], minlength=6)
        assert clusters.max() - clusters.min() <= 1 and (tree.codes_NL >= 0).all()
        # a number belongs to one leaf cluster alone: it names the item by itself
        assert len(tree.codes_NL[:, 1].unique()) == 32


def test_each_stream_is_a_distribution_over_the_items(tokenizer) -> None:
    model = cases.make_model(tokenizer)
    for stream in range(2):
        logp = item_log_probs(model, tokenizer, [3, 1, 4], stream)
        assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_score_all_is_the_sum_of_both_streams(tokenizer) -> None:
    model = cases.make_model(tokenizer)
    histories = [["i3", "i1"], ["i7"], []]
    scores = model.score_all(histories, tokenizer=tokenizer)
    for row, history in enumerate(histories):
        by_hand = item_log_probs(model, tokenizer, [int(item[1:]) for item in history])
        torch.testing.assert_close(scores[row], by_hand, atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_a_window_is_that_of_its_targets_one_by_one(norm_first: bool, side: str) -> None:
    tokenizer = cases.make_tokenizer(cases.trees())
    tokenizer.padding_side = side
    model = cases.make_model(tokenizer, norm_first=norm_first)
    with torch.no_grad():
        loss = model(**cases.batch(tokenizer, ROWS)).loss.item()
    losses = [
        -item_log_probs(model, tokenizer, row[:end])[row[end]].item() / 2  # the mean over the 2 levels of a stream
        for row in ROWS
        for end in range(1, len(row))
    ]
    assert loss == pytest.approx(np.mean(losses), abs=1e-4)


def test_the_loss_is_exact_under_accumulation(tokenizer) -> None:
    model = cases.make_model(tokenizer)
    whole = model(**cases.batch(tokenizer, ROWS)).loss
    count = sum(int((cases.batch(tokenizer, [row])["labels"] >= 0).sum()) for row in ROWS)
    parts = sum(model(**cases.batch(tokenizer, [row]), num_items_in_batch=torch.tensor(count)).loss for row in ROWS)
    torch.testing.assert_close(parts, whole)


def test_forward_without_labels_gives_the_same_log_probabilities(tokenizer) -> None:
    model = cases.make_model(tokenizer)
    inputs = cases.batch(tokenizer, [[3, 1, 4]])
    ids = inputs["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits
        one = model(input_ids=ids[:, :-1], logits_to_keep=1).logits
        picked = logits[0].gather(1, ids[0, 1:, None]).squeeze(1).view(-1)
    torch.testing.assert_close(one, logits[:, -1:])
    own = picked[-4:].sum()  # the codes of item 4 behind items 3 and 1
    assert own.item() == pytest.approx(item_log_probs(model, tokenizer, [3, 1])[4].item(), abs=1e-4)


def test_generate_writes_a_catalogue_item(tokenizer) -> None:
    model = cases.make_model(tokenizer)
    model.generation_config.eos_token_id = None
    ids = cases.batch(tokenizer, [[3, 1]])["input_ids"]
    written = model.generate(ids, max_new_tokens=4, do_sample=False)[0, -4:] - torch.tensor(tokenizer.level_offsets)
    trees = [tree.trie for tree in model.model.tables()[1]]
    assert trees[0].lookup(written[None, :2]).item() >= 0 and trees[1].lookup(written[None, 2:]).item() >= 0


def test_histories_longer_than_the_model_reads_keep_the_newest_items(tokenizer) -> None:
    model = cases.make_model(tokenizer)
    long = [f"i{item % 30}" for item in range(40)]
    options = {"tokenizer": tokenizer, "k": 4, "exclude_seen": False}
    assert model.recommend([long], **options) == model.recommend([long[-12:]], **options)


# ------------------------------------------------------------------------------------------------- contrast and guide


def training_parts(model, tokenizer, seed: int = 5):
    model.train()
    torch.manual_seed(seed)
    return model(**cases.batch(tokenizer, ROWS))


def test_auxiliary_losses_only_in_training(tokenizer) -> None:
    model = cases.make_model(tokenizer)
    quiet = model(**cases.batch(tokenizer, ROWS))
    assert quiet.contrast_loss is None and quiet.guide_loss is None
    loud = training_parts(model, tokenizer)
    torch.testing.assert_close(loud.code_loss, quiet.loss)
    assert loud.loss.item() == pytest.approx((loud.code_loss + loud.contrast_loss + loud.guide_loss).item())
    assert loud.contrast_loss > 0 and loud.guide_loss > 0


def test_options_off_leave_two_generators(tokenizer) -> None:
    """Without contrast and guide the gradient is that of the two streams' cross-entropies."""
    plain = cases.make_model(tokenizer, guide_weight=0.0, contrast_weights=[0.0, 0.0], item_feature_dims=[])
    off = cases.make_model(tokenizer, guide_weight=0.0, contrast_weights=[0.0, 0.0])
    assert plain.guide is None and len(plain.contrast_heads) == 0
    weights = {name: weight for name, weight in plain.state_dict().items() if name != "model.item_features"}
    missing = off.load_state_dict(weights, strict=False).missing_keys
    assert all(name.startswith(("contrast_heads", "model.item_features")) for name in missing)
    losses = [training_parts(model, tokenizer).loss for model in (plain, off)]
    assert torch.equal(*losses)


def test_contrast_is_cross_entropy_over_the_sampled_items(tokenizer) -> None:
    model = cases.make_model(tokenizer, guide_weight=0.0, contrast_weights=[2.0, 3.0])
    rows = torch.tensor([4, 9, 4])
    summaries = [torch.randn(3, 16, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    expected = 0.0
    for stream, weight in enumerate((2.0, 3.0)):
        query = F.normalize(model.contrast_heads[stream](summaries[stream]), dim=-1)
        fixed = F.normalize(torch.tensor(cases.vectors(stream)), dim=-1)  # 30 items: all are negatives
        expected += weight * F.cross_entropy(query @ fixed.T / 0.3, rows, reduction="sum")
    torch.testing.assert_close(model._contrast(summaries, rows), expected)
    model.config.contrast_samples = 7  # now 7 are drawn, and the target is always among the candidates
    torch.manual_seed(0)
    drawn = model._contrast(summaries, rows)
    assert 0 < drawn < expected


def test_the_guide_never_reaches_the_semantic_decoder(tokenizer) -> None:
    model = cases.make_model(tokenizer)
    training_parts(model, tokenizer).guide_loss.backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert any(name.startswith("guide.") for name in reached)
    assert not any(name.startswith(("decoders.", "model.layers", "model.item_embeddings")) for name in reached)
    gradient = model.model.code_embedding.weight.grad.any(dim=1)
    semantic = model.config.level_offsets[2]
    assert gradient[:semantic].any() and not gradient[semantic:].any()  # it teaches the behaviour codes' vectors


def test_guide_depends_on_summary_and_hides_the_masked_code() -> None:
    config = EagerConfig(hidden_size=16, dropout=0.0, initializer_range=0.5)
    torch.manual_seed(0)
    guide = Guide(config, 2).eval()
    for weight in guide.parameters():
        torch.nn.init.normal_(weight)
    codes, summary = torch.randn(3, 2, 16), torch.randn(3, 16)
    other = codes.clone()
    other[:, 1] += 1
    assert torch.equal(guide.reconstruct(codes, summary, 1), guide.reconstruct(other, summary, 1))
    assert not torch.allclose(guide.reconstruct(codes, summary, 0), guide.reconstruct(other, summary, 0))
    assert not torch.allclose(guide.recognise(codes, summary), guide.recognise(codes, summary + 1))


def test_dropping_a_stream_leaves_a_valid_model() -> None:
    """One stream alone: the same weights give the same distribution, and it trains."""
    parts = cases.trees()
    both = cases.make_tokenizer(parts)
    model = cases.make_model(both)
    for stream in range(2):
        alone_tokenizer = cases.make_tokenizer([parts[stream]])
        options = {"streams": 1, "item_feature_dims": [cases.WIDTHS[stream]], "contrast_weights": [1.0]}
        torch.manual_seed(1)
        alone = EagerForCausalLM(
            EagerConfig.from_tokenizer(
                alone_tokenizer, hidden_size=16, intermediate_size=32, max_position_embeddings=12, dropout=0.0,
                stream_levels=[2], **{key: value for key, value in options.items() if key != "streams"},
            )
        ).eval()  # fmt: skip
        alone.set_catalogue(alone_tokenizer.codes, cases.vectors(stream))
        weights = {
            name.replace(f"decoders.{stream}.", "decoders.0.").replace(
                f"item_embeddings.{stream}.", "item_embeddings.0."
            ): weight
            for name, weight in model.state_dict().items()
            if f"s.{1 - stream}." not in name.replace("layers.", "")
            and not name.startswith(("guide.", "contrast_heads."))
        }
        tokens = slice(model.config.level_offsets[2 * stream], None if stream else model.config.level_offsets[2])
        own = weights["model.code_embedding.weight"]
        weights["model.code_embedding.weight"] = torch.cat([own[:4], own[tokens]])[: len(alone_tokenizer)]
        for name in ("model.item_codes", "model.item_features"):
            weights.pop(name)
        assert not alone.load_state_dict(weights, strict=False).unexpected_keys
        history = [3, 1, 4]
        torch.testing.assert_close(
            item_log_probs(alone, alone_tokenizer, history), item_log_probs(model, both, history, stream)
        )
        names = [f"i{item}" for item in history]
        found = alone.recommend([names], tokenizer=alone_tokenizer, k=8)[0]
        same = model.recommend(
            [names], tokenizer=both, k=8, decoding="two_stream", decoding_options={"streams": [stream]}
        )[0]
        assert [entry.item_id for entry in found] == [entry.item_id for entry in same]
        assert [entry.score for entry in found] == pytest.approx([entry.score for entry in same], abs=1e-5)
        assert training_parts(alone, alone_tokenizer).loss.isfinite()


# ------------------------------------------------------------------------------------------------------- files, errors


def test_a_saved_model_recommends_the_same(tokenizer, tmp_path) -> None:
    model = cases.make_model(tokenizer)
    model.recommendation_config = model.recommendation_config.merged(decoding="two_stream")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is EagerForCausalLM and loaded.stream_levels == [2, 2]
    histories = [["i3", "i1"], []]
    assert loaded.recommend(histories, tokenizer=tokenizer) == model.recommend(histories, tokenizer=tokenizer)


def test_stream_tree_ranks_and_children_agree_with_the_codes() -> None:
    tree = cases.trees(29)[1]
    codes = tree.codes_NL
    stream = StreamTree(codes, tree.codebook_sizes, (0, 6))
    for level in range(2):
        children = stream.children(level, stream.nodes_NL1[:, level])
        own = children.codes_XW.gather(1, stream.ranks(level, torch.arange(29))[:, None]).squeeze(1)
        assert torch.equal(own, codes[:, level])
        for item in range(29):
            followers = sorted({int(row[level]) for row in codes if torch.equal(row[:level], codes[item, :level])})
            assert children.codes_XW[item][children.valid_XW[item]].tolist() == followers


def test_errors_name_the_fix(tokenizer) -> None:
    model = cases.make_model(tokenizer)
    with pytest.raises(IncompatibleComponentsError, match=r"stream_levels \[2, 1\] must be"):
        EagerConfig.from_tokenizer(tokenizer, stream_levels=[2, 1])
    with pytest.raises(IncompatibleComponentsError, match="1 contrast_weights"):
        EagerConfig.from_tokenizer(tokenizer, contrast_weights=[1.0])
    with pytest.raises(IncompatibleComponentsError, match="set_catalogue: item features"):
        model.set_catalogue(tokenizer.codes, np.zeros((30, 3)))
    with pytest.raises(IncompatibleComponentsError, match="fewer than 4 codes"):
        model.set_catalogue(np.where(np.arange(30)[:, None] == 4, -1, tokenizer.codes))
    with pytest.raises(IncompatibleComponentsError, match="no whole items of 4 codes"):
        model.start_decoding(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(IncompatibleComponentsError, match="holds no catalogue"):
        EagerForCausalLM(EagerConfig()).start_decoding(torch.zeros(1, 4, dtype=torch.long))
    inputs = cases.batch(tokenizer, [[1, 2]])
    codes = {tuple(row) for row in tokenizer.codes.tolist()}
    wrong = next((b, *a[1:]) for a in codes for b in range(6) if (b, *a[1:]) not in codes)
    inputs["labels"][0, 4:] = torch.tensor(wrong) + torch.tensor(tokenizer.level_offsets)
    with pytest.raises(IncompatibleComponentsError, match="not in the catalogue of 30"):
        model(**inputs)


def test_items_without_a_code_of_their_own_read_as_nothing_known(tokenizer) -> None:
    """A history token run that names no item is passed over like the start, and shared codes give the first item."""
    codes = np.array(tokenizer.codes)
    codes[5] = codes[2]
    shared = ItemTokenizer.from_codes([f"i{row}" for row in range(30)], codes, codebook_sizes=tokenizer.codebook_sizes)
    model = cases.make_model(shared)
    rows, _ = model.model.items(cases.batch(shared, [[5, 2, 7]])["input_ids"], None)
    assert rows.tolist() == [[2, 2, 7]]
    found = model.recommend([["i7"]], tokenizer=shared, k=29, num_beams=60, decoding="two_stream")[0]
    assert len({entry.item_id for entry in found}) == 29
    assert ItemTrie.from_tokenizer(shared).num_leaves == 29


def test_summaries_of_drawn_targets_stand_for_all(tokenizer) -> None:
    """As many as there are targets is all of them; fewer leave the codes' loss alone, and are drawn evenly."""
    whole = cases.make_model(tokenizer)
    parts = training_parts(whole, tokenizer)
    for most, same in ((5, True), (2, False)):
        some = cases.make_model(tokenizer, summary_targets=most)
        drawn = [training_parts(some, tokenizer, seed) for seed in range(5, 6 if same else 10)]
        for other in drawn:
            torch.testing.assert_close(other.code_loss, parts.code_loss)
        if same:
            assert torch.equal(drawn[0].loss, parts.loss)
    contrast = torch.stack([other.contrast_loss.detach() for other in drawn])
    assert contrast.std() > 0
    # rows of 5, 2 and 1 targets: of the first only 2 are drawn, each target of a row as often as the others
    model = cases.make_model(tokenizer, summary_targets=2)
    target = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    torch.manual_seed(0)
    counts = torch.zeros(3, 6)
    for _ in range(600):
        picked = model._pick_targets(target)
        counts.scatter_add_(1, picked, target.gather(1, picked).float())
    assert counts[0, 1:].sum() == 1200 and counts[0, 1:].min() > 180 and counts[0, 0] == 0
    assert counts[1].tolist() == [0, 600, 600, 0, 0, 0] and counts[2].tolist() == [0, 600, 0, 0, 0, 0]
