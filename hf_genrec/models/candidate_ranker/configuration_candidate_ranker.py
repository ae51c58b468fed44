"""Configuration of the candidate ranker: a language model, a retriever, a prompt and how an answer becomes scores."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from hf_genrec.errors import IncompatibleComponentsError

VERBALIZERS = ("letters", "yes_no", "title", "list")
ANSWER_LOSSES = ("cross_entropy", "yes_bce")
PROJECTORS = ("linear", "mlp")
SLOTS = ("user", "history", "candidates")
FIELDS = ("user", "history", "newest", "disliked", "candidates", "target")


@strict
class CandidateRankerConfig(PreTrainedConfig):
    """What the language model reads and how its answer is scored. Token ids of prompts are those of its own tokenizer.

    Args:
        language_model: configuration of a causal language model of transformers, with its `model_type`.
        retriever: configuration of a recommender of this library that can score the whole catalogue, with its
            `model_type`; its token ids are the item tokenizer's.
        num_items: N, items of the catalogue.
        item_length: most tokens of an item's text.
        prompt: the prompt as token-id lists and names of fields, in order. Fields: "history" (items, oldest first),
            "newest" (the last of them), "disliked" ("history" then has liked items only, and requests must tell both),
            "candidates", "target" (one candidate; everything behind it is read once per candidate) and "user" (a soft
            token).
        item_open, item_close: token ids around every item's text.
        history_separator, candidate_separator: between two items.
        candidate_marks: per place in the candidate list the token ids in front of it ("(A) "); [] = none.
        empty_list: token ids in place of a list without items.
        neutral: token ids in place of a soft token where a prompt is written as text only; [] = nothing.
        verbalizer: "letters" (one token per candidate, one pass ranks all), "yes_no" (pointwise: the answers are two
            tokens), "title" (the likelihood of the candidate's text) or "list" (the model writes the whole list in its own
            order, every candidate once; scores are m, m - 1, ... in that order).
        answer_tokens: the letters' token ids in order of the list, or those of yes and no; [] for titles and lists.
        answer_end: token ids that close a title; for "list" the token between two titles and the one that ends the list.
        answer_loss: "cross_entropy" over the vocabulary at the answer, or "yes_bce": binary cross-entropy on the logit of
            yes alone (2310.19488), for "yes_no"; the score is then that logit's log-sigmoid.
        num_candidates: m, how many items of the retriever the language model ranks.
        candidate_permutations: 0 = the list is shown in the order it comes in; P > 0 = scores are means over P random
            orders of the list, drawn per user and round (they depend on the list alone).
        max_history: newest items that are written into a prompt.
        max_length: longest prompt with its answer, in tokens; None = what the language model can read.
        slots: where soft tokens stand: behind the items of "history" (and "disliked"), behind "candidates" (and the
            target), and in the field "user".
        projector: None, "linear" or "mlp" (linear, activation, linear); needed for slots.
        projector_size: width between the two layers; None = the language model's width.
        projector_act, user_projector_act: activations by their transformers name.
        projector_norm: a layer norm before the activation.
        tokens_per_item: soft tokens per slot.
        item_vector_size, user_vector_size: D and U, widths of what is projected; 0 where there is no such slot.
        codebook_sizes, level_offsets: the item tokenizer's; its codes name the items in a history.
        catalogue_fingerprint: of the item tokenizer's catalogue.

    Raises:
        IncompatibleComponentsError: fields that contradict each other (named).
    """

    model_type = "candidate_ranker"
    auto_map: ClassVar[dict] = {}

    language_model: dict | None = None
    retriever: dict | None = None
    num_items: int = 1
    item_length: int = 1
    prompt: list[Any] | tuple[Any, ...] = ()
    item_open: list[int] | tuple[int, ...] = ()
    item_close: list[int] | tuple[int, ...] = ()
    history_separator: list[int] | tuple[int, ...] = ()
    candidate_separator: list[int] | tuple[int, ...] = ()
    candidate_marks: list[Any] | tuple[Any, ...] = ()
    empty_list: list[int] | tuple[int, ...] = ()
    neutral: list[int] | tuple[int, ...] = ()
    verbalizer: str = "letters"
    answer_tokens: list[int] | tuple[int, ...] = ()
    answer_end: list[int] | tuple[int, ...] = ()
    answer_loss: str = "cross_entropy"
    num_candidates: int = 20
    candidate_permutations: int = 0
    max_history: int = 20
    max_length: int | None = None
    slots: list[str] | tuple[str, ...] = ()
    projector: str | None = None
    projector_size: int | None = None
    projector_act: str = "gelu"
    user_projector_act: str = "gelu"
    projector_norm: bool = False
    tokens_per_item: int = 1
    item_vector_size: int = 0
    user_vector_size: int = 0
    codebook_sizes: list[int] | tuple[int, ...] = (1,)
    level_offsets: list[int] | tuple[int, ...] = (4,)
    vocab_size: int = 5
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        self.level_offsets = [int(offset) for offset in self.level_offsets]
        # a configuration without arguments is needed by transformers: it compares against one when saving
        self.language_model = {"model_type": "llama", **(self.language_model or {})}
        self.retriever = {"model_type": "sasrec", **(self.retriever or {})}
        self.prompt = [part if isinstance(part, str) else [int(token) for token in part] for part in self.prompt]
        self.slots = list(self.slots)
        super().__post_init__(**kwargs)
        self._check_parts()
        self._check_prompt()
        self._check_soft_tokens()

    def _check_parts(self) -> None:
        for name in ("language_model", "retriever"):
            if getattr(self, name)["model_type"] not in CONFIG_MAPPING:
                raise IncompatibleComponentsError(
                    f"{name}.model_type is {getattr(self, name)['model_type']!r}, which transformers does not know; "
                    "name a model type such as 'llama' or 'qwen3' ('sasrec' for the retriever)."
                )
        for name, known in (("verbalizer", VERBALIZERS), ("answer_loss", ANSWER_LOSSES)):
            if getattr(self, name) not in known:
                raise IncompatibleComponentsError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}."
                )
        if self.answer_loss == "yes_bce" and self.verbalizer != "yes_no":
            raise IncompatibleComponentsError(
                f"answer_loss 'yes_bce' reads the logit of yes, but verbalizer is {self.verbalizer!r}; use "
                "'cross_entropy', or verbalizer 'yes_no'."
            )
        for name in ("num_candidates", "max_history", "tokens_per_item"):
            if getattr(self, name) < 1:
                raise IncompatibleComponentsError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.candidate_permutations < 0:
            raise IncompatibleComponentsError("candidate_permutations must be 0 or more.")

    def _check_prompt(self) -> None:
        if not self.prompt:
            return
        fields = [part for part in self.prompt if isinstance(part, str)]
        for field in fields:
            if field not in FIELDS or fields.count(field) > 1:
                raise IncompatibleComponentsError(
                    f"the prompt's field {field!r} is unknown or named twice; fields are {', '.join(FIELDS)}."
                )
        needed = {"letters": "candidates", "yes_no": "target", "list": "candidates"}.get(self.verbalizer)
        if needed and needed not in fields:
            raise IncompatibleComponentsError(
                f"verbalizer {self.verbalizer!r} needs the field {{{needed}}} in the prompt."
            )
        if "target" in fields and (self.verbalizer != "yes_no" or fields[-1] != "target"):
            raise IncompatibleComponentsError(
                "the field {target} is for verbalizer 'yes_no' and must be the last field of the prompt, because what "
                "stands before it is read once for all candidates."
            )
        if self.verbalizer == "list" and len(self.answer_end) != 2:
            raise IncompatibleComponentsError(
                f"verbalizer 'list' needs two tokens in answer_end, between titles and at the end; got {list(self.answer_end)}."
            )
        wanted = {"letters": self.num_candidates, "yes_no": 2}.get(self.verbalizer, 0)
        enough = len(self.answer_tokens) >= wanted if wanted else True
        if not enough or len(set(self.answer_tokens)) != len(self.answer_tokens):
            raise IncompatibleComponentsError(
                f"verbalizer {self.verbalizer!r} with num_candidates {self.num_candidates} needs {wanted} different "
                f"answer_tokens, got {list(self.answer_tokens)}."
            )

    def _check_soft_tokens(self) -> None:
        unknown = [slot for slot in self.slots if slot not in SLOTS]
        if unknown:
            raise IncompatibleComponentsError(f"slots holds {unknown[0]!r}; choose from {', '.join(SLOTS)}.")
        if self.projector is not None and self.projector not in PROJECTORS:
            raise IncompatibleComponentsError(
                f"projector is {self.projector!r}; choose one of {', '.join(PROJECTORS)}, or null."
            )
        if bool(self.slots) != (self.projector is not None):
            raise IncompatibleComponentsError(
                f"slots is {self.slots} and projector is {self.projector!r}: soft tokens need both."
            )
        if self.prompt and ("user" in self.slots) != ("user" in self.prompt):
            raise IncompatibleComponentsError("the slot 'user' and the field {user} of the prompt need each other.")
        for needed, name in ((self.soft_items, "item_vector_size"), ("user" in self.slots, "user_vector_size")):
            if needed and getattr(self, name) < 1:
                raise IncompatibleComponentsError(f"{name} is {getattr(self, name)}; slots {self.slots} need it.")
        for name in ("projector_act", "user_projector_act"):
            if getattr(self, name) not in ACT2FN:
                raise IncompatibleComponentsError(f"{name} {getattr(self, name)!r} is no activation of transformers.")

    def language_config(self) -> PreTrainedConfig:
        """Of the language model."""
        values = dict(self.language_model or {})
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def retriever_config(self) -> PreTrainedConfig:
        """Of the retriever."""
        values = dict(self.retriever or {})
        return AutoConfig.for_model(values.pop("model_type"), **values)

    @property
    def language_vocab_size(self) -> int:
        """Token embeddings of the language model."""
        return int(self.language_config().get_text_config(decoder=True).vocab_size)

    @property
    def item_placeholder_id(self) -> int:
        """Stands where an item's soft token goes. Outside the vocabulary, so that no text can hold it."""
        return self.language_vocab_size

    @property
    def user_placeholder_id(self) -> int:
        """Stands where the user's soft token goes."""
        return self.language_vocab_size + 1

    @property
    def rated_history(self) -> bool:
        """Does the prompt show liked and disliked items apart?"""
        return "disliked" in self.prompt

    @property
    def soft_items(self) -> bool:
        """Do items have soft tokens anywhere?"""
        return "history" in self.slots or "candidates" in self.slots

    @property
    def length_limit(self) -> int | None:
        """Most tokens of a prompt with its answer."""
        if self.max_length is not None:
            return self.max_length
        return getattr(self.language_config().get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)
