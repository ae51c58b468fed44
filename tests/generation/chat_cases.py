"""A tiny random chat model, a loopback chat server that plays a script, and readers of prompts, for the ranking tests."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "identifiers"))
from text_tokenizers import byte_level_bpe

TITLES = [f"Film number {chr(65 + i // 26)}{chr(65 + i % 26)}" for i in range(60)]


def shown(conversation) -> list[str]:
    """The candidates of a prompt, as they are listed."""
    listed = conversation[-1]["content"].split("turn to next:\n")[1].split("\n\nRank all")[0]
    return [json.loads(line.split(". ", 1)[1]) for line in listed.splitlines()]


def echo(conversations):
    return ["\n".join(f"{n}. {title}" for n, title in enumerate(shown(one), 1)) for one in conversations]


def tiny_language_model(seed=0):
    """A random Llama that can chat, and its tokenizer."""
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def completion(answer: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]})


class Server:
    """A loopback chat server that plays a script: per request a status (and headers), or a function of the handler; then it
    answers by `reply(messages)`, by default the last word."""

    def __init__(self, script=(), reply=lambda messages: messages[-1]["content"].split()[-1]):
        self.script, self.reply, self.requests, self.times = list(script), reply, [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    outer.times.append(time.monotonic())
                    act = outer.script.pop(0) if outer.script else (200, {}, None)
                if callable(act):
                    return act(self)
                status, headers, raw = act
                if status == "drop":
                    return self.connection.close()
                if raw is None:
                    raw = completion(outer.reply(body["messages"]))
                raw = raw.encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args):
                pass

        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()
