"""Cases of sequence parallelism, one after the other, in the ranks that share each row; see run_parallel.py.

    python run_sequence.py OUT TENSOR CASE...

TENSOR is the number of slices of each layer; the rest of the ranks share rows.
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from run_parallel import CPU, batch, far, main, make, note_masks
from torch import nn
from transformers import AutoModelForSequenceClassification

from lightning_rlhf import LoRA
from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import Policy, RewardModel
from lightning_rlhf.models.backbone import enable_checkpointing
from lightning_rlhf.models.value import ValueModel
from lightning_rlhf.strategies.parallel import SequenceParallel, TensorParallel, draw_alike
from lightning_rlhf.strategies.parallel.functions import part_of

#: Four branches, of which the cut in the middle of the row hits one.
TREES = (1, 4, 1)
SMALL = {1: [Tree([5], [Branch([7])])], 2: [Tree([5, 6], [Branch([7]), Branch([8, 9])])]}


def outputs(model, packed, temperature=0.8):
    """All that a model gives, after a backward pass of a loss with uneven gradients."""
    if isinstance(model, Policy):
        weights = packed.weight / packed.num_scored
        scored = model(packed, entropy=True, temperature=temperature)
        summed = model(batch=packed, entropy=True, temperature=temperature, weights=weights)
        values = [v for v in (*scored, *summed) if v is not None]
    else:
        values = model(packed)
        values = list(values) if isinstance(values, tuple) else [values]
    trained = [v for v in values if v.requires_grad]
    loss = sum((v * torch.linspace(-1, 2, v.numel(), dtype=v.dtype).view(v.shape)).sum() for v in trained)
    loss.backward()
    return [value.detach() for value in (*values, loss)]


def compare(mesh, build, packed=None):
    """Outputs and gradients of a model that ranks run together, against the same one on each rank alone."""
    packed = batch(sizes=TREES) if packed is None else packed
    one, two = build(), build()
    want = outputs(one, packed)
    model = nn.ModuleList([two])
    cutter = None
    if mesh.tensor.size > 1:
        cutter = TensorParallel(mesh.tensor, CPU)
        cutter.cut_models(model)
    sharing = SequenceParallel(mesh.sequence, mesh.tensor.size)
    sharing.spread_models(model)
    got = outputs(two, packed)
    own = dict(one.named_parameters())
    grads = {}
    for name, p in two.named_parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=mesh.replicas.group)
            grads[name] = p.grad / mesh.replicas.size
            grads[name] = grads[name] if cutter is None else cutter.whole(p, grads[name])
    assert grads.keys() == {n for n, p in own.items() if p.grad is not None}
    wanted = {name: own[name].grad for name in grads}
    everyone = [None] * mesh.copy.size
    dist.all_gather_object(everyone, got, group=mesh.copy.group)
    sharing.undo()
    if cutter is not None:
        cutter.undo(weights=True)
    return dict(
        outputs=max(far(a, b) for a, b in zip(got, want, strict=True)),
        gradients=max(far(g, wanted[n]) for n, g in grads.items()),
        all_gradients=far(*(torch.cat([each[n].flatten() for n in grads]) for each in (grads, wanted))),
        equal=all(torch.equal(a, b) for other in everyone for a, b in zip(got, other, strict=True)),
        undone=max(far(a, b) for a, b in zip(outputs(two, packed), want, strict=True)),
    )


def cut_places(mesh):
    """Where rows are cut: within a branch of a tree with several, and whether each rank has scored tokens."""
    packed = batch(sizes=TREES)
    start, _ = part_of(packed.num_tokens, mesh.sequence, 1)
    inside = [s.start < start < s.start + s.length for _, branches in packed.forest.trees[1:2] for s in branches]
    return any(inside) and bool((packed.predictor < start).any() and (packed.predictor >= start).any())


# ------------------------------------------------------------------------------------------------- models


def policy(family="llama", lora=None, checkpointing=False, layout="auto", dtype=None, packed=None, trunk_grad=None,
           z_loss=0.0, **changes):  # fmt: skip
    def build():
        model = make(family, lora=lora, **changes)
        if checkpointing:
            enable_checkpointing(model)
        model = Policy(model.to(dtype) if dtype else model, layout, trunk_grad=trunk_grad, z_loss=z_loss).train()
        for p in model.value_head.parameters() if trunk_grad is not None else ():
            nn.init.normal_(p, std=0.3)
        return model

    return lambda mesh: compare(mesh, build, packed)


def head(kind, **options):
    def build():
        return kind(make("llama", AutoModelForSequenceClassification, num_labels=1, **options)).train()

    return lambda mesh: compare(mesh, build)


def spread(model, mesh):
    sharing = SequenceParallel(mesh.sequence)
    sharing.spread_models(nn.ModuleList([model]))
    return sharing


def dropout(mesh):
    """Masks of stretches and of heads differ between ranks; recomputed layers draw again what they drew."""
    model = Policy(make("llama", lora=LoRA(r=4, dropout=0.3), attention_dropout=0.3)).train()
    enable_checkpointing(model.transformer)
    spread(model, mesh)
    torch.manual_seed(5 + mesh.sequence.place)  # ranks that went apart
    draw_alike(mesh.copy)
    masks = note_masks(model)
    packed = pack([Tree(list(range(5, 25)), [Branch(list(range(30, 50)))])])  # halves of equal length
    states = []
    for _ in range(2):
        out = model(packed)
        (out.logprobs * torch.linspace(-1, 1, len(out.logprobs))).sum().backward()
        states.append(torch.get_rng_state())
    every = [None] * mesh.sequence.size
    dist.all_gather_object(every, (masks, states), group=mesh.sequence.group)
    first, other = every[0][0], every[1][0]
    return dict(
        differ=all(not torch.equal(a, b) for n in first for a, b in zip(first[n], other[n], strict=True)),
        recomputed=all(torch.equal(m[0], m[1]) and not torch.equal(m[0], m[2]) for m in masks.values()),
        seen=sorted(masks),
        states=all(torch.equal(a, b) for a, b in zip(every[0][1], every[1][1], strict=True)),
    )


def noise(mesh):
    """Noise on embeddings is that of one process."""
    packed, found = batch(sizes=TREES), []
    model = Policy(make("llama")).train()
    for together in (False, True):
        if together:
            spread(model, mesh)
        torch.manual_seed(3)
        with model.noisy_embeddings(packed, 20.0):
            found.append(model(packed).logprobs.detach())
    return far(*reversed(found)), far(found[0], model(packed).logprobs)


def copied(mesh):
    """A copy of a model runs on all ranks too, and does not run the original."""
    packed, model = batch(sizes=TREES), Policy(make("llama")).eval()
    want = model(packed).logprobs
    spread(model, mesh)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return far(twin(packed).logprobs, want)


def activations(mesh):
    """Bytes that a rank keeps for the backward pass, as a share of those of one process."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (512,), generator=g).tolist()
    packed = pack([Tree(ids[:64], [Branch(ids[64 * i : 64 * i + 64]) for i in range(1, 8)])])
    found = []
    for together in (False, True):
        model = Policy(make("llama", hidden_size=64, intermediate_size=128)).train()
        if together:
            spread(model, mesh)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(x, kept=kept, weights=weights):
            if x.untyped_storage().data_ptr() not in weights:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = model(packed)
        found.append(sum(storage.nbytes() for storage in kept.values()))
        assert out.logprobs.requires_grad
    return found


def refusal(build):
    def case(mesh):
        try:
            SequenceParallel(mesh.sequence).spread_models(nn.ModuleDict({"policy": build()}))
        except ValueError as error:
            return str(error)
        return "nothing"

    return case


LONG_ROPE = {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gemma2")
WINDOWS = {"mistral": dict(sliding_window=6)}
CASES = {
    "cut": cut_places,
    **{family: policy(family, **WINDOWS.get(family, {})) for family in FAMILIES},
    **{f"{family} lora": policy(family, LoRA(r=4), **WINDOWS.get(family, {})) for family in FAMILIES},
    "one key-value head": policy("llama", num_key_value_heads=1),
    "checkpointing": policy("qwen2", LoRA(r=4, modules_to_save=["k_proj"]), checkpointing=True),
    "checkpointing in full": policy("gemma2", checkpointing=True),
    "value head": policy("llama", trunk_grad=0.5),
    "z-loss": policy("llama", z_loss=0.1),
    "reward": head(RewardModel),
    "reward lora": head(RewardModel, lora=LoRA(r=4)),
    "critic": head(ValueModel),
    "two tokens": policy("llama", packed=pack(SMALL[1])),
    "five tokens": policy("llama", LoRA(r=4), packed=pack(SMALL[2])),
    "fp64": policy("llama", dtype=torch.float64),
    "bf16": policy("llama", dtype=torch.bfloat16),
    "dropout": dropout,
    "noise": noise,
    "copied": copied,
    "activations": activations,
    "padded": refusal(lambda: Policy(make("llama"), layout="padded")),
    "heads": refusal(lambda: Policy(make("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=48))),
    "no policy": refusal(lambda: nn.Linear(3, 3)),
    "rope": refusal(lambda: Policy(make("llama", rope_scaling=LONG_ROPE))),
}


if __name__ == "__main__":
    out, slices, *names = sys.argv[1:]
    stretches = int(os.environ["WORLD_SIZE"]) // int(slices)
    main(out, names or CASES, CASES, sequence=stretches, tensor=int(slices))
