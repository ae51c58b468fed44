"""The softmax preference loss and its bookkeeping, shared by the decoder-only and the encoder-decoder trainers.

S-DPO (arXiv 2406.09215): one chosen answer against K rejected ones,

    loss = -log sigmoid( -log sum_j exp( beta * (r_j - r_chosen) ) ),   r = log pi(answer) - log pi_ref(answer)

with log-probabilities summed over the answer's tokens. Computed as softplus(logsumexp(...)), which stays finite where
the sum of exponentials over- or underflows.

*Relations*: K = 1 is the sigmoid loss of DPO (arXiv 2305.18290), `-log sigmoid(beta * (r_chosen - r_1))`. With the
reference equal to the policy every r is 0 and the loss is log(K + 1).

Rows may have different numbers of rejected answers: these are held flat, row after row, with a count per prompt.

Shape legend: B prompts, K rejected answers of the prompt that has most, R rejected answers of all prompts together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from hf_genrec.errors import IncompatibleComponentsError, TrainingError

_REFERENCE_FIX = "Use the state of the policy before preference tuning (leave ref_model out for a copy)."


def padded_rejected(values_R: torch.Tensor, counts_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the rejected answers as a table.

    Args:
        values_R: one value per rejected answer, prompt after prompt.
        counts_B: rejected answers of each prompt, at least 1.

    Returns:
        values_BK (0 where a prompt has fewer than K) and there_BK (bool).

    Example:
        >>> padded_rejected(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2]))[0].tolist()
        [[1.0, 0.0], [2.0, 3.0]]
    """
    columns_K = torch.arange(int(counts_B.max()), device=counts_B.device)
    there_BK = columns_K < counts_B.unsqueeze(1)
    table_BK = values_R.new_zeros(there_BK.shape).masked_scatter(there_BK, values_R)
    return table_BK, there_BK


def softmax_preference_loss(
    chosen_B: torch.Tensor, rejected_BK: torch.Tensor, there_BK: torch.Tensor | None = None, *, beta: float
) -> torch.Tensor:
    """The S-DPO loss of each prompt.

    Args:
        chosen_B: log-ratio policy / reference of the chosen answers.
        rejected_BK: log-ratios of the rejected answers.
        there_BK: which of them exist (at least one per row); None: all.
        beta: strength of the pull towards the reference, > 0.

    Returns:
        loss_B, not reduced.

    Example:
        >>> round(softmax_preference_loss(torch.zeros(1), torch.zeros(1, 3), beta=1.0).exp().item(), 4)  # K + 1
        4.0
    """
    margins_BK = beta * (rejected_BK - chosen_B.unsqueeze(1))
    if there_BK is not None:
        margins_BK = margins_BK.masked_fill(~there_BK, -torch.inf)
    return F.softplus(torch.logsumexp(margins_BK, dim=1))


def step_counts(batches: Sequence[dict[str, Any]], accelerator: Any, device: torch.device) -> torch.Tensor:
    """(2,) int64: prompts, and tokens of chosen answers, of one whole optimiser step on all processes.

    Dividing sums by these makes the loss and its gradient independent of how a step is cut into micro-batches and
    processes, also when the pieces differ in size.
    """
    prompts = sum(len(batch["rejected_counts"]) for batch in batches)
    tokens = sum(int(batch["chosen_tokens"].sum()) for batch in batches)
    counts = torch.tensor([[prompts, tokens]], dtype=torch.int64, device=device)
    return accelerator.gather(counts).sum(dim=0) if accelerator.num_processes > 1 else counts[0]


class RewardMeter:
    """Collects what TRL's DPO logs (`rewards/*`, `logps/*`), weighted by prompts, until `take` reads it off.

    `rewards/accuracies` is the share of prompts whose chosen answer beats ALL rejected ones; `rewards/margins` is
    chosen minus the mean of the rejected, `rewards/hardest_margins` chosen minus the best of them. Rejected answers are
    averaged per prompt first. With K = 1 all but the last are TRL's numbers.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, list[torch.Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def add(
        self,
        mode: str,
        accelerator: Any,
        rewards_B: torch.Tensor,
        rewards_BK: torch.Tensor,
        there_BK: torch.Tensor,
        logps_B: torch.Tensor,
        logps_BK: torch.Tensor,
        extra: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Take in one batch: rewards are beta times the log-ratios. `extra` holds sums over the batch's prompts."""
        counts_B = there_BK.sum(dim=1)
        mean_B = (rewards_BK * there_BK).sum(dim=1) / counts_B
        best_B = rewards_BK.masked_fill(~there_BK, -torch.inf).amax(dim=1)
        values = {
            "rewards/chosen": rewards_B.sum(),
            "rewards/rejected": mean_B.sum(),
            "rewards/accuracies": (rewards_B > best_B).sum(),
            "rewards/margins": (rewards_B - mean_B).sum(),
            "rewards/hardest_margins": (rewards_B - best_B).sum(),
            "logps/chosen": logps_B.sum(),
            "logps/rejected": ((logps_BK * there_BK).sum(dim=1) / counts_B).sum(),
            **(extra or {}),
        }
        row = torch.stack([torch.as_tensor(len(rewards_B), device=rewards_B.device), *values.values()])
        row = accelerator.gather(row.detach().float().unsqueeze(0)).sum(dim=0)
        for name, value in zip(("prompts", *values), row):
            self._sums[mode][name].append(value)

    def take(self, mode: str) -> dict[str, float]:
        """Means per prompt since the last call; empty when nothing came in."""
        sums = {name: float(torch.stack(values).sum()) for name, values in self._sums[mode].items()}
        self._sums[mode].clear()
        prompts = sums.pop("prompts", 0.0)
        return {name: value / prompts for name, value in sums.items()} if prompts else {}


def check_beta(beta: float) -> None:
    """Raise TrainingError unless beta is a positive number."""
    if not beta > 0 or beta == float("inf"):
        raise TrainingError(f"beta is {beta}: give a positive number, such as 0.1 (gentle) or 1.0 (S-DPO).")


def check_same_vocabulary(model: Any, ref_model: Any, tokenizer: Any = None) -> None:
    """Policy and reference score the same tokens of the same catalogue.

    Args:
        model, ref_model: policy and reference.
        tokenizer: of the policy. A reference that was loaded from a folder with a tokenizer must have the same token at
            every id that both know (a reference of the base vocabulary, to which item tokens were added since, is fine).

    Raises:
        IncompatibleComponentsError: they do not.
    """
    policy, reference = (m.get_output_embeddings().weight.shape[0] for m in (model, ref_model))
    if policy != reference:
        raise IncompatibleComponentsError(
            f"the reference has {reference} tokens, the policy {policy}: log-ratios need one vocabulary. {_REFERENCE_FIX}"
        )
    theirs = None if tokenizer is None else _tokenizer_beside(ref_model)
    if theirs is not None:
        _check_same_tokens(tokenizer, theirs)
    policy = _fingerprint(model.config) or _fingerprint(tokenizer)
    reference = _fingerprint(ref_model.config) or _fingerprint(theirs)
    if policy and reference and policy != reference:
        raise IncompatibleComponentsError(
            f"the reference was made for catalogue {reference[:12]}, the policy for {policy[:12]}: use one catalogue. "
            f"{_REFERENCE_FIX}"
        )


def _fingerprint(holder: Any) -> str:
    return getattr(holder, "catalogue_fingerprint", None) or ""


def _tokenizer_beside(model: Any) -> Any:
    """The tokenizer in the local folder that a model was loaded from; None where there is none."""
    folder = Path(getattr(model.config, "_name_or_path", None) or "")
    if not folder.name or not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _check_same_tokens(tokenizer: Any, theirs: Any) -> None:
    ours = {number: token for token, number in tokenizer.get_vocab().items()}
    for token, number in sorted(theirs.get_vocab().items(), key=lambda entry: entry[1]):
        if ours.get(number, token) != token:
            raise IncompatibleComponentsError(
                f"token {number} is {token!r} in the tokenizer of the reference ({theirs.name_or_path}) and {ours[number]!r} in "
                f"the policy's: log-ratios need one vocabulary. {_REFERENCE_FIX}"
            )
