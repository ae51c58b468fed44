"""Items that join and leave a trained artefact: recommended at once, nobody else's codes touched, nothing inconsistent."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hf_genrec.cli.main import main
from hf_genrec.data.items import ItemTable
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, UnknownItemError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.hub import load_artifact, save_artifact
from hf_genrec.hub.catalogue_update import (
    add_items_to_artifact,
    reassign_in_artifact,
    remove_items_from_artifact,
    update_catalogue,
)
from hf_genrec.identifiers.collisions import resolve_collisions
from hf_genrec.identifiers.feature_transforms import BlockTransform, FittedBlock, ItemFeatures
from hf_genrec.identifiers.life_cycle import add_items, remove_items
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.rq_transformer.configuration_rq_transformer import RQTransformerConfig
from hf_genrec.models.rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM
from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

N, E = 24, 6
TAGS = b"what reads tags off the codes"  # stays with the quantizer


def world():
    """Items on a 5 x 5 grid with little noise: one place of the grid is free, and the new item goes there."""
    rng = np.random.default_rng(0)
    grid = np.array([(row, column) for row in range(5) for column in range(5)], np.float32)
    mix = rng.normal(size=(2, E)).astype(np.float32)
    vectors = grid @ mix + 0.01 * rng.normal(size=(25, E)).astype(np.float32)
    quantizer = ResidualKMeans([5, 5], few_points="duplicate").fit(vectors)
    codes, sizes = resolve_collisions(quantizer.encode(vectors[:N]), (5, 5), "counter")
    sizes = (*sizes[:2], 3)  # room for two more items of a code
    ids = [f"i{number:02d}" for number in range(N)]
    return quantizer, vectors, ItemTokenizer.from_codes(ids, codes, sizes)


def tiger(tokenizer):
    torch.manual_seed(0)
    options = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return TigerForConditionalGeneration(TigerConfig.from_tokenizer(tokenizer, **options)).eval()


def rq_transformer(tokenizer, vectors):
    torch.manual_seed(0)
    config = RQTransformerConfig.from_tokenizer(
        tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, item_feature_dim=E
    )
    model = RQTransformerForCausalLM(config).eval()
    model.set_catalogue(tokenizer.codes, vectors[: tokenizer.num_items])
    return model


def item_table(ids):
    return ItemTable.from_source({"item_id": list(ids), "title": [f"Title of {item}" for item in ids]})


def everything(model, tokenizer, histories, **options):
    options = {"k": tokenizer.num_items, "num_beams": 4 * tokenizer.num_items, "exclude_seen": False} | options
    return model.recommend(histories, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("kind", ["tiger", "rq_transformer"])
def test_a_new_item_is_recommended_at_once(kind):
    quantizer, vectors, tokenizer = world()
    model = tiger(tokenizer) if kind == "tiger" else rq_transformer(tokenizer, vectors)
    change = add_items(tokenizer, quantizer, ["new"], vectors[N:])
    new_model = update_catalogue(model, change, vectors[N:], old_tokenizer=tokenizer)
    assert np.array_equal(change.tokenizer.codes[:N], tokenizer.codes) and tokenizer.num_items == N
    assert len(change.tokenizer) == len(tokenizer)
    # read in a history, and generated
    for history in (["i03", "i04"], ["new", "i03"]):
        found = [one.item_id for one in everything(new_model, change.tokenizer, [history])[0]]
        assert sorted(found) == sorted(change.tokenizer.item_ids)
    # the score of an item that was there is what it was: codes and weights are the same
    before = model.score_all([["i03", "i04"]], tokenizer=tokenizer)
    after = new_model.score_all([["i03", "i04"]], tokenizer=change.tokenizer)
    assert torch.allclose(before, after[:, :N], atol=1e-5)
    # allowed alone, it is the answer
    alone = new_model.recommend([["i03"]], tokenizer=change.tokenizer, k=1, allowed_items=["new"])
    assert [one.item_id for one in alone[0]] == ["new"]
    with pytest.raises(IncompatibleComponentsError):
        model.recommend([["i03"]], tokenizer=change.tokenizer, k=1)  # the old model does not take the new catalogue


def test_the_model_trained_on_codes_recommends_the_new_neighbour():
    """A model that learnt "next is the right neighbour on the grid" finds the item that fills the gap."""
    quantizer, vectors, tokenizer = world()
    codes = tokenizer.codes
    target = np.append(quantizer.encode(vectors[N:])[0].numpy(), 0)
    model = tiger(tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    # every other item of the new one's column is followed by its right neighbour's codes
    rows = [(n, n + 1) for n in range(N - 1)]
    table = torch.tensor(tokenizer.item_token_table)
    inputs, labels = table[[a for a, _ in rows]], table[[b for _, b in rows]]
    model.train()
    for _ in range(300):
        loss = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert not (codes == target).all(axis=1).any()
    change = add_items(tokenizer, quantizer, ["new"], vectors[N:])
    new_model = update_catalogue(model, change)
    scores = new_model.score_all([["i22"]], tokenizer=change.tokenizer)[0]
    assert int(scores.argmax()) == 23 and torch.isfinite(scores[N])
    share_prefix = (codes[:, 0] == target[0]).nonzero()[0]
    others = np.setdiff1d(np.arange(N), share_prefix)
    # after an item whose successor has the same first code, the new item beats everything outside that branch
    history = f"i{int(share_prefix[0]) - 1:02d}"
    scores = new_model.score_all([[history]], tokenizer=change.tokenizer)[0]
    assert scores[N] > scores[torch.as_tensor(others)].median()


@pytest.mark.parametrize("kind", ["tiger", "rq_transformer"])
def test_removed_items_never_appear(kind):
    _, vectors, tokenizer = world()
    model = tiger(tokenizer) if kind == "tiger" else rq_transformer(tokenizer, vectors)
    change = remove_items(tokenizer, ["i00", "i11"])
    new_model = update_catalogue(model, change)
    found = [one.item_id for one in everything(new_model, change.tokenizer, [["i03", "i04"]])[0]]
    assert sorted(found) == [item for item in tokenizer.item_ids if item not in ("i00", "i11")]
    before = model.score_all([["i03"]], tokenizer=tokenizer)
    after = new_model.score_all([["i03"]], tokenizer=change.tokenizer)
    assert torch.allclose(before[:, change.kept_rows], after, atol=1e-5)
    with pytest.raises(UnknownItemError, match="i00"):
        new_model.recommend([["i00"]], tokenizer=change.tokenizer, k=1)


def test_per_item_tables_follow():
    quantizer, vectors, tokenizer = world()
    model = rq_transformer(tokenizer, vectors)
    with torch.no_grad():
        model.model.item_embedding.weight.normal_()
    change = add_items(tokenizer, quantizer, ["new"], vectors[N:])
    bigger = update_catalogue(model, change, vectors[N:])
    weights = model.model.item_embedding.weight
    assert torch.equal(bigger.model.item_embedding.weight[:N], weights)
    assert torch.allclose(bigger.model.item_embedding.weight[N], weights.mean(0), atol=1e-6)
    assert np.allclose(bigger.model.item_features.numpy(), vectors)
    assert np.array_equal(bigger.model.item_codes.numpy(), change.tokenizer.codes)
    back = update_catalogue(bigger, remove_items(change.tokenizer, ["new"]))
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    with pytest.raises(IncompatibleComponentsError, match=r"item_features of shape \(1, 6\)"):
        update_catalogue(model, change)


def test_what_cannot_follow_says_why():
    quantizer, vectors, tokenizer = world()
    atomic = ItemTokenizer.from_codes(tokenizer.item_ids, np.arange(N)[:, None])
    with pytest.raises(IncompatibleComponentsError, match="one code per item"):
        add_items(atomic, quantizer, ["new"], vectors[N:])
    change = add_items(tokenizer, quantizer, ["new"], vectors[N:])
    other = SASRecForCausalLM(SASRecConfig.from_tokenizer(atomic, hidden_size=8))
    with pytest.raises(IncompatibleComponentsError, match="codebooks"):
        update_catalogue(other, change)
    with pytest.raises(IncompatibleComponentsError, match="another catalogue"):
        update_catalogue(tiger(tokenizer), change, old_tokenizer=change.tokenizer)


# --- the artefact ------------------------------------------------------------------------------------------------------


@pytest.fixture
def artefact(tmp_path):
    quantizer, vectors, tokenizer = world()
    block = FittedBlock(vectors[:N], vectors[:N])
    features = ItemFeatures({"array": block}, ["array"], ["array"])
    save_artifact(
        tmp_path / "a",
        model=rq_transformer(tokenizer, vectors),
        tokenizer=tokenizer,
        items=item_table(tokenizer.item_ids),
        recipe={"name": "test"},
        quantizer=quantizer,
        item_features=features,
        quantizer_files={"tag_paths.safetensors": TAGS},
    )
    return tmp_path / "a", quantizer, vectors, tokenizer


def test_artefact_round_trip(artefact):
    folder, _, vectors, tokenizer = artefact
    before = load_artifact(folder)
    change = add_items_to_artifact(folder, item_table(["new"]), vectors[N:], item_features=vectors[N:])
    after = load_artifact(folder)
    assert after.tokenizer.item_ids == [*tokenizer.item_ids, "new"]
    assert after.items.item_ids == after.tokenizer.item_ids and after.title("new") == "Title of new"
    assert after.model.config.catalogue_fingerprint == after.tokenizer.catalogue_fingerprint
    assert after.model.config.num_items == N + 1 and after.recipe == before.recipe
    assert ItemTrie.from_tokenizer(after.tokenizer).num_items == N + 1
    assert [r.item_id for r in after.recommend([["i03"]], k=1, allowed_items=["new"])[0]] == ["new"]
    assert change.to_dict()["num_items"] == [N, N + 1]
    remove_items_from_artifact(folder, ["new", "i00"])
    last = load_artifact(folder)
    assert last.tokenizer.item_ids == tokenizer.item_ids[1:] and last.items.item_ids == tokenizer.item_ids[1:]
    found = [r.item_id for r in last.recommend([["i03"]], k=N - 2)[0]]
    assert "new" not in found and "i00" not in found
    assert (folder / "quantizer" / "quantizer.safetensors").is_file()
    assert (folder / "quantizer" / "tag_paths.safetensors").read_bytes() == TAGS


def test_reassigned_items_get_the_code_of_their_new_vector(artefact):
    folder, quantizer, vectors, tokenizer = artefact
    wanted = quantizer.encode(vectors[N:])[0].numpy()
    change = reassign_in_artifact(folder, ["i05"], vectors[N:], item_features=vectors[N:])
    after = load_artifact(folder)
    assert np.array_equal(after.tokenizer.item_to_codes("i05")[:2], wanted)
    others = [n for n in range(N) if n != 5]
    assert np.array_equal(after.tokenizer.codes[others], tokenizer.codes[others])
    assert change.reassigned == ("i05",) and after.tokenizer.item_ids == tokenizer.item_ids


def test_without_a_quantizer_the_error_says_so(tmp_path):
    _, vectors, tokenizer = world()
    save_artifact(tmp_path / "a", model=tiger(tokenizer), tokenizer=tokenizer)
    with pytest.raises(ArtifactError, match="quantizer"):
        add_items_to_artifact(tmp_path / "a", item_table(["new"]), vectors[N:])
    remove_items_from_artifact(tmp_path / "a", ["i01"])  # needs none
    assert "i01" not in load_artifact(tmp_path / "a").tokenizer.item_ids


def test_behaviour_alone_knows_nothing_of_a_new_item(artefact):
    folder, *_ = artefact
    with pytest.raises(IncompatibleComponentsError, match="know nothing of a new item"):
        add_items_to_artifact(folder, item_table(["new"]))


def test_vectors_from_the_item_table(tmp_path):
    quantizer, vectors, tokenizer = world()
    kinds = [f"row{n // 5}" for n in range(25)]
    names = [["kind", f"row{n}"] for n in range(5)]
    hot = np.array([[float(kind == name) for _, name in names] for kind in kinds], np.float32)
    transform = BlockTransform(
        "attributes", {"names": names, "separator": "|"}, {"mean": hot.mean(0), "scale": np.ones(1)}
    )
    content = (hot - hot.mean(0))[:N]
    features = ItemFeatures(
        {"kind": FittedBlock(content, content, transform), "grid": FittedBlock(vectors[:N], vectors[:N])},
        ["grid"],
        ["grid"],
    )
    model = rq_transformer(tokenizer, vectors)
    save_artifact(tmp_path / "a", model=model, tokenizer=tokenizer, quantizer=quantizer, item_features=features)
    change = add_items_to_artifact(
        tmp_path / "a",
        ItemTable.from_source({"item_id": ["new"], "title": ["x"], "kind": ["row4"]}),
        when_full="nearest",
    )
    # 10 neighbours: the four others of its row come first
    new = ItemFeatures.load(tmp_path / "a" / "quantizer" / "features.safetensors").blocks["grid"].symmetric[N]
    distance = np.linalg.norm(vectors[:N] - new, axis=1)
    assert change.added == ("new",) and distance.argmin() >= 5


def test_command_line(artefact, tmp_path, capsys):
    folder, _, vectors, tokenizer = artefact
    np.savez(tmp_path / "v.npz", ids=np.array(["new"]), vectors=vectors[N:])
    arguments = ["items", "add", str(folder), "--vectors", str(tmp_path / "v.npz")]
    assert main([*arguments, "--json"]) == 2  # the model reads features
    assert "item_features" in capsys.readouterr().err
    assert main([*arguments, "--model_features", str(tmp_path / "v.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"] == ["new"]
    assert main(["recommend", str(folder), "--history", "i03", "-k", "1", "--allowed_items", "new", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recommendations"][0]["item_id"] == "new"
    assert main(["items", "remove", str(folder), "--ids", "new,i00", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == ["new", "i00"]
    assert load_artifact(folder).tokenizer.item_ids == tokenizer.item_ids[1:]
    assert main(["items", "remove", str(folder), "--ids", "new"]) == 2
    assert "'new'" in capsys.readouterr().err
    assert main(["items", "remove", str(folder)]) == 2
