"""A stand-in for a vLLM server: it speaks the part of vLLM's API that VLLMEngine uses, and is not vLLM.

    with StandIn(model_dir) as server:
        VLLMEngine(server.url, "tiny", tmp_path)

A tiny model of transformers runs behind it in this process, by the package's CachedEngine; log-probs come from a plain
forward pass, as vLLM defines them (``--logprobs-mode``). What paths, fields, statuses and texts of errors are was read
in vLLM's documentation and source; nothing here has been compared with a running vLLM.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.models import Policy
from lightning_rlhf.rollout import CachedEngine, Request, Sampling

#: What can go wrong with a completion, by name.
FAULTS = (
    "busy", "early", "error_400", "error_500", "hang", "no_choices", "no_logprobs", "no_token_ids", "not_json",
    "other_prompt", "reset",
)  # fmt: skip


class StandIn:
    """The server. It ends at the end of a ``with``, or by :meth:`kill`.

    Args:
        model_dir: The model that it serves.
        name: What it calls the model.
        lora: As with ``--enable-lora``.
        runtime_lora: As with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING``.
        dev_mode: As with ``VLLM_SERVER_DEV_MODE=1``.
        max_lora_rank: Its option of that name, as the next two.
        max_model_len: None: the model's.
        logprobs_mode: ``raw_logprobs`` or ``processed_logprobs``.
        api_key: Text of the bearer token that it wants.
        faults: Of the first requests for completions, in the order of arrival; None is no fault.
        deaf: It says that it has taken weights over, and hasn't.
        port: Its port. 0: a free one.

    Attributes:
        url: Its base URL.
        asked: (path, body) of all that it was sent.
        policies: Models by their names.
    """

    def __init__(
        self, model_dir, name="tiny", lora=True, runtime_lora=True, dev_mode=True, max_lora_rank=16, max_model_len=None,
        logprobs_mode="raw_logprobs", api_key=None, faults=(), deaf=False, port=0,
    ):  # fmt: skip
        self.model_dir, self.name, self.lora, self.api_key, self.deaf = model_dir, name, lora, api_key, deaf
        self.runtime_lora, self.dev_mode, self.max_lora_rank = runtime_lora, dev_mode, max_lora_rank
        self.logprobs_mode, self.faults = logprobs_mode, list(faults)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.policies = {name: self.load(model_dir)}
        config = self.policies[name].transformer.config
        self.max_model_len = max_model_len or config.max_position_embeddings
        self.asked, self.roots = [], {name: str(model_dir)}
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"server_of": self}))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """Ends it: nothing listens at its port any more."""
        self._server.shutdown()
        self._server.server_close()

    def load(self, model_dir, adapter=None):
        """A policy, under an adapter."""
        with torch.random.fork_rng(devices=()):
            model = AutoModelForCausalLM.from_pretrained(model_dir).float().eval()
            return Policy(model if adapter is None else PeftModel.from_pretrained(model, adapter), layout="padded")

    def paths(self):
        """The paths of all orders, without those of completions and models."""
        return [path for path, _ in self.asked if path not in ("/v1/completions", "/v1/models")]

    def bodies(self, path="/v1/completions"):
        """What it was sent at a path."""
        return [body for where, body in self.asked if where == path]

    # --------------------------------------------------------------------------------------------- answers

    def answer(self, path, body):
        """Status, and JSON or text."""
        orders = {"/v1/completions": self.complete, "/v1/models": self.models}
        if self.runtime_lora and self.lora:
            orders |= {"/v1/load_lora_adapter": self.load_adapter, "/v1/unload_lora_adapter": self.unload_adapter}
        if self.dev_mode:
            orders |= {"/collective_rpc": self.reload, "/reset_prefix_cache": lambda _: (200, "")}
        return orders[path](body) if path in orders else (404, {"detail": "Not Found"})

    def models(self, _):
        """The model and its adapters."""
        entries = [{"id": name, "object": "model", "root": root} for name, root in self.roots.items()]
        entries[0]["max_model_len"] = self.max_model_len
        return 200, {"object": "list", "data": entries}

    def load_adapter(self, body):
        """Loads an adapter under a new name."""
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.roots:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not path.is_dir():
            return error(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads((path / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        self.policies[name] = self.policies[self.name] if self.deaf else self.load(self.model_dir, path)
        self.roots[name] = str(path)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload_adapter(self, body):
        """Forgets an adapter."""
        if body["lora_name"] not in self.roots:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        del self.policies[body["lora_name"]], self.roots[body["lora_name"]]
        return 200, "Success"

    def reload(self, body):
        """Reads whole weights."""
        assert body["method"] == "reload_weights"
        path = Path(body["kwargs"]["weights_path"])
        if not path.is_dir():
            return error(500, f"{path} is not a directory")
        if not self.deaf:
            self.policies[self.name] = self.load(path)
        return 200, {"results": [None]}

    def complete(self, body):
        """One completion."""
        fault = self.faults.pop(0) if self.faults else None
        if body["model"] not in self.policies:
            return error(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return error(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        if fault == "busy":
            return error(503, "try later")
        if fault in ("error_400", "error_500"):
            return error(int(fault[-3:]), "no such luck")
        if fault == "hang":
            time.sleep(3)
        if fault == "reset":
            return None
        if fault == "not_json":
            return 200, "<html>"
        if fault == "no_choices":
            return 200, {"choices": []}
        return 200, {"model": body["model"], "choices": [self.choice(body, fault)]}

    def choice(self, body, fault):
        """What the model samples, with the fields that are asked for."""
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        sampling = Sampling(
            body["max_tokens"], body["min_tokens"], stop_strings=body["stop"],
            logit_bias={int(k): v for k, v in body["logit_bias"].items()}, **{k: body[k] for k in names},
        )  # fmt: skip
        policy, prompt = self.policies[body["model"]], body["prompt"]
        [[found]] = CachedEngine().generate(
            policy, self.tokenizer, [Request(prompt, [body["seed"]])], sampling, body["stop_token_ids"]
        )
        ids = found.input_ids[:-1] if fault == "early" else found.input_ids
        logprobs = self.logprobs(policy, prompt, ids, sampling.temperature)
        own = logprobs[range(len(ids)), ids].tolist()
        count = body["logprobs"]
        named = [{i, *row.topk(count).indices.tolist()} for i, row in zip(ids, logprobs, strict=True)]
        top = [{f"token_id:{i}": row[i].item() for i in some} for some, row in zip(named, logprobs, strict=True)]
        choice = {"index": 0, "text": found.text, "finish_reason": found.finish_reason, "stop_reason": None}
        if fault != "no_logprobs":
            choice["logprobs"] = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": own, "top_logprobs": top}
        if body["return_token_ids"] and fault != "no_token_ids":
            choice |= {"token_ids": ids, "prompt_token_ids": prompt[1:] if fault == "other_prompt" else prompt}
        return choice

    def logprobs(self, policy, prompt, ids, temperature):
        """(tokens, vocabulary) log-probs before (raw) or after (processed) the temperature."""
        with torch.no_grad(), policy.native_attention() as model:
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        return (logits / (temperature or 1) if self.logprobs_mode == "processed_logprobs" else logits).log_softmax(-1)


def error(status, message):
    """An error as vLLM words it."""
    return status, {"error": {"message": message, "type": "Error", "param": None, "code": status}}


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128


class _Handler(BaseHTTPRequestHandler):
    server_of = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null"))

    def _answer(self, body):
        stand_in = self.server_of
        with stand_in.lock:
            stand_in.asked.append((self.path, body))
            wanted = stand_in.api_key and self.path.startswith("/v1") and f"Bearer {stand_in.api_key}"
            if wanted and self.headers.get("Authorization") != wanted:
                found = 401, {"error": "Unauthorized"}
            else:
                found = stand_in.answer(self.path, body)
        if found is None:
            return  # closes the connection
        status, content = found
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
