"""Any chat model of transformers as a function from conversations to answers, and answers that are lists of given titles.

The content of a message never becomes a control token: the tokenizer's chat template is rendered around unguessable marks,
cut there, and each content is encoded by a backend in which control tokens do not exist (identifiers/segments.py).

Shape legend: B conversations, T tokens.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError

from ...errors import GenRecError, IncompatibleComponentsError, RequestError
from ...identifiers.segments import encode_segments, text_encoder
from ..search import evaluating
from .list_processor import CandidateListProcessor, split_list
from .prompts import Message


def chat_token_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's answer begins. Contents are text and nothing else.

    Raises:
        IncompatibleComponentsError: no chat template, or one that refuses the conversation or leaves a message out.
        RequestError: something that is no list of messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise IncompatibleComponentsError(
            f"{type(tokenizer).__name__} has no chat template: load the tokenizer of an instruction-tuned model, or set "
            "tokenizer.chat_template."
        )
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RequestError(f"message {place} is {message!r}; it must be {{'role': str, 'content': str}}.")
    marks = [secrets.token_hex(16) for _ in messages]
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks)]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ValueError) as error:
        raise IncompatibleComponentsError(
            f"the chat template refuses a conversation of {[message['role'] for message in messages]}: {error}; leave "
            "out the system message, or use another template."
        ) from error
    pieces = re.split(f"({'|'.join(marks)})", text) if marks else [text]
    contents = {mark: message["content"] for mark, message in zip(marks, messages)}
    for place, mark in enumerate(marks):
        if mark not in pieces:
            raise IncompatibleComponentsError(
                f"the chat template leaves out message {place} (role {messages[place]['role']!r}); use a role it knows."
            )
    return encode_segments(
        tokenizer,
        [("text", contents[piece]) if piece in contents else ("template", piece) for piece in pieces if piece],
    )


class ChatModel:
    """A causal language model and its tokenizer as a chat function: `chat(conversations) -> answers`.

    Args:
        model, tokenizer: the tokenizer must have a chat template and a padding or end token.
        batch_size: conversations generated together; changes speed, not answers (up to rounding).
        max_new_tokens: longest answer.
        generate: more arguments of `model.generate`, e.g. `do_sample=True, temperature=0.2`. Default: greedy.

    Raises:
        IncompatibleComponentsError: no padding or end token, no chat template, or a model that is no causal LM.
        RequestError: a conversation that leaves no room for the answer (row named).
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int = 8, max_new_tokens: int = 512, **generate: Any
    ) -> None:
        if batch_size < 1 or max_new_tokens < 1:
            raise RequestError(f"batch_size and max_new_tokens must be at least 1: {batch_size}, {max_new_tokens}.")
        if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
            raise IncompatibleComponentsError(f"{type(model).__name__} is no causal language model, so it cannot chat.")
        if tokenizer.eos_token_id is None:
            raise IncompatibleComponentsError("the tokenizer has no end token: set tokenizer.eos_token.")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.generate = {"do_sample": False, **generate}
        if not self.generate["do_sample"]:  # else transformers warns about sampling options the model's folder brings
            self.generate = {"temperature": None, "top_p": None, "top_k": None, **self.generate}
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @classmethod
    def from_pretrained(cls, name: str, *, device: Any = None, **options: Any) -> ChatModel:
        """A chat model of transformers by its folder or Hub id, in the precision it was saved in.

        Args:
            device: where it runs; default a GPU where there is one.
            options: of the class.

        Raises:
            IncompatibleComponentsError: nothing that can be loaded, no safetensors, no causal LM, or no chat template.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            if getattr(tokenizer, "chat_template", None) is None:  # the weights need not be read
                raise IncompatibleComponentsError(
                    f"the chat model {name!r} has no chat template: name an instruction-tuned model, not its base model."
                )
            model: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype="auto", use_safetensors=True, trust_remote_code=False
            )
        except GenRecError:
            raise
        except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise IncompatibleComponentsError(
                f"the chat model {name!r} cannot be loaded ({reason}); give the folder or Hub id of an instruction-tuned "
                "causal language model with safetensors."
            ) from error
        chat_token_ids(tokenizer, [{"role": "user", "content": "x"}])
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer, **options)

    def identity(self) -> dict[str, Any]:
        """What of this object an answer depends on, as JSON values (see `AnswerCache`): the weights, not the name."""
        digest = blake2b(digest_size=16)
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        unimportant = ("_name_or_path", "transformers_version")
        configs = [self.model.config, self.model.generation_config]
        settings = [{k: v for k, v in one.to_dict().items() if k not in unimportant} for one in configs]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        digest.update(
            json.dumps([settings, words, self.tokenizer.chat_template], sort_keys=True, default=repr).encode()
        )
        generate = json.loads(json.dumps(self.generate, default=repr))
        return {"chat_model": digest.hexdigest(), "max_new_tokens": self.max_new_tokens, "generate": generate}

    def __call__(
        self, conversations: Sequence[Sequence[Message]], on_answer: Callable[[int, str], None] | None = None
    ) -> list[str]:
        """One answer per conversation; `on_answer` is called with each row and answer as soon as it is there."""
        prompts = [chat_token_ids(self.tokenizer, messages) for messages in conversations]
        answers = [""] * len(prompts)
        for rows in self._batches(prompts, [self.max_new_tokens] * len(prompts)):
            ids = self._generate(rows, prompts, self.max_new_tokens)
            for row, text in zip(rows, self.tokenizer.batch_decode(ids, skip_special_tokens=True)):
                answers[row] = text
                if on_answer is not None:
                    on_answer(row, text)
        return answers

    def complete_lists(
        self,
        conversations: Sequence[Sequence[Message]],
        choices: Sequence[Sequence[str]],
        on_answer: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Answers that are always valid: per conversation all of its choices, each once, one per line, in the order the
        model prefers.

        Each step allows only tokens that continue a choice not yet written (`CandidateListProcessor`). Equal choices
        count once.

        Args:
            choices: one list of texts per conversation. A control token spelled in a text is text.
            on_answer: called with each row and answer as soon as it is there.

        Raises:
            RequestError: no choices, or one without tokens (row named).
            IncompatibleComponentsError: a tokenizer that has no token of its own for a line break or for a comma.
        """
        if len(choices) != len(conversations):
            raise RequestError(f"{len(choices)} lists of choices for {len(conversations)} conversations.")
        distinct = [list(dict.fromkeys(row)) for row in choices]
        encode = text_encoder(self.tokenizer).encode
        tokens = {text: tuple(encode(text)) for row in distinct for text in row}
        for number, texts in enumerate(distinct):
            if not texts or not all(tokens[text] for text in texts):
                raise RequestError(
                    f"row {number}: choices must be at least one text, each with a token; got {texts!r}."
                )
        prompts = [chat_token_ids(self.tokenizer, messages) for messages in conversations]
        answers = [""] * len(prompts)
        separator = self._separator({token for text in tokens.values() for token in text})
        lengths = [sum(len(text) + 1 for text in {tokens[text] for text in row}) for row in distinct]
        for rows in self._batches(prompts, lengths):
            listed = [[tokens[text] for text in distinct[row]] for row in rows]
            processor = CandidateListProcessor(
                listed,
                max(len(prompts[row]) for row in rows),
                separator_token_id=separator,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            length = max(lengths[row] for row in rows)
            ids = self._generate(rows, prompts, length, logits_processor=[processor]).tolist()
            for row, answer in zip(rows, ids):
                end = answer.index(self.tokenizer.eos_token_id)
                # two texts may be one to the tokenizer: they follow one another
                names = [
                    text
                    for part in split_list(answer[:end], separator)
                    for text in distinct[row]
                    if tokens[text] == part
                ]
                answers[row] = "\n".join(names)
                if on_answer is not None:
                    on_answer(row, answers[row])
        return answers

    def _batches(self, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Rows of similar length together (padding costs as much as text does), all of them with room for their answers:
        the longest come last, and what was generated before would be lost."""
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        for rows in batches:
            width, length = len(prompts[rows[-1]]), max(lengths[row] for row in rows)
            if limit is not None and width + length > limit:
                raise RequestError(
                    f"row {rows[-1]}: a prompt of {width} tokens and an answer of up to {length} exceed the model's "
                    f"{limit} positions; lower max_history, the number of candidates, or max_new_tokens."
                )
        return batches

    def _separator(self, used: set[int]) -> int:
        """A token that no choice holds, to stand between two of them: a line break, where it is one token."""
        encode = text_encoder(self.tokenizer).encode
        before = encode("a")
        for text in ("\n", ";", "|", ","):
            after = encode(f"a{text}")
            if after[:-1] == before and after[-1] not in used:
                return after[-1]
        raise IncompatibleComponentsError(
            f"{type(self.tokenizer).__name__} has no token of its own for a line break, a semicolon or a comma, so lists "
            "cannot be told apart; rank without constraint."
        )

    def _generate(self, rows: list[int], prompts: list[list[int]], max_new_tokens: int, **options: Any) -> torch.Tensor:
        """New tokens (B, T) of some prompts, padded on the left while they are read."""
        width = max(len(prompts[row]) for row in rows)
        ids = torch.full((len(rows), width), self.pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, width - len(prompts[row]) :] = torch.tensor(prompts[row])
            mask[place, width - len(prompts[row]) :] = 1
        with evaluating(self.model):
            output = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                **{
                    "max_new_tokens": max_new_tokens,
                    "pad_token_id": self.pad,
                    **self.generate,
                    **options,
                },
            )
        return output[:, width:]
