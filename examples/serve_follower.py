"""Reinforcement learning with a server that follows: a tiny Llama learns to write small numbers.

python examples/serve_follower.py

Two processes share a folder. The server completes prompts over HTTP, and between two answers it follows the newest
version of the trainer. The trainer asks it for completions, rewards them, takes a step of `MaskedAdamW` on a ticket
(group-relative rewards, as in GRPO) and publishes the changes. The folder can be any URL of fsspec, and the random
model one that both sides load with `from_pretrained`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ltp_sparse as ls

VOCABULARY, SMALL, NEW = 32, 8, 8  # tokens; those that are rewarded; tokens of a completion
PROMPTS = torch.arange(3, 27).view(6, 4)
LINEAR = [r"\.(q|k|v|o|gate|up|down)_proj\.weight$"]


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).bfloat16()


def sha256(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- the server -------------------------------------------------------------------------------------------------------


class Served:
    """A model that answers questions and follows the trainer between them."""

    def __init__(self, store: str) -> None:
        self.model = base_model().eval()
        self.follower = ls.sync.Follower(self.model, store)
        self.lock = threading.Lock()  # a version never changes within an answer

    def keep_up(self) -> None:
        while True:
            with self.lock:
                self.follower.follow()
            time.sleep(0.01)

    @torch.no_grad()
    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            answer: dict[str, Any] = {"version": self.follower.version}
            if "prompts" in question:
                prompts = torch.tensor(question["prompts"]).repeat_interleave(question["samples"], 0)
                sequences = self.model.generate(
                    prompts, do_sample=True, top_k=0, max_new_tokens=NEW, min_new_tokens=NEW
                )
                answer["sequences"] = sequences.tolist()
            else:
                answer["sha256"] = sha256(self.model)
            return answer


def serve(store: str, port_file: Path) -> None:
    torch.set_num_threads(1)
    served = Served(store)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps(served.answer(question)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port_file.with_suffix(".new").write_text(str(server.server_port))
    port_file.with_suffix(".new").replace(port_file)
    threading.Thread(target=served.keep_up, daemon=True).start()
    server.serve_forever()


# --- the trainer ------------------------------------------------------------------------------------------------------


class Client:
    """Asks the server, and waits for a version."""

    def __init__(self, port_file: Path, server: subprocess.Popen[bytes]) -> None:
        self.server, self.port_file = server, port_file

    def ask(self, **question: Any) -> dict[str, Any]:
        self.wait_for(self.port_file.exists)
        url = f"http://127.0.0.1:{self.port_file.read_text()}"
        with urllib.request.urlopen(url, json.dumps(question).encode(), timeout=60) as answer:
            return json.load(answer)

    def at(self, version: int, **question: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def there() -> bool:
            found.update(self.ask(**question))
            return found["version"] == version

        self.wait_for(there)
        return found

    def wait_for(self, there: Any) -> None:
        end = time.monotonic() + 60
        while not there():
            if self.server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no answer from the server, which has ended with {self.server.poll()}")
            time.sleep(0.01)


def log_probabilities(model: LlamaForCausalLM, sequences: torch.Tensor) -> torch.Tensor:
    """[sequences, NEW] of the completed tokens."""
    logits = model(input_ids=sequences).logits[:, -NEW - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, sequences[:, -NEW:, None]).squeeze(-1)


def train(store: str, client: Client, steps: int, samples: int) -> None:
    model = base_model()
    ticket = ls.Ticket.random(model, density=0.2, seed=0, pool=LINEAR)
    optimizer = ls.MaskedAdamW(model, ticket, lr=1e-2, weight_decay=0.0, max_grad_norm=1.0, gradients="packed")
    publisher = ls.sync.Publisher(optimizer, ticket, store)
    publisher.publish(0)
    for step in range(1, steps + 1):
        answer = client.at(step - 1, prompts=PROMPTS.tolist(), samples=samples)
        sequences = torch.tensor(answer["sequences"])
        rewards = (sequences[:, -NEW:] < SMALL).float().mean(1).view(len(PROMPTS), samples)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        loss = -(advantages.view(-1, 1) * log_probabilities(model, sequences)).mean()
        loss.backward()
        optimizer.step()
        published = publisher.publish(step)
        if step % 5 == 0 or step == 1:
            print(f"step {step}: reward {rewards.mean():.2f}, published {published.nbytes:,} bytes", flush=True)
    served = client.at(steps)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    same = "equal to" if served["sha256"] == sha256(model) else "other than"
    print(f"the server is at version {served['version']}, its weights are {same} the trainer's ({whole:,} bytes)")
    if same != "equal to":
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=16, help="completions of each prompt")
    parser.add_argument("--serve", nargs=2, metavar=("STORE", "PORT_FILE"), help="be the server (main starts it)")
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve[0], Path(options.serve[1]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, port_file = f"{folder}/weights", Path(folder, "port")
        server = subprocess.Popen([sys.executable, __file__, "--serve", store, str(port_file)])
        try:
            train(store, Client(port_file, server), options.steps, options.samples)
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
