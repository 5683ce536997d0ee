"""A small OpenAI-like server in a thread, over any model, with what it offers as switches."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.audited import continued, logprobs_of

EVERYTHING = frozenset({"prompt_logprobs", "echo", "logprobs", "chat", "chat_logprobs"})


@dataclass
class Engine:
    """model: ids [1, T] to logits [1, T, V]. chat_ids: messages to the ids of the prompt."""

    model: object
    tokenizer: object
    chat_ids: object = None
    report: object = None
    offers: frozenset = EVERYTHING
    decimals: int | None = None
    with_ids: bool = False  # llama.cpp's way: each token with its id
    requests: list = field(default_factory=list)  # (path, body, headers)

    def table(self, ids):
        return logprobs_of(self.model, ids, self.report)

    def number(self, x):
        x = x.item()
        return round(x, self.decimals) if self.decimals is not None else x

    def piece(self, id):
        return self.tokenizer.decode([id])

    def named(self, table, position, id, top):
        row = table[position - 1]
        others = row.topk(top).indices.tolist() if top else []
        told = [self.one(row, other) for other in others]
        return {**self.one(row, id), "top_logprobs": told}

    def one(self, row, id):
        found = {"token": self.piece(id), "bytes": list(self.tokenizer.token_bytes(id))}
        return {**found, "logprob": self.number(row[id])} | ({"id": id} if self.with_ids else {})

    def completion(self, body):
        prompt = body["prompt"]
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        whole = continued(self.model, ids, body["max_tokens"])
        choice = {"index": 0, "text": self.tokenizer.decode(whole[len(ids) :])}
        table = self.table(whole)
        if "prompt_logprobs" in body and "prompt_logprobs" in self.offers:
            told = [
                {str(ids[i]): {"logprob": self.number(table[i - 1, ids[i]]), "rank": 1}}
                for i in range(1, len(ids))
            ]
            choice["prompt_logprobs"] = [None, *told]
        if body.get("logprobs") and "logprobs" in self.offers:
            first = 0 if body.get("echo") and "echo" in self.offers else len(ids)
            choice["logprobs"] = self.told(whole, first, table)
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def told(self, whole, first, table):
        if self.with_ids:
            places = range(max(first, 1), len(whole))
            return {"content": [self.named(table, i, whole[i], 0) for i in places]}
        numbers = [
            self.number(table[i - 1, whole[i]]) if i else None for i in range(first, len(whole))
        ]
        return {"tokens": [self.piece(id) for id in whole[first:]], "token_logprobs": numbers}

    def chat(self, body):
        encode = self.chat_ids or self.tokenizer.encode_chat
        ids = encode(body["messages"])
        whole = continued(self.model, ids, body["max_tokens"])
        text = self.tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        if body.get("logprobs") and "chat_logprobs" in self.offers:
            table = self.table(whole)
            top = body.get("top_logprobs", 0)
            places = range(len(ids), len(whole))
            told = [self.named(table, i, whole[i], top) for i in places]
            choice["logprobs"] = {"content": told}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def do_GET(self):
        self.engine.requests.append((self.path, None, dict(self.headers)))
        self.answer({"data": [{"id": "served"}]} if self.path == "/v1/models" else None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.engine.requests.append((self.path, body, dict(self.headers)))
        if self.path == "/v1/completions" and not self.engine.offers <= {"chat", "chat_logprobs"}:
            self.answer(self.engine.completion(body))
        elif self.path == "/v1/chat/completions" and "chat" in self.engine.offers:
            self.answer(self.engine.chat(body))
        else:
            self.answer(None)

    def answer(self, value):
        data = json.dumps({"error": "not here"} if value is None else value).encode()
        self.send_response(404 if value is None else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(engine, handler=Handler):
    """The address of a server that runs in a thread until the block ends."""
    kind = type("Bound", (handler,), {"engine": engine})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Scripted(Handler):
    """Answers each request with the same bytes. engine: (status, headers, body)."""

    def do_GET(self):
        self.say()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.say()

    def say(self):
        status, headers, body = self.engine
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)
