"""The shared backbone: each role is what a model of its own would be, and each trains."""

import copy

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from reward_models import reward_adapter_model
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import LoRA, Policy, RewardModel, load_causal_lm
from lightning_rlhf.models.roles import RoleModel
from lightning_rlhf.models.saving import save_pretrained

TREES = [Tree([5, 6, 7], [Branch([8, 9, 4]), Branch([10, 11])]), Tree([12], [Branch([13, 4])])]


def roles(model_dir, lora=None, **options):
    torch.manual_seed(0)
    checkpointing = options.pop("gradient_checkpointing", False)
    model = load_causal_lm(model_dir, lora=lora or LoRA(r=4), gradient_checkpointing=checkpointing)
    found = RoleModel(model, **options)
    for name, p in found.named_parameters():  # adapters begin as nothing
        if p.requires_grad and "lora_B" in name:
            p.data.normal_(0, 0.3)
    if options.get("critic", True):
        found.value_head.weight.data.normal_()
    return found


@pytest.fixture
def reward_adapter(tiny_model_dir, tiny_tokenizer, tmp_path):
    """The directory of a reward model's adapter over the same weights, and what it scores."""
    model = reward_adapter_model(tiny_model_dir, tiny_tokenizer)
    reward = RewardModel(model)
    reward.score_offset = 0.25
    save_pretrained(model, tiny_tokenizer, tmp_path / "reward", adapter_only=True)
    return tmp_path / "reward", reward(pack(TREES), normalize=True).detach()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_policy_and_reference_are_the_models_with_and_without_the_adapter(tiny_model_dir):
    model = roles(tiny_model_dir)
    batch = pack(TREES)
    own = copy.deepcopy(model.model)
    own.delete_adapter("critic")
    with torch.no_grad():
        want = Policy(own)(batch).logprobs
        plain = Policy(AutoModelForCausalLM.from_pretrained(tiny_model_dir))(batch).logprobs
        for _ in range(2):  # in any order
            torch.testing.assert_close(model(batch).logprobs, want)
            torch.testing.assert_close(model(batch, "reference").logprobs, plain)
            model(batch, "critic")
    assert (want - plain).abs().max() > 0.01


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_roles_receive_their_gradients_and_only_theirs(tiny_model_dir, checkpointing):
    """After any switches, with no gradients in between, each role's are those that it gets alone."""
    batch = pack(TREES)
    alone = {}
    for role in ("policy", "critic"):
        model = roles(tiny_model_dir, gradient_checkpointing=checkpointing)
        loss = model(batch).logprobs.sum() if role == "policy" else model(batch, "critic").values.square().sum()
        loss.backward()
        alone[role] = gradients(model)
    assert alone["policy"].keys().isdisjoint(alone["critic"])
    model = roles(tiny_model_dir, gradient_checkpointing=checkpointing)
    with torch.no_grad():
        model(batch, "reference"), model(batch, "critic")
    model(batch).logprobs.sum().backward()
    model(batch, "critic").values.square().sum().backward()
    together = gradients(model)
    assert together.keys() == alone["policy"].keys() | alone["critic"].keys()
    for name, gradient in (alone["policy"] | alone["critic"]).items():
        torch.testing.assert_close(together[name], gradient, msg=name)
    trained = {id(p) for p in [*model.policy_parameters(), *model.critic_parameters()]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(trained) == len(together)


def alone(model_dir, role, **options):
    """The gradients that a role gets by itself, without checkpointing."""
    torch.manual_seed(3)  # of dropout
    model = roles(model_dir, **options)
    loss_of(model, role, pack(TREES)).backward()
    return gradients(model)


def loss_of(model, role, batch):
    return model(batch).logprobs.sum() if role == "policy" else model(batch, "critic").values.square().sum()


def switched_on_by_the_user(model):
    model.transformer.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("order", [("policy", "critic"), ("critic", "policy")])
@pytest.mark.parametrize("kind", ["tree", "inject", "padded", "switched on later", "dora", "saved"])
def test_checkpointed_layers_run_again_in_the_role_that_they_ran_in(tiny_model_dir, order, kind):
    """Both forward passes, others after them, then both backward passes in any order; the second one twice."""
    options = dict(layout="padded") if kind == "padded" else {}
    if kind == "dora":
        options["lora"] = LoRA(r=4, dora=True)
    if kind == "saved":
        options["lora"] = LoRA(r=4, modules_to_save=["embed_tokens", "lm_head"])
    want = {role: alone(tiny_model_dir, role, **options) for role in order}
    model = roles(tiny_model_dir, gradient_checkpointing=kind != "switched on later", **options)
    if kind == "switched on later":
        switched_on_by_the_user(model)
    if kind == "inject":
        model.layout = "inject"
        model._install_hooks()
    batch, other = pack(TREES), pack([Tree([3, 9], [Branch([8, 9, 4])])])
    losses = {role: loss_of(model, role, batch) for role in ("policy", "critic")}
    with torch.no_grad():
        model(other), model(other, "reference"), model(other, "critic")
    model(other).logprobs.sum()  # a graph that nobody goes back through
    for role in order:
        losses[role].backward(retain_graph=True)
    losses[order[1]].backward()
    for role, times in zip(order, (1, 2), strict=True):
        for name, gradient in want[role].items():
            torch.testing.assert_close(model.get_parameter(name).grad, times * gradient, msg=f"{role} {name}")
    assert gradients(model).keys() == want["policy"].keys() | want["critic"].keys()
    assert_the_policy(model)


def adapted(peft):
    return [m for m in peft.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def assert_the_policy(model):
    """As it stands, read by whoever comes: peft, its layers, parameters, attention."""
    own = model.adapters["policy"]
    assert model.model.active_adapters == [own] and model.model.get_model_status().enabled is True
    layers = adapted(model.model)
    assert layers and all(m.active_adapters == [own] and not m.disable_adapters for m in layers)
    trained = {id(p) for p in [*model.policy_parameters(), *model.critic_parameters()]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def by_hand(model, ids):
    """The policy's logits, from its tensors by name: what adapter is switched on does not matter."""
    own = model.adapters["policy"]
    state = {k.removeprefix("base_model.model."): v.detach() for k, v in model.model.state_dict().items()}
    plain = AutoModelForCausalLM.from_config(model.transformer.config, attn_implementation="eager")
    weights = {}
    for name in plain.state_dict():
        layer = name.removesuffix(".weight")
        weights[name] = state[name if name in state else f"{layer}.base_layer.weight"]
        if f"{layer}.lora_A.{own}.weight" in state:
            a, b = (state[f"{layer}.lora_{x}.{own}.weight"] for x in "AB")
            weights[name] = weights[name] + b @ a * (32 / 4)
    plain.load_state_dict(weights)
    with torch.no_grad():
        return plain.eval()(ids, use_cache=False).logits


@pytest.mark.parametrize("role", ["policy", "reference", "critic", "reward"])
@pytest.mark.parametrize("how", ["forward", "backward", "error", "native"])
def test_between_calls_the_model_is_the_policy(tiny_model_dir, tiny_tokenizer, reward_adapter, tmp_path, role, how):
    """Whoever reads it then, and whatever the call came to."""
    model = roles(tiny_model_dir, reward=reward_adapter[0], gradient_checkpointing=how == "backward")
    model.model.eval().model.model.layers[0].train()  # parts in unlike modes
    modes = [m.training for m in model.modules()]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    want = by_hand(model, ids)
    if how == "error":

        def broken(*args):
            raise RuntimeError("out of memory")

        hook = model.transformer.model.layers[1].register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(pack(TREES), role)
        hook.remove()
    elif how == "native":
        model(pack(TREES), role)
        with pytest.raises(KeyboardInterrupt), model.native_attention():
            raise KeyboardInterrupt
    else:
        found = model(pack(TREES), role)
        if how == "backward" and role in ("policy", "critic"):
            found[0].sum().backward()
    assert_the_policy(model)
    assert [m.training for m in model.modules()] == modes
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
    for adapter_only in (False, True):
        save_pretrained(model.model, tiny_tokenizer, tmp_path / "hf", adapter_only=adapter_only)
        loaded = load_causal_lm(tmp_path / "hf")
        torch.testing.assert_close(loaded.eval()(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "lora", [LoRA(r=4), LoRA(r=4, modules_to_save=["lm_head", "embed_tokens"])], ids=["all", "saved"]
)
def test_a_role_is_what_pefts_own_switch_makes_it(tiny_model_dir, reward_adapter, lora):
    """Fails where peft keeps its switches elsewhere, or has another kind of them."""
    model = roles(tiny_model_dir, lora, reward=reward_adapter[0])
    peft = model.model

    def shown():
        found = [(m.disable_adapters, list(m.active_adapters)) for m in adapted(peft)]
        with torch.no_grad():
            return found, peft(torch.tensor([[5, 6, 7]]), use_cache=False).logits

    for role in ("critic", "reference", "reward", "policy"):
        trained = [p.requires_grad for p in model.parameters()]
        with model.playing(role):
            written, logits = shown()
        assert [p.requires_grad for p in model.parameters()] == trained
        own = copy.deepcopy(peft)
        if role == "reference":
            own.base_model.disable_adapter_layers()
        else:
            own.set_adapter(model.adapters[role])
        peft = own
        switched, want = shown()
        peft = model.model
        torch.testing.assert_close(logits, want)
        if role != "reference":
            assert [active for disabled, active in written if not disabled] == [a for off, a in switched if not off]
        assert [disabled for disabled, _ in written] == [disabled for disabled, _ in switched]


def test_a_reward_adapter_scores_as_the_model_it_came_from(tiny_model_dir, reward_adapter):
    directory, want = reward_adapter
    model = roles(tiny_model_dir, reward=directory)
    batch = pack(TREES)
    with torch.no_grad():
        before = model(batch).logprobs
        torch.testing.assert_close(model(batch, "reward"), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(batch).logprobs, before)
    model(batch).logprobs.sum().backward()
    assert not any("reward" in name or "score_head" in name for name in gradients(model))


def test_a_critic_may_start_as_the_reward_model(tiny_model_dir, reward_adapter):
    directory, want = reward_adapter
    torch.manual_seed(0)
    model = RoleModel(load_causal_lm(tiny_model_dir, lora=LoRA(r=8)), critic_init=directory)
    found = model(pack(TREES), "critic")
    torch.testing.assert_close(found.last_values, want, rtol=1e-5, atol=1e-5)  # the value behind a whole completion
    found.values.sum().backward()
    assert {name for name in gradients(model) if "lora_" in name}


def test_an_export_is_the_policy_alone(tiny_model_dir, tiny_tokenizer, reward_adapter, tmp_path):
    model = roles(tiny_model_dir, reward=reward_adapter[0])
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), model.native_attention() as native:
        want = native(ids).logits
    for adapter_only in (False, True):
        out = tmp_path / str(adapter_only)
        save_pretrained(model.model, tiny_tokenizer, out, adapter_only=adapter_only)
        assert not [p for p in out.rglob("*") if "critic" in p.name or "reward" in p.name]
        if adapter_only:
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), out)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(out)
        torch.testing.assert_close(loaded(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(tiny_model_dir, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs adapters"):
        RoleModel(load_causal_lm(tiny_model_dir))
    with pytest.raises(ValueError, match=r"which is the reference here: set lora\.init to true or gaussian\.$"):
        RoleModel(load_causal_lm(tiny_model_dir, lora=LoRA(r=4, init="pissa")))
    with pytest.raises(ValueError, match="holds no adapters"):
        RoleModel(load_causal_lm(tiny_model_dir, lora=LoRA(r=4)), reward=tiny_model_dir)
    policy = load_causal_lm(tiny_model_dir, lora=LoRA(r=4))
    save_pretrained(policy, tiny_tokenizer, tmp_path / "policy", adapter_only=True)
    with pytest.raises(ValueError, match="no score head"):
        RoleModel(load_causal_lm(tiny_model_dir, lora=LoRA(r=4)), reward=tmp_path / "policy")


def test_a_critic_reads_projected_hidden_states():
    """OPT 350m: the hidden states that its head reads are narrower than its layers."""
    config = OPTConfig(
        vocab_size=50,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.0,
    )
    model = RoleModel(load_causal_lm(OPTForCausalLM(config), lora=LoRA(r=4)))
    model.value_head.weight.data.fill_(1.0)
    found = model(pack(TREES), "critic").values
    states = model.hidden(pack(TREES))
    torch.testing.assert_close(found, states.states[states.predictor].sum(-1))
