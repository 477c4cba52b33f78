"""Frozen models are on the device only while they are asked, and the results are the same."""

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from runs import load_script

from lightning_rlhf import Critic, LoRA, PPOModule
from lightning_rlhf.models import load_reward_model
from lightning_rlhf.models.saving import save_pretrained

run_ppo = load_script(Path(__file__).parents[1] / "stages" / "run_ppo.py")


@pytest.fixture(scope="module")
def rewards(tiny_model_dir, tmp_path_factory):
    """A whole reward model, and the adapter that it was made of."""
    from transformers import AutoTokenizer

    out, tokenizer = tmp_path_factory.mktemp("reward"), AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(1)
    model = load_reward_model(tiny_model_dir, lora=LoRA(r=4), pad_token_id=tokenizer.pad_token_id)
    for name, p in model.named_parameters():
        if "lora_B" in name or "score" in name:
            p.data.normal_(0, 0.3)
    return {only: str(save_pretrained(model, tokenizer, out / str(only), adapter_only=only)) for only in (False, True)}


class Moves(L.Callback):
    """Where a frozen model was sent last, and where both were whenever one was asked, sampled from, or trained.

    A CPU is no second device, so what counts is that ``Module.to`` is called with the module's own device, or with
    ``"cpu"``.
    """

    def on_fit_start(self, trainer, pl_module):
        self.place, self.calls, self.moved = {}, {}, 0
        frozen = {name: getattr(pl_module, name) for name in ("reward", "reference") if hasattr(pl_module, name)}
        for name, model in frozen.items():
            self.place[name] = "device"  # where the strategy put it
            model.to = self.recorded(name, model.to)
            model.register_forward_pre_hook(lambda *_, name=name: self.note(name, name))
        generate = pl_module.engine.generate

        def sampled(*args):
            self.note("rollout", *frozen)
            return generate(*args)

        pl_module.engine.generate = sampled
        for name in ("policy", "critic"):
            if hasattr(pl_module, name):
                model = getattr(pl_module, name)
                model.register_forward_pre_hook(
                    lambda *_: self.note("learning", *frozen) if torch.is_grad_enabled() else None
                )

    def recorded(self, name, move):
        def to(device):
            self.place[name] = "cpu" if device == "cpu" and isinstance(device, str) else "device"
            self.moved += 1
            return move(device)

        return to

    def note(self, phase, *names):
        self.calls.setdefault(phase, set()).update((name, self.place[name]) for name in names)

    def on_train_start(self, trainer, pl_module):
        self.note("start", *self.place)

    def on_train_end(self, trainer, pl_module):
        self.note("end", *self.place)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_frozen_models_are_away_but_while_they_are_asked(lora, rewards, tiny_model_dir, tmp_path):
    found = {}
    for offload in (False, True):
        moves = Moves()
        options = dict(lora=lora, reward=rewards[False], max_steps=3, val_fraction=0.2)
        trainer, module = run_ppo.run(tiny_model_dir, tmp_path / str(offload), callbacks=[moves],
                                      offload_frozen=offload, **options)  # fmt: skip
        metrics = {k: v for k, v in trainer.callback_metrics.items() if "second" not in k}
        found[offload] = run_ppo.trained(module) | metrics
        names = ["reward"] if lora else ["reward", "reference"]
        if offload:
            for name in names:
                assert moves.calls[name] == {(name, "device")}
            # to the device and back: at the start, in 3 iterations, and the reward in 1 validation
            assert moves.moved == 2 * (1 + 3 + 1) + (0 if lora else 2 * (1 + 3))
            for phase in ("start", "rollout", "learning", "end"):
                assert moves.calls[phase] == {(name, "cpu") for name in names}, phase
        else:
            assert moves.moved == 0
            assert moves.calls["learning"] == {(name, "device") for name in names}
    assert found[True].keys() == found[False].keys()
    for key, value in found[False].items():
        assert torch.equal(found[True][key], value), key


def test_a_reward_on_the_shared_backbone_stays_with_it(rewards, tiny_model_dir, tmp_path):
    """What moves is the reward's own: the policy is no part of it."""
    options = dict(lora=True, reward=rewards[True], max_steps=1, offload_frozen=True)
    _, module = run_ppo.run(tiny_model_dir, tmp_path, **options)
    assert module.reward.shared is module.policy and not list(module.reward.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_weights_of_frozen_models_are_in_the_memory_of_the_cpu(rewards, tiny_model_dir, tmp_path):
    from lightning_rlhf import PPOModule, PromptDataModule, Sampling

    places = {}

    class Places(L.Callback):
        def on_train_start(self, trainer, pl_module):
            places["idle"] = {p.device.type for m in (pl_module.reward, pl_module.reference) for p in m.parameters()}
            places["policy"] = {p.device.type for p in pl_module.policy.parameters()}
            with pl_module.actors.on_device(pl_module.device, "reward", "reference"):
                both = (pl_module.reward, pl_module.reference)
                places["asked"] = {p.device.type for m in both for p in m.parameters()}

    module = PPOModule(
        tiny_model_dir, rewards[False], **grouped(sampling=Sampling(max_new_tokens=4), offload_frozen=True)
    )
    data = PromptDataModule(run_ppo.prompts(), batch_size=4, val_fraction=0.0, cache_dir=tmp_path / "cache")
    trainer = L.Trainer(accelerator="gpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, default_root_dir=tmp_path, callbacks=[Places()])  # fmt: skip
    trainer.fit(module, data)
    assert places == {"idle": {"cpu"}, "policy": {"cuda"}, "asked": {"cuda"}}


def test_a_critic_with_another_tokenizer_is_refused(tiny_model_dir, stories_model_dir, rewards):
    """It would read other words than the policy wrote, and learn values of those."""
    for lora in (None, LoRA(r=2)):
        module = PPOModule(tiny_model_dir, lambda prompts, completions: [0.0] * len(completions), **grouped(lora=lora,
                           critic=str(stories_model_dir), critic_kind="separate"))  # fmt: skip
        with pytest.raises(ValueError, match=r"pretrained='.*stories260K' has another tokenizer than the policy"):
            module.configure_model()
        assert not hasattr(module, "critic")
    # the base of a policy whose template brought tokens knows all others
    module = PPOModule(
        tiny_model_dir,
        lambda prompts, completions: [0.0] * len(completions),
        chat_template="llama3",
        critic=Critic(str(tiny_model_dir)),
    )
    module.configure_model()
    assert module.critic.transformer.config.vocab_size == module.policy.transformer.config.vocab_size
