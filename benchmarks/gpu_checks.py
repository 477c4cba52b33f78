"""Whether results on a CUDA card are right, and four figures of its parts; benchmarks/gpu.py runs each in a process.

    python benchmarks/gpu_checks.py NAME             # one of them, by hand
    python benchmarks/gpu_checks.py NAME --cpu-smoke # at toy size on a CPU: shows only that it runs

Checks end with an error where a result is beyond its bound. All models are random.

    card      not a check: the card and versions
    trees     the packed layout's log-probs and gradients are the padded one's: families, windows, soft-capping, grouped
              heads, fp32 and bf16. On a card this runs the flex kernel, and flash attention where no prompt forks
    greedy    the engine's greedy tokens are transformers' generate's, in fp32
    static    static steps, which a CUDA graph repeats, sample what the engine samples step by step, in fp32: families,
              top-k, penalties, merged adapters; weights are to the bit as before
    ppo       an iteration of PPO in fp32: the first ratio is 1, and the weights are those of the CPU's
    resume    a resumed run is the whole one, bit for bit, with deterministic algorithms on
    exports   what is exported computes what the policy does
    zero2, zero2_offload, gemini, gemini_offload, gemini_auto   ColossalAI trains on one card, and losses are those of
              the plain run

    decode    decoding a 1B in bf16 by static steps, 64 rows of 128 new tokens: against generate (goal: 5 times as
              fast), against reading the weights once a token (goal: at most 2.5 times as long), and step by step
    head      the scored head at a vocabulary of 152,000 and 8,192 tokens, against the plain one (goal: at most 1.2
              times its time, at a tenth of its memory)
    groups    an update's passes on groups of 8 (384 + 128 tokens): trees against the padded layout (goal: 3 times)
    serve_4bit   memory of a 7B in 4 bits while it answers (goal: 4.8 GB)
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products want it before the first one
sys.path.insert(0, str(Path(__file__).parent))

import common
import lightning.pytorch as L
import schedule
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from memory import first_letters
from peft import LoraConfig, get_peft_model
from sft import word_tokenizer
from torch import Tensor

from lightning_rlhf import (
    InstructionDataModule,
    Load,
    Policy,
    PPOModule,
    PromptDataModule,
    Rollout,
    Sampling,
    SFTModule,
)
from lightning_rlhf.data import Branch, Tree, pack
from lightning_rlhf.data.templates import set_chat_template
from lightning_rlhf.functional.logprobs import linear_logprobs
from lightning_rlhf.models import load_causal_lm
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.rollout import CachedEngine, Request
from lightning_rlhf.strategies import ColossalAIStrategy
from lightning_rlhf.strategies.colossalai import NAMES

#: Families with what is special about their attention.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": dict(num_key_value_heads=2),
    "Mistral": dict(num_key_value_heads=2, sliding_window=40),
    "Gemma2": dict(num_key_value_heads=1, sliding_window=40, attn_logit_softcapping=5.0, head_dim=16),
    "Qwen2": dict(num_key_value_heads=4),
}


class Place:
    """Where a check runs.

    Args:
        smoke: At toy size on the CPU.
        folder: For files.
    """

    def __init__(self, smoke: bool, folder: Path) -> None:
        self.smoke, self.folder = smoke, folder
        self.device = torch.device("cpu" if smoke else "cuda")
        self.accelerator = "cpu" if smoke else "gpu"

    def seconds(self, work: Callable[[], Any], times: int = 3) -> float:
        """The shortest of several times, after one that is not counted."""
        found = []
        for _ in range(times + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return min(found[1:])

    def wait(self) -> None:
        """Empties the card's queue."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def goals(self, met: dict[str, bool]) -> dict[str, str]:
        """Says which goals are met; none is of a toy."""
        said = ", ".join(f"{goal} {'met' if reached else 'missed'}" for goal, reached in met.items())
        return {} if self.smoke else {"goals": said}

    def peak(self, work: Callable[[], Any]) -> float:
        """Memory that work takes at its peak, in GB; 0 on a CPU."""
        if self.device.type != "cuda":
            work()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e9


def expect(figures: dict[str, Any], name: str, value: float, most: float) -> None:
    """Notes a figure; an error if it is beyond its bound, or NaN."""
    figures[name] = value
    if not value <= most:
        schedule.say(figures)
        sys.exit(f"{name} is {value:.3g}, above {most:g}")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The relative distance of two sets of tensors."""
    one, other = (torch.cat([x[k].detach().cpu().double().flatten() for k in sorted(b)]) for x in (a, b))
    return ((one - other).norm() / other.norm()).item()


def random_model(family: str = "Llama", **changes: Any) -> Any:
    """A random model of two layers."""
    sizes = dict(vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                 max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **FAMILIES[family], **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config)


# ------------------------------------------------------------------------------------------------- right or wrong


def card(place: Place) -> dict[str, Any]:
    name = "CPU" if place.smoke else torch.cuda.get_device_name()
    versions = {package.__name__: package.__version__ for package in (torch, transformers, L)}
    return {"card": name, "cuda": torch.version.cuda, **versions}


def trees(place: Place) -> dict[str, Any]:
    figures, warned = {}, []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lightning_rlhf").addHandler(handler)
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, 500, (n,), generator=draw).tolist()  # noqa: E731
    forks = [Tree(ids(90), [Branch(ids(n)) for n in (60, 7, 45, 30)]), Tree(ids(5), [Branch(ids(140))])]
    none = [Tree(ids(90), [Branch(ids(60))]), Tree(ids(5), [Branch(ids(140))]), Tree(ids(1), [Branch(ids(7))])]
    kinds = [(torch.float32, 1e-3, "", forks), (torch.bfloat16, 0.05, "", forks)]
    kinds += [(torch.bfloat16, 0.05, " without forks", none)]  # flash attention has no fp32
    for family in FAMILIES:
        for dtype, most, which, rows in kinds:
            found = []
            for layout in ("tree", "padded"):
                policy = Policy(random_model(family).to(place.device, dtype), layout=layout)
                out = policy(pack(rows).to(place.device)).logprobs
                out.float().sum().backward()
                grads = {k: p.grad.float() for k, p in policy.named_parameters() if p.grad is not None}
                found.append(({"logprobs": out.float()}, grads))
            name = f"{family} {str(dtype).removeprefix('torch.')}{which}"
            expect(figures, f"{name} log-probs", distance(found[0][0], found[1][0]), most)
            expect(figures, f"{name} gradients", distance(found[0][1], found[1][1]), 10 * most)
    return {**figures, "warnings": warned}


def greedy(place: Place) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    tokenizer = word_tokenizer(500)
    for family in ("Llama", "Qwen2", "Mistral"):
        model = random_model(family).to(place.device).eval()
        prompts = [[(5 + 3 * i + 11 * j) % 500 for j in range(n)] for i, n in enumerate((3, 70, 9))]
        settings = transformers.GenerationConfig(max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
        want = []
        for prompt in prompts:
            row = torch.tensor([prompt], device=place.device)
            whole = model.generate(row, attention_mask=torch.ones_like(row), generation_config=settings)
            want.append(whole[0, len(prompt) :].tolist())
        asked = [Request(prompt, [0, 1]) for prompt in prompts]
        found = CachedEngine().generate(Policy(model), tokenizer, asked, Sampling(24, temperature=0.0), [])
        differ = sum(one.input_ids != w for group, w in zip(found, want, strict=True) for one in group)
        expect(figures, f"{family} completions that differ", differ, 0)
    return figures


def static(place: Place) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    tokenizer = word_tokenizer(500)
    prompts = [[(5 + 3 * i + 11 * j) % 500 for j in range(n)] for i, n in enumerate((3, 70, 9))]
    asked = [Request(prompt, [3 * i, 3 * i + 1, 3 * i + 2]) for i, prompt in enumerate(prompts)]
    settings = Sampling(40, temperature=0.8, top_k=50, repetition_penalty=1.2, min_new_tokens=4)
    for family in (*FAMILIES, "LoRA"):
        torch.manual_seed(0)
        model = random_model("Llama" if family == "LoRA" else family).to(place.device).eval()
        if family == "LoRA":
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        policy = Policy(model)
        before = {name: p.detach().clone() for name, p in policy.named_parameters()}
        groups = [
            CachedEngine(static=way).generate(policy, tokenizer, asked, settings, range(9)) for way in (False, True)
        ]
        one, other = ([completion for group in found for completion in group] for found in groups)
        differ = sum(a.input_ids != b.input_ids for a, b in zip(one, other, strict=True))
        expect(figures, f"{family} completions that differ", differ, 0)
        apart = max(abs(p - q) for a, b in zip(one, other, strict=True)
                    for p, q in zip(a.logprobs, b.logprobs, strict=True))  # fmt: skip
        expect(figures, f"{family} log-probs", apart, 1e-3)
        changed = sum(not torch.equal(p, before[name]) for name, p in policy.named_parameters())
        expect(figures, f"{family} weights that changed", changed, 0)
    return figures


def train(place: Place, module: L.LightningModule, data: L.LightningDataModule, **settings: Any) -> L.Trainer:
    """A quiet run."""
    options = dict(accelerator=place.accelerator, devices=1, logger=False, enable_progress_bar=False,
                   enable_model_summary=False, enable_checkpointing=False, precision="32-true",
                   default_root_dir=place.folder)  # fmt: skip
    trainer = L.Trainer(**{**options, **settings})
    trainer.fit(module, data)
    return trainer


def small_sft(place: Place) -> tuple[SFTModule, InstructionDataModule]:
    tokenizer = word_tokenizer(8192)  # large enough for Gemini to make chunks of
    set_chat_template(tokenizer, "plain")
    module = SFTModule(random_model(vocab_size=len(tokenizer)), tokenizer, lr_scheduler=common.constant)
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{7 * i} w{3 * i}"} for i in range(4, 36)]
    return module, InstructionDataModule(rows, batch_size=8, val_fraction=0.0, cache_dir=place.folder / "cache")


def ppo(place: Place) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    tokenizer, weights = word_tokenizer(500), []
    set_chat_template(tokenizer, "plain")
    start = random_model(vocab_size=len(tokenizer))
    for where in (place, Place(True, place.folder)):
        L.seed_everything(0, verbose=False)
        module = PPOModule(copy.deepcopy(start), first_letters, tokenizer=tokenizer, lr_scheduler=common.constant,
                           load=Load(tf32=False), rollout=Rollout(sampling=Sampling(12, temperature=0.7)))  # fmt: skip
        data = PromptDataModule([{"prompt": f"w{i} w{i + 5}"} for i in range(4, 12)], as_text=True, batch_size=8,
                                val_fraction=0.0, cache_dir=place.folder / "cache")  # fmt: skip
        metrics = train(where, module, data, max_steps=1).callback_metrics
        expect(figures, f"first ratio's error, {where.device.type}", metrics["train/first_ratio_error"].item(), 1e-4)
        expect(figures, f"rollout error, {where.device.type}", metrics["train/rollout_error"].item(), 1e-3)
        weights.append({k: p.detach() for k, p in module.policy.named_parameters()})
    expect(figures, "weights against the CPU's", distance(*weights), 1e-3)
    return figures


def resume(place: Place) -> dict[str, Any]:
    torch.use_deterministic_algorithms(True)
    weights = []
    for stops in ((4,), (2, 4)):
        path = None
        for steps in stops:
            L.seed_everything(0, verbose=False)
            module, data = small_sft(place)
            save = ModelCheckpoint(place.folder / f"{len(stops)}_{steps}", every_n_train_steps=2, save_last=True)
            trainer = L.Trainer(accelerator=place.accelerator, devices=1, logger=False, enable_progress_bar=False,
                                enable_model_summary=False, max_steps=steps, callbacks=[save],
                                default_root_dir=place.folder)  # fmt: skip
            trainer.fit(module, data, ckpt_path=path)
            path = save.last_model_path
        weights.append({k: p.detach().cpu() for k, p in module.policy.named_parameters()})
    unlike = sum(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    figures: dict[str, Any] = {}
    expect(figures, "tensors that differ", unlike, 0)
    return figures


def exports(place: Place) -> dict[str, Any]:
    policy = Policy(random_model().to(place.device).eval())
    folder = save_pretrained(policy.model, word_tokenizer(500), place.folder / "export")
    ids = torch.arange(3, 60, device=place.device)[None]
    with torch.no_grad(), policy.native_attention() as model:
        want = model(input_ids=ids).logits
        got = load_causal_lm(folder).to(place.device).eval()(input_ids=ids).logits
    figures: dict[str, Any] = {}
    expect(figures, "logits", distance({"logits": got}, {"logits": want}), 1e-5)
    return figures


def _colossalai(name: str, precision: str, **options: Any) -> Callable[[Place], dict[str, Any]]:
    def check(place: Place) -> dict[str, Any]:
        losses, figures = [], {}
        sharded = ColossalAIStrategy(**NAMES[f"colossalai_{name}"], **options)
        for strategy, digits in (("auto", "32-true"), (sharded, precision)):
            L.seed_everything(0, verbose=False)
            module, data = small_sft(place)
            trainer = train(place, module, data, max_steps=4, max_epochs=1, strategy=strategy, precision=digits)
            losses.append(trainer.callback_metrics["train/loss"].item())
        expect(figures, "loss against the plain run's", abs(losses[1] - losses[0]) / losses[0], 0.02)
        return figures

    return check


# ------------------------------------------------------------------------------------------------- figures


def decode(place: Place) -> dict[str, Any]:
    rows, new, length = (4, 4, 4) if place.smoke else (64, 128, 64)
    config = common.llama_config(500, 64, 1) if place.smoke else common.llama_config(32_000, 2048, 18, heads=32)
    dtype = torch.float32 if place.smoke else torch.bfloat16
    with torch.device(place.device):
        model: Any = transformers.LlamaForCausalLM(config).to(dtype).eval()
    policy, tokenizer = Policy(model), word_tokenizer(500)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (rows, length), generator=draw)
    asked = [Request(row.tolist(), [i]) for i, row in enumerate(ids)]

    def engine(static: bool) -> Callable[[], Any]:
        return lambda: CachedEngine(static=static).generate(policy, tokenizer, asked, Sampling(new), [])

    own, stepwise = place.seconds(engine(static=True), 2), place.seconds(engine(static=False), 1)
    settings = transformers.GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0,
                                             pad_token_id=0, eos_token_id=None)  # fmt: skip
    inputs = ids.to(place.device)

    def generate() -> None:
        with torch.no_grad(), policy.native_attention() as whole:
            whole.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)

    theirs = place.seconds(generate, 1)
    weights = [p.data for p in model.parameters()]
    reading = place.seconds(lambda: [w.sum() for w in weights])
    figures: dict[str, Any] = {
        "parameters": sum(w.numel() for w in weights),
        "ms a token": 1000 * own / new,
        "tokens a second": rows * new / own,
        "times as fast as generate": theirs / own,
        "times as fast as step by step": stepwise / own,
        "times reading the weights": own / new / reading,
    }
    return figures | place.goals({
        "2.5 times reading": figures["times reading the weights"] <= 2.5,
        "5 times generate": figures["times as fast as generate"] >= 5,
    })  # fmt: skip


def head(place: Place) -> dict[str, Any]:
    tokens, width, vocabulary = (64, 32, 1000) if place.smoke else (8192, 2048, 152_000)
    dtype = torch.float32 if place.smoke else torch.bfloat16
    torch.manual_seed(0)
    states = torch.randn(tokens, width, device=place.device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=place.device, dtype=dtype, requires_grad=True)
    target = torch.randint(vocabulary, (tokens,), device=place.device)

    def scored() -> None:
        linear_logprobs(states, weight, target).logprobs.sum().backward()

    def plain() -> None:
        logits = (states @ weight.T).float()
        logits.log_softmax(-1).gather(1, target[:, None]).sum().backward()

    own, theirs = place.seconds(scored), place.seconds(plain)
    figures: dict[str, Any] = {
        "ms": 1000 * own,
        "times the plain head": own / theirs,
        "GB": place.peak(scored),
        "plain GB": place.peak(plain),
    }
    return figures | place.goals({
        "1.2 times the plain head": own <= 1.2 * theirs,
        "a tenth of its memory": 10 * figures["GB"] <= figures["plain GB"],
    })  # fmt: skip


def groups(place: Place) -> dict[str, Any]:
    prompt, new, size, count = (24, 8, 4, 1) if place.smoke else (384, 128, 8, 4)
    config = common.llama_config(500, 64, 1) if place.smoke else common.llama_config(32_000, 1024, 12, heads=16)
    dtype = torch.float32 if place.smoke else torch.bfloat16
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, 500, (n,), generator=draw).tolist()  # noqa: E731
    batch = pack([Tree(ids(prompt), [Branch(ids(new)) for _ in range(size)]) for _ in range(count)]).to(place.device)
    found = {}
    for layout in ("tree", "padded"):
        torch.manual_seed(0)
        policy = Policy(transformers.LlamaForCausalLM(config).to(place.device, dtype), layout=layout)
        found[layout] = place.seconds(lambda: policy(batch).logprobs.float().sum().backward())  # noqa: B023
    ratio = found["padded"] / found["tree"]
    return {"ms": 1000 * found["tree"], "times as fast as padded": ratio} | place.goals({"3 times": ratio >= 3})


def serve_4bit(place: Place) -> dict[str, Any]:
    tokenizer = word_tokenizer(500)
    config = common.llama_config(500, 64, 1) if place.smoke else common.llama_config(32_000, 4096, 32, heads=32)
    folder = common.write_llama(config, tokenizer, place.folder / "model")
    model = load_causal_lm(folder, dtype="float32" if place.smoke else "bfloat16", quantization="nf4", inference=True)
    policy = Policy(model.to(place.device).eval())
    asked = [Request([(5 + 3 * i + 11 * j) % 500 for j in range(16)], [i]) for i in range(4)]
    new = 4 if place.smoke else 64
    held = 0.0 if place.smoke else torch.cuda.memory_allocated() / 1e9
    most = held + place.peak(lambda: CachedEngine().generate(policy, tokenizer, asked, Sampling(new), []))
    return {"GB held": held, "GB": most} | place.goals({"4.8 GB": most <= 4.8})


CHECKS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "card": card, "trees": trees, "greedy": greedy, "static": static, "ppo": ppo, "resume": resume, "exports": exports,
    "zero2": _colossalai("zero2", "32-true"), "zero2_offload": _colossalai("zero2_offload", "32-true"),
    "gemini": _colossalai("gemini", "bf16-mixed"), "gemini_offload": _colossalai("gemini_offload", "bf16-mixed"),
    "gemini_auto": _colossalai("gemini", "bf16-mixed", placement="auto"),
}  # fmt: skip
FIGURES: dict[str, Callable[[Place], dict[str, Any]]] = {
    "decode": decode, "head": head, "groups": groups, "serve_4bit": serve_4bit,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Runs one, and says its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*CHECKS, *FIGURES])
    parser.add_argument("--cpu-smoke", action="store_true", help="toy size on a CPU")
    options = parser.parse_args(arguments)
    if options.cpu_smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ColossalAI's CPU mode wants no card to be there
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        schedule.say({**CHECKS, **FIGURES}[options.name](Place(options.cpu_smoke, Path(folder))))


if __name__ == "__main__":
    main()
