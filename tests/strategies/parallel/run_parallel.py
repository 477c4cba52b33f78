"""Cases of tensor parallelism, one after the other, in the ranks that hold a model together.

    python run_parallel.py OUT CASE...

Each rank writes to OUT/rankN.pt what it found, by the case's name, and OUT/rankN.txt says how far it came. What one
process finds is computed by each rank before models are cut.
"""

import faulthandler
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf import LoRA, Sampling
from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.functional import linear_logprobs, linear_nll
from lightning_rlhf.functional.logprobs import VocabularySlice
from lightning_rlhf.models import Policy, RewardModel
from lightning_rlhf.models.backbone import enable_checkpointing
from lightning_rlhf.models.value import ValueModel
from lightning_rlhf.rollout import CachedEngine, HFGenerateEngine, Request
from lightning_rlhf.strategies.parallel import Cuts, TensorParallel, draw_alike, make_mesh
from lightning_rlhf.strategies.parallel.functions import part_of
from lightning_rlhf.utils.collectives import once_per_copy, set_copies

sys.path[:0] = [str(Path(__file__).parents[2])]
from conftest import make_tokenizer  # noqa: E402

torch.set_num_threads(1)
V = 97  # odd: two ranks cannot halve it
CPU = torch.device("cpu")


def config(family, **changes):
    sizes = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=V, max_position_embeddings=256, tie_word_embeddings=False,
                 attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    if family in ("qwen3", "gemma2"):
        sizes["head_dim"] = 16
    if family == "gemma2":
        sizes |= dict(query_pre_attn_scalar=16, sliding_window=8)
    if family == "gpt_neox":
        sizes.pop("num_key_value_heads")
    if family == "gpt2":  # whose configs lack both
        sizes.pop("num_key_value_heads"), sizes.pop("intermediate_size")
    return AutoConfig.for_model(family, **{**sizes, **changes})


def make(family="llama", auto=AutoModelForCausalLM, lora=None, **changes):
    """A random model; norms and biases are no ones and zeros, and adapters do something."""
    torch.manual_seed(0)
    model = auto.from_config(config(family, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.dim() == 1 else p.mul_(4)
    if lora is not None:
        model = lora.wrap(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.1)
    return model


def batch(seed=0, sizes=(1, 2, 4, 1)):
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(3, V, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    return pack([Tree(ids(4, 20), [Branch(ids(2, 16)) for _ in range(k)]) for k in sizes])


def far(a, b):
    """Largest difference, by the largest number."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def outputs(model, packed):
    """What a model gives, with a loss that has uneven gradients."""
    if isinstance(model, Policy):
        scored = model(packed, entropy=True)
        values = [v for v in (scored.logprobs, scored.entropies, scored.values, scored.last_values) if v is not None]
        nll = model(packed, weights=packed.weight / packed.num_scored).loss
    else:
        values = model(packed)
        values = list(values) if isinstance(values, tuple) else [values]
        nll = None
    loss = sum((v * torch.linspace(-1, 2, len(v), dtype=v.dtype)).sum() for v in values) + (0.0 if nll is None else nll)
    loss.backward()
    # not the loss, which is a sum in which much cancels
    return [value.detach() for value in (*values, nll) if value is not None]


def compare(make_backbone, mesh, packed=None):
    """Outputs and gradients of a backbone when it is cut, against the same one when it is not."""
    packed = batch() if packed is None else packed
    one, two = make_backbone(), make_backbone()
    want = outputs(one, packed)
    cutter = TensorParallel(mesh.tensor, CPU)
    cutter.cut_models(nn.ModuleList([two]))
    got = outputs(two, packed)
    own = dict(one.named_parameters())
    grads = {n: cutter.whole(p, p.grad) for n, p in two.named_parameters() if p.grad is not None}
    assert grads.keys() == {n for n, p in own.items() if p.grad is not None}
    found = dict(
        outputs=max(far(a, b) for a, b in zip(got, want, strict=True)),
        gradients=max(far(g, own[n].grad) for n, g in grads.items()),
        norm=far(
            Cuts(cutter).clip_grad_norm(list(two.parameters()), 0.1), nn.utils.clip_grad_norm_(one.parameters(), 0.1)
        ),
        clipped=max(far(cutter.whole(p, p.grad), own[n].grad) for n, p in two.named_parameters() if p.grad is not None),
        share=sum(p.numel() for p in two.parameters()) / sum(p.numel() for p in own.values()),
        layout=two.layout,
    )
    cutter.undo(weights=True)
    found["whole"] = all(torch.equal(p, own[n]) for n, p in two.named_parameters())
    found["undone"] = far(outputs(two, packed)[0], want[0])
    return found


# ------------------------------------------------------------------------------------------------- models


def policy(family, lora=None, checkpointing=False, layout="auto", dtype=None, trunk_grad=None, **changes):
    def build():
        model = make(family, lora=lora, **changes)
        if checkpointing:
            enable_checkpointing(model)
        model = Policy(model.to(dtype) if dtype else model, layout, trunk_grad=trunk_grad).train()
        for p in model.value_head.parameters() if trunk_grad is not None else ():
            nn.init.normal_(p, std=0.3)
        return model

    return lambda mesh: compare(build, mesh)


def head(kind, auto=AutoModelForSequenceClassification, **options):
    return lambda mesh: compare(lambda: kind(make("llama", auto, num_labels=1, **options)).train(), mesh)


def scored_head(mesh):
    """The head alone, in fp64, in small blocks, trained and frozen, with bias, soft cap, temperature and z-loss."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((23, 8), (V, 8), (V,)))
    target = torch.randint(V, (23,))
    target[:5] = (hidden[:5] @ weight.T + bias).argmax(-1)  # these are right
    ranks = mesh.tensor
    start, length = part_of(V, ranks)
    part = VocabularySlice(start, -(-V // ranks.size), ranks.group)
    worst = 0.0
    options = dict(temperature=0.7, softcap=5.0, scale=1.3, chunk=3 * V)
    slopes = torch.linspace(-1, 1, 23, dtype=torch.float64)
    for frozen in (False, True):
        for kind in ("logprobs", "nll"):
            sides = []
            for cut in (False, True):
                s = slice(start, start + length) if cut else slice(None)
                h, w, b = (t.clone().requires_grad_(i == 0 or not frozen) for i, t in
                           enumerate((hidden, weight[s], bias[s])))  # fmt: skip
                more = options | (dict(part=part) if cut else {})
                if kind == "logprobs":
                    out = linear_logprobs(h, w, target, b, entropy=True, **more)
                    (out.logprobs @ slopes + out.entropies.square().sum()).backward()
                else:
                    out = linear_nll(h, w, target, slopes, b, entropy=True, z_loss=0.1, **more)
                    (2 * out.loss).backward()
                grads = [h.grad] + ([] if frozen else [w.grad, b.grad])
                values = [t for t in out if t is not None]
                sides.append(values + [g if cut or i == 0 else g[start : start + length] for i, g in enumerate(grads)])
            assert torch.equal(sides[0][2], sides[1][2]) and sides[0][2].any()  # correct
            worst = max(worst, *(far(a, b) for a, b in zip(*reversed(sides), strict=True)))
    return worst


def rollout(engine, family, lora=None, **changes):
    """Sampled tokens of one process, and of the ranks together."""

    def case(mesh):
        tokenizer = make_tokenizer()
        g = torch.Generator().manual_seed(1)
        requests = [
            Request(torch.randint(5, 90, (3 + 2 * i,), generator=g).tolist(), [100 * i + k for k in range(3)])
            for i in range(3)
        ]
        settings = Sampling(max_new_tokens=12, temperature=0.9)
        model = Policy(make(family, lora=lora, vocab_size=len(tokenizer), **changes))

        def sample():
            found = engine().generate(model, tokenizer, requests, settings, (4, len(tokenizer) - 1))
            return [list(map(int, c.input_ids)) for group in found for c in group]

        want = sample()
        cutter = TensorParallel(mesh.tensor, CPU)
        cutter.cut_models(nn.ModuleList([model]))
        again = batch(3)
        got = sample()
        out = model(again)  # the hooks are as they were
        every = [None] * mesh.tensor.size
        dist.all_gather_object(every, got, group=mesh.tensor.group)
        return dict(equal=got == want, ranks=all(e == got for e in every), tokens=sum(map(len, got)),
                    finite=bool(out.logprobs.isfinite().all()))  # fmt: skip

    return case


def note_masks(model, layer=1):
    """Collects what dropout in one layer of a model sets to 0, by the linear layer that reads it."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and f"layers.{layer}" in name:
            module.register_forward_hook(
                lambda m, args, out, name=name: masks.setdefault(name.split(".")[-3], []).append((out == 0).clone())
            )
    return masks


def dropout(mesh):
    """Masks on whole activations are the same on all ranks, those on heads and inner features are not."""
    model = Policy(make("llama", lora=LoRA(r=4, dropout=0.3), attention_dropout=0.3)).train()
    enable_checkpointing(model.transformer)
    cutter = TensorParallel(mesh.tensor, CPU)
    torch.manual_seed(5 + mesh.tensor.place)  # ranks that went apart
    cutter.cut_models(nn.ModuleList([model]))
    draw_alike(mesh.copy)
    masks = note_masks(model)
    states = []
    for _ in range(2):
        out = model(batch())
        (out.logprobs * torch.linspace(-1, 1, len(out.logprobs))).sum().backward()
        states.append(torch.get_rng_state())
    every = [None] * mesh.tensor.size
    wide = {n for n in masks if n in ("o_proj", "down_proj")}
    dist.all_gather_object(every, ({n: m for n, m in masks.items()}, states), group=mesh.tensor.group)
    first, other = every[0][0], every[1][0]
    whole = [n for n in masks if n not in wide]
    norms = [p.grad.norm() for n, p in model.named_parameters() if p.grad is not None and "q_proj.lora_A" in n]
    return dict(
        same=all(torch.equal(a, b) for n in whole for a, b in zip(first[n], other[n], strict=True)),
        differ=all(not torch.equal(a, b) for n in wide for a, b in zip(first[n], other[n], strict=True)),
        recomputed=all(torch.equal(m[0], m[1]) and not torch.equal(m[0], m[2]) for m in masks.values()),
        seen=sorted(masks),
        states=all(torch.equal(a, b) for a, b in zip(every[0][1], every[1][1], strict=True)),
        norms=norms,
    )


def refusal(build):
    def case(mesh):
        try:
            TensorParallel(mesh.tensor, CPU).cut_models(nn.ModuleList([build()]))
        except ValueError as error:
            return str(error)
        return "nothing"

    return case


def incomplete_plan(mesh):
    """A plan that forgets a layer is found before training."""
    model = make("llama")
    plan = dict(model.config.base_model_tp_plan)
    del plan["layers.*.mlp.down_proj"]
    type(model.config).base_model_tp_plan, whole = plan, type(model.config).base_model_tp_plan
    try:
        return refusal(lambda: model)(mesh)
    finally:
        type(model.config).base_model_tp_plan = whole


def foreign(mesh):
    """A transformers model of someone's own: whole logits with their gradients."""
    ids = torch.arange(3, 20)[None]
    one, two = make("llama"), make("llama")
    cutter = TensorParallel(mesh.tensor, CPU)
    cutter.cut_models(nn.Sequential(two))
    for model in (one, two):
        model(input_ids=ids, labels=ids).loss.backward()
    own = dict(one.named_parameters())
    return max(far(cutter.whole(p, p.grad), own[n].grad) for n, p in two.named_parameters())


def new_tokens(mesh):
    """Rows that are trained beside adapters leave embeddings and head whole."""

    def build():
        model = LoRA(r=4).wrap(make("llama"), [5, 90])
        return Policy(model).train()

    return compare(build, mesh)


def grid(mesh):
    """Members of each group, on a mesh with stretches of rows."""
    mesh = make_mesh(timedelta(seconds=300), sequence=2)
    return {name: ranks.members for name, ranks in mesh._asdict().items()}


def verdicts(mesh):
    """What one rank decides counts on all; its error ends all."""
    set_copies(mesh.data, mesh.tensor)
    try:
        same = once_per_copy(lambda: mesh.tensor.place + 40, together=True), once_per_copy(lambda: mesh.tensor.place)
        try:
            once_per_copy(lambda: [][mesh.tensor.place])
        except (IndexError, RuntimeError) as error:
            return same, f"{type(error).__name__}: {error}"
    finally:
        set_copies(None, None)


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gemma2")
CASES = {
    **{f"{family}": policy(family, tie_word_embeddings=family == "gemma2") for family in FAMILIES},
    **{f"{family} lora": policy(family, LoRA(r=4)) for family in FAMILIES if family not in ("mistral", "qwen2")},
    "checkpointing": policy("qwen2", LoRA(r=4, modules_to_save=["k_proj"]), checkpointing=True),
    "lora on the head": policy("llama", LoRA(r=4, targets=["lm_head", "q_proj", "o_proj"])),
    "value head": policy("llama", trunk_grad=0.5),
    "padded": policy("llama", layout="padded"),
    "bf16": policy("llama", dtype=torch.bfloat16),
    "reward": head(RewardModel),
    "reward lora": head(RewardModel, lora=LoRA(r=4)),
    "critic": head(ValueModel),
    "new tokens": new_tokens,
    "scored head": scored_head,
    "foreign": foreign,
    "rollout llama": rollout(CachedEngine, "llama"),
    "rollout qwen3 lora": rollout(CachedEngine, "qwen3", LoRA(r=4)),
    "generate": rollout(HFGenerateEngine, "gpt_neox"),
    "dropout": dropout,
    "verdicts": verdicts,
    "grid": grid,
    "no plan": refusal(lambda: make("gpt2")),
    "fused": refusal(lambda: make("phi3")),
    "heads": refusal(lambda: make("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=48)),
    "width": refusal(lambda: make("llama", intermediate_size=57)),
    "dora": refusal(lambda: make("llama", lora=LoRA(r=4, dora=True))),
    "no model": refusal(lambda: nn.Linear(3, 3)),
    "incomplete plan": incomplete_plan,
}
#: Of four ranks, each with one of four heads.
ON_FOUR = {
    "llama on four": policy("llama", num_key_value_heads=4),
    "qwen3 on four": policy("qwen3", LoRA(r=4), num_key_value_heads=4),
    "rollout on four": rollout(CachedEngine, "llama", num_key_value_heads=4),
}  # fmt: skip


def main(out, names, cases=None, **axes):
    """Runs cases by their names. The axes are those of ``make_mesh``; without any the layers are cut over all ranks."""
    cases = cases or CASES | ON_FOUR
    dist.init_process_group("gloo", init_method="env://", rank=int(os.environ["LOCAL_RANK"]),
                            timeout=timedelta(seconds=300))  # fmt: skip
    mesh = make_mesh(timedelta(seconds=300), **(axes or {"tensor": dist.get_world_size()}))
    found = {}
    with open(Path(out) / f"rank{dist.get_rank()}.txt", "w", buffering=1) as log:
        faulthandler.dump_traceback_later(600, exit=True, file=log)
        for name in names or CASES:
            log.write(f"{time.process_time():.1f} s {name}\n")
            try:
                found[name] = cases[name](mesh)
            except Exception:
                found[name] = traceback.format_exc()
                log.write(found[name])
    torch.save(found, Path(out) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
