"""Cases of pipeline parallelism, one after the other, in the ranks that hold a model together.

    python run_pipeline.py OUT CASE...

Writes what :mod:`run_parallel` writes.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from lightning_rlhf import LoRA
from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import Policy, RewardModel
from lightning_rlhf.models.backbone import enable_checkpointing
from lightning_rlhf.models.roles import RoleModel
from lightning_rlhf.models.value import ValueModel
from lightning_rlhf.strategies.parallel import Cuts, PipelineParallel, TensorParallel, draw_alike
from lightning_rlhf.utils.collectives import all_ranks

sys.path[:0] = [str(Path(__file__).parent)]
import run_parallel  # noqa: E402
from run_parallel import CPU, batch, far, make, note_masks, outputs  # noqa: E402

SIZES = (1, 2, 4, 1, 3)


def compare(build, packed=None, micro_batches=3, call=outputs):
    """Results and gradients of a model in stages, against the same one in one process."""
    packed = batch(sizes=SIZES) if packed is None else packed
    one, two = build(), build()
    want = call(one, packed)
    pipeline = PipelineParallel(all_ranks(), CPU, micro_batches)
    pipeline.cut_models(nn.ModuleList([two]))
    share = sum(p.numel() for p in two.parameters()) / sum(p.numel() for p in one.parameters())
    got = call(two, packed)
    pipeline._running[0].stage.flush()
    own = dict(one.named_parameters())
    gradients = {n: p.grad for n, p in two.named_parameters() if p.grad is not None}
    assert not any(pipeline.is_absent(dict(two.named_parameters())[n]) for n in gradients)
    every = pipeline.collect(gradients)
    if dist.get_rank() == 0:
        assert every.keys() == {n for n, p in own.items() if p.grad is not None}, every.keys() ^ own.keys()
    found = dict(
        outputs=max(far(a, b) for a, b in zip(got, want, strict=True)),
        gradients=max(far(g, own[n].grad) for n, g in every.items()),
        share=share,
        layout=two.layout,
        names=list(two.state_dict()) == list(one.state_dict()),
    )
    with torch.no_grad():
        found["without gradients"] = far(_first(two(packed)), _first(one(packed)))
    with pipeline.whole_weights(two), torch.no_grad():
        found["whole"] = all(torch.equal(p, own[n]) for n, p in two.named_parameters())
        found["alone"] = far(_first(two(packed)), _first(one(packed))) if dist.get_rank() == 1 else 0.0
    found["again"] = far(call(two, packed)[-1], want[-1])
    pipeline.undo(weights=True)
    found["undone"] = far(call(two, packed)[-1], want[-1])
    return found


def _first(out):
    return out[0] if isinstance(out, tuple) else out


def policy(family, lora=None, checkpointing=False, layout="auto", dtype=None, trunk_grad=None, packed=None,
           micro_batches=3, **changes):  # fmt: skip
    def build():
        model = make(family, lora=lora, **changes)
        if checkpointing:
            enable_checkpointing(model)
        model = Policy(model.to(dtype) if dtype else model, layout, trunk_grad=trunk_grad, z_loss=0.01).train()
        for p in model.value_head.parameters() if trunk_grad is not None else ():
            nn.init.normal_(p, std=0.3)
        return model

    return lambda mesh: compare(build, packed, micro_batches)


def head(kind, **options):
    return lambda mesh: compare(
        lambda: kind(make("llama", AutoModelForSequenceClassification, num_labels=1, **options)).train()
    )


def tempered(mesh):
    """Entropies, a temperature and weights."""

    def call(model, packed):
        out = model(packed, entropy=True, temperature=0.7)
        loss = (out.logprobs * torch.linspace(-1, 1, len(out.logprobs))).sum() + out.entropies.square().sum()
        weighted = model(packed, weights=packed.weight / packed.num_scored, temperature=0.7, entropy=True)
        assert not weighted.logprobs.requires_grad and out.correct.dtype == torch.bool
        (loss + weighted.loss).backward()
        return [out.logprobs, out.entropies, out.correct.float(), weighted.logprobs, weighted.z_loss, weighted.loss]

    return compare(lambda: Policy(make("llama"), z_loss=0.1).train(), call=call)


def roles(**changes):
    """One backbone as policy, reference and critic."""

    def build():
        model = RoleModel(make("llama", lora=LoRA(r=4), **changes))
        torch.manual_seed(3)
        for name, p in model.named_parameters():
            if "critic" in name or "value_head" in name:
                nn.init.normal_(p, std=0.1)
        return model.train()

    def call(model, packed):
        with torch.no_grad():
            reference = model(packed, "reference").logprobs
        own, values = model(packed), model(packed, "critic")
        loss = ((own.logprobs - reference) * torch.linspace(-1, 1, len(reference))).sum()
        (loss + values.values.square().sum() + values.last_values.sum()).backward()
        return [reference, own.logprobs, values.values, values.last_values]

    return lambda mesh: compare(build, call=call)


ALIKE = pack([Tree(list(range(3 + i, 15 + i)), [Branch(list(range(20 + i, 30 + i)))]) for i in range(3)])


def in_stages(model):
    """Cuts a model, of which each of three equal trees is then a micro-batch."""
    PipelineParallel(all_ranks(), CPU, 3).cut_models(nn.ModuleList([model]))
    torch.manual_seed(5 + dist.get_rank())  # ranks that went apart
    draw_alike(all_ranks())
    return model


def everywhere(value):
    """What each rank has."""
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def dropout(mesh):
    """Each stage and micro-batch draws masks of its own; recomputed layers draw again what they drew."""
    model = Policy(make("llama", lora=LoRA(r=4, dropout=0.3), attention_dropout=0.3)).train()
    enable_checkpointing(model.transformer)
    masks = note_masks(in_stages(model), layer=dist.get_rank())
    out = model(ALIKE)
    (out.logprobs * torch.linspace(-1, 1, len(out.logprobs))).sum().backward()
    first, other = everywhere(masks)
    states = everywhere(torch.get_rng_state())
    return dict(
        seen=sorted(masks),
        parts=all(not torch.equal(m[0], m[1]) and not torch.equal(m[1], m[2]) for m in masks.values()),
        stages=all(not torch.equal(a, b) for n in first for a, b in zip(first[n], other[n], strict=True)),
        recomputed=all(torch.equal(a, b) for m in masks.values() for a, b in zip(m[:3], m[:2:-1], strict=True)),
        states=torch.equal(*states),
    )


def noise(mesh):
    """The first stage adds to each micro-batch what one process would add to its trees."""
    model = in_stages(Policy(make("llama")).train())
    inputs = []
    model.transformer.model.layers[0].register_forward_pre_hook(lambda layer, args: inputs.append(args[0].detach()))
    with model.noisy_embeddings(ALIKE, 20.0):
        noisy = model(ALIKE).logprobs.detach()
    plain = model(ALIKE).logprobs.detach()
    added = torch.stack(inputs[:3]) - torch.stack(inputs[3:])
    bound = 20.0 / (22 * 32) ** 0.5  # tokens of a tree, and width
    return dict(effect=far(noisy, plain), alike=torch.equal(*everywhere(noisy)), states=torch.equal(*everywhere(
        torch.get_rng_state())), most=(added.abs().max() / bound).item(), square=(added / bound).square().mean().item(),
        parts=not torch.equal(added[0], added[1]))  # fmt: skip


def refusal(build, stages=None):
    def case(mesh):
        ranks = all_ranks() if stages is None else all_ranks()._replace(members=tuple(range(stages)))
        try:
            PipelineParallel(ranks, CPU).cut_models(nn.ModuleList([build()]))
        except ValueError as error:
            return str(error)
        return "nothing"

    return case


def half_cut(mesh):
    """Where stages are refused, slices that were cut before are joined."""
    model = nn.ModuleList([Policy(make("llama"))])
    before = {name: p.clone() for name, p in model.named_parameters()}
    too_many = all_ranks()._replace(members=tuple(range(9)))
    try:
        Cuts(TensorParallel(all_ranks(), CPU), PipelineParallel(too_many, CPU)).cut_models(model)
    except ValueError as error:
        whole = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        return str(error) if whole else "it is not whole"
    return "nothing"


def idle_stage(mesh):
    """The first stage trains nothing."""
    model = nn.ModuleList([Policy(make("llama"))])
    for name, p in model.named_parameters():
        p.requires_grad_("lm_head" in name)
    pipeline = PipelineParallel(all_ranks(), CPU)
    pipeline.cut_models(model)
    try:
        pipeline.check_trained(model)
    except ValueError as error:
        return str(error)


def quantized():
    model = Policy(make("llama"))
    layer = model.transformer.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(56 * 16, 1, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes'
    return model


def encoder():
    config = AutoConfig.for_model("bert", hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                                  num_attention_heads=4, vocab_size=97, num_labels=1)  # fmt: skip
    return RewardModel(AutoModelForSequenceClassification.from_config(config))


def unlike_layers():
    model = make("llama")
    model.model.layers[1].__class__ = type("OtherLayer", (type(model.model.layers[1]),), {})
    return Policy(model)


def shared_layers():
    model = make("llama")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    return Policy(model)


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "gemma2")
ONE_TREE = pack([Tree(list(range(3, 12)), [Branch(list(range(20, 30))), Branch([5, 6])])])
CASES = {
    **{family: policy(family, num_hidden_layers=3, tie_word_embeddings=family == "gemma2") for family in FAMILIES},
    **{f"{family} lora": policy(family, LoRA(r=4)) for family in FAMILIES},
    "gpt2": policy("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "checkpointing": policy("qwen2", checkpointing=True, tie_word_embeddings=True),
    "checkpointing lora": policy("llama", LoRA(r=4), checkpointing=True),
    "lora on the head": policy("llama", LoRA(r=4, targets=["lm_head", "q_proj", "embed_tokens"])),
    "one tree": policy("llama", packed=ONE_TREE),
    "one micro-batch": policy("gemma2", micro_batches=1, tie_word_embeddings=True),
    "value head": policy("llama", trunk_grad=0.5),
    "padded": policy("llama", layout="padded"),
    "bf16": policy("llama", dtype=torch.bfloat16),
    "fp64": policy("llama", dtype=torch.float64, tie_word_embeddings=True),
    "reward": head(RewardModel),
    "reward lora": head(RewardModel, lora=LoRA(r=4)),
    "critic": head(ValueModel),
    "tempered": tempered,
    "roles": roles(),
    "dropout": dropout,
    "noise": noise,
    "too many stages": refusal(lambda: Policy(make("llama")), 3),
    "no model": refusal(lambda: nn.Linear(3, 3)),
    "foreign": refusal(lambda: make("llama")),
    "quantized": refusal(quantized),
    "encoder": refusal(encoder),
    "unlike layers": refusal(unlike_layers),
    "shared layers": refusal(shared_layers),
    "half cut": half_cut,
    "idle stage": idle_stage,
}

#: In three stages and in four, of which those between neither embed nor score.
SEVERAL = {
    "llama": policy("llama", num_hidden_layers=4),
    "gemma2": policy("gemma2", num_hidden_layers=4, tie_word_embeddings=True),
    "gpt2": policy("gpt2", num_hidden_layers=5, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "checkpointing lora": policy("qwen2", LoRA(r=4), checkpointing=True, num_hidden_layers=4),
    "padded": policy("llama", layout="padded", num_hidden_layers=4),
    "one tree": policy("llama", packed=ONE_TREE, num_hidden_layers=4),
    "value head": policy("llama", trunk_grad=0.5, num_hidden_layers=4),
    "reward": head(RewardModel, num_hidden_layers=4),
    "roles": roles(num_hidden_layers=4),
}

if __name__ == "__main__":
    run_parallel.CASES = SEVERAL if int(os.environ["WORLD_SIZE"]) > 2 else CASES
    run_parallel.main(sys.argv[1], sys.argv[2:])
