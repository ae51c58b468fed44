"""Stages of candidate rankers as data: what each stage trains, on which prompts, with the values of its paper.

TALLRec (arXiv 2305.00447), CoLLM (2310.19488), LLaRA (2312.02445), A-LLMRec (2404.11343), LlamaRec (2311.02089), and
LLMRank (2305.08845), which trains nothing.
The table gives for each the stages, the adapters and the fields of the ranker's configuration that go with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_genrec.errors import TrainingError
from hf_genrec.models.candidate_ranker.prompts import WORDINGS

TRAINS = ("lora", "language_model", "projector")
PROMPTS = ("hybrid", "text", "curriculum")
ROWS = ("candidates", "instructions", "alignment")


@dataclass(frozen=True)
class RankerStage:
    """One stage. What it does not name in `trains` stays as it is, bit by bit.

    Args:
        name: of the stage's folder.
        trains: of "lora" (adapters inside the language model, kept for later stages), "language_model" (all of it) and
            "projector" (of items and users).
        prompts: "hybrid" (soft tokens), "text" (none), or "curriculum": a batch is hybrid with probability step / steps
            (LLaRA), text otherwise.
        rows: "candidates", "instructions" (token rows given to `train_candidate_ranker`; the stage is left out without
            them), or "alignment" (stage 1 of A-LLMRec: makes the item vectors, uses no language model).
        answer_loss: in place of the configuration's.
        negatives: "random" or "popularity".
        options: fields of the training arguments that differ in this stage.

    Raises:
        TrainingError: an unknown word, or nothing to train.
    """

    name: str
    trains: tuple[str, ...] = ()
    prompts: str = "hybrid"
    rows: str = "candidates"
    answer_loss: str | None = None
    negatives: str = "random"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known, given in (
            ("trains", TRAINS, self.trains),
            ("prompts", PROMPTS, (self.prompts,)),
            ("rows", ROWS, (self.rows,)),
            ("negatives", ("random", "popularity"), (self.negatives,)),
        ):
            for word in given:
                if word not in known:
                    raise TrainingError(f"stage {self.name}: {name} holds {word!r}; choose from {', '.join(known)}.")
        if not self.trains and self.rows != "alignment":
            raise TrainingError(f"stage {self.name}: trains is empty; name at least one of {', '.join(TRAINS)}.")
        if {"lora", "language_model"} <= set(self.trains):
            raise TrainingError(f"stage {self.name}: train either 'lora' or the whole 'language_model', not both.")
        if "projector" in self.trains and self.prompts == "text":
            raise TrainingError(f"stage {self.name}: text prompts have no soft tokens, so the projector cannot learn.")


@dataclass(frozen=True)
class LoraOptions:
    """Size and place of the adapters.

    Args:
        r, alpha, dropout: as usual.
        target_modules: names of the layers, or "all-linear" (all but the head).
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")


@dataclass(frozen=True)
class RankerMethod:
    """Stages, adapters and the arguments of `CandidateRankerForCausalLM.from_language_model` of one published ranker."""

    stages: tuple[RankerStage, ...]
    lora: LoraOptions | None
    fields: Mapping[str, Any]


RANKER_METHODS: dict[str, RankerMethod] = {
    "tallrec": RankerMethod(
        (
            RankerStage("instructions", ("lora",), "text", "instructions", "cross_entropy"),
            RankerStage("yes_no", ("lora",), "text", options={"learning_rate": 3e-4}),  # repo default; scripts: 1e-4
        ),
        LoraOptions(8, 16, 0.05),
        {"verbalizer": "yes_no"},
    ),
    "collm": RankerMethod(
        (
            RankerStage("text", ("lora",), "text", options={"learning_rate": 1e-3, "weight_decay": 1e-3}),
            RankerStage("mapping", ("projector",), options={"learning_rate": 1e-3, "weight_decay": 1e-3}),
        ),
        LoraOptions(8, 16, 0.05),
        # its mapping is d -> 10 d -> H: set projector_size to 10 times item_vector_size
        {
            "verbalizer": "yes_no",
            "answer_loss": "yes_bce",
            "slots": ("user", "candidates"),
            "projector": "mlp",
            "projector_act": "relu",
            "user_projector_act": "relu",
        },
    ),
    "llara": RankerMethod(
        (RankerStage("curriculum", ("lora", "projector"), "curriculum", options={"learning_rate": 8e-4}),),
        LoraOptions(8, 32, 0.1, "all-linear"),
        {
            "verbalizer": "title",
            "slots": ("history", "candidates"),
            "projector": "mlp",
            "projector_act": "gelu",
            "num_candidates": 20,
        },
    ),
    "a_llmrec": RankerMethod(
        (
            RankerStage("alignment", rows="alignment", options={"learning_rate": 1e-4}),
            RankerStage("projectors", ("projector",), options={"learning_rate": 1e-4}),
        ),
        None,
        {
            "verbalizer": "title",
            "slots": ("user", "history", "candidates"),
            "projector": "mlp",
            "projector_norm": True,
            "projector_act": "gelu",
            "user_projector_act": "leaky_relu",
            "wording": WORDINGS["title"].replace("{bos}{user}", "{user}{bos}"),  # the user stands before everything
            "num_candidates": 20,
            "max_history": 10,
        },
    ),
    "llamarec": RankerMethod(
        (RankerStage("letters", ("lora",), "text", options={"learning_rate": 1e-4}),),
        LoraOptions(8, 32, 0.05),  # dropout unverified: our choice
        {"verbalizer": "letters", "num_candidates": 20, "max_history": 20},
    ),
    "llmrank": RankerMethod(
        (),
        None,
        {"verbalizer": "list", "num_candidates": 20, "candidate_permutations": 3, "max_history": 5},
    ),
}
