"""Small runs of any stage, or of a foreign module, under any strategy, one after the other, as processes of their own.

    python run.py MODEL_DIR OUT_DIR '{"NAME": {"stage": "sft", "strategy": "colossalai_zero2", "devices": 2}, ...}'

Writes to OUT_DIR/NAME, from rank 0, curve.json (what was logged at each step), weights.pt (the module afterwards) and
scores.json (what validate said before and after, where it was asked); from each rank error-RANK.txt where it failed.
"""

import json
import os
import resource
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf import (
    DPOModule,
    GRPOModule,
    HFExport,
    InstructionDataModule,
    KTOModule,
    LoRA,
    MeasureWinRate,
    OnlineDPOModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    Ptx,
    RewardModule,
    Sampling,
    SFTModule,
    UnpairedDataModule,
)
from lightning_rlhf.strategies import ColossalAIPrecision, ColossalAIStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from grouping import grouped
from runs import load_script
from talkative import Talkative

torch.set_num_threads(1)
STAGES = Path(__file__).resolve().parents[1] / "stages"
LOGGED = {
    "sft": ["train/loss"],
    "reward": ["train/loss", "train/chosen_score"],
    "dpo": ["train/loss", "train/chosen_logprob"],
    "kto": ["train/loss", "train/z0"],
    "grpo": ["train/score", "train/kl", "train/loss", "train/entropy", "train/policy_grad_norm"],
    "online_dpo": ["train/loss", "train/score", "train/chosen_logprob"],
    "ppo": ["train/score", "train/kl", "train/loss", "train/value_loss", "train/policy_grad_norm"],
    "gan": ["loss_a", "loss_b"],
}


def load(name):
    return load_script(STAGES / f"{name}.py")


def lengths(prompts, completions):
    return [len(completion) for completion in completions]


class TwoOptimizers(L.LightningModule):
    """GAN-like: two networks, two optimizers, the first one's loss goes through the second."""

    def __init__(self, lr=1e-2):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        sizes = [(8, 16), (16, 9)]
        self.maker = torch.nn.Sequential(torch.nn.Linear(*sizes[0]), torch.nn.Tanh(), torch.nn.Linear(*sizes[1]))
        self.critics = torch.nn.ModuleDict(
            {"one": torch.nn.Sequential(torch.nn.Linear(9, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))}
        )
        self.lr = lr

    def training_step(self, batch, batch_idx):
        # by the step, so that a resumed run sees what it would have seen
        generator = torch.Generator().manual_seed(self.trainer.global_step)
        both = torch.randn(8, 8, generator=generator), torch.randn(8, 9, generator=generator) + 1
        noise, real = (t[self.global_rank :: self.trainer.world_size] for t in both)
        critic = self.critics["one"]
        first, second = self.optimizers()
        made = self.maker(noise)
        loss_a = torch.nn.functional.softplus(-critic(made)).mean()
        first.zero_grad()
        self.manual_backward(loss_a)
        self.clip_gradients(first, 0.05, "norm")
        first.step()
        loss_b = torch.nn.functional.softplus(-critic(real)).mean()
        loss_b = loss_b + torch.nn.functional.softplus(critic(made.detach())).mean()
        second.zero_grad()
        self.manual_backward(loss_b)
        second.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"loss_a": loss_a.float(), "loss_b": loss_b.float()}, sync_dist=True)

    def configure_optimizers(self):
        optimizers = [torch.optim.AdamW(m.parameters(), lr=self.lr) for m in (self.maker, self.critics["one"])]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.97) for o in optimizers]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(100))


class Curve(L.Callback):
    """What is logged at each optimizer step."""

    def __init__(self, names, kill, full):
        self.names, self.points, self.kill, self.full, self.last = names, [], kill, full, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.full and self.full == [trainer.global_rank, trainer.global_step]:  # as a full disk does
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.last:
            return
        self.last = trainer.global_step
        logged = trainer.callback_metrics
        self.points.append([logged[name].item() if name in logged else None for name in self.names])
        if self.kill and self.kill == [trainer.global_rank, trainer.global_step]:
            os.kill(os.getpid(), signal.SIGKILL)


def make(stage, model_dir, out_dir, lora, checkpointing, lr, optimizer, dtype="float32", **options):
    run = load({"gan": "run_sft", "ppo": "run_ppo"}.get(stage, f"run_{stage}"))
    dropout = options.pop("dropout", 0.0)
    common = dict(lora=LoRA(r=4, dropout=dropout) if lora else None, gradient_checkpointing=checkpointing, dtype=dtype)
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    common["optimizer"] = lambda params: kinds[optimizer](params, lr=lr)
    files = dict(cache_dir=Path(out_dir) / "cache")
    if stage == "sft":
        data = InstructionDataModule(run.rows(), val_fraction=0.2, batch_size=6, **files)
        return SFTModule(model_dir, **grouped(**common, **options)), data
    if stage == "reward":
        data = PreferenceDataModule(run.rows(), val_fraction=0.3, batch_size=12, **files)
        return RewardModule(model_dir, **grouped(**common, **options)), data
    if stage == "dpo":
        data = PreferenceDataModule(run.rows(), val_fraction=0.3, batch_size=12, **files)
        return DPOModule(model_dir, **grouped(**common, **options)), data
    if stage == "kto":
        data = UnpairedDataModule(run.rows(each=2), val_fraction=0.3, batch_size=8, **files)
        return KTOModule(model_dir, **grouped(**common, **options)), data
    if stage == "grpo":
        data = PromptDataModule(run.prompts(), batch_size=4, val_fraction=0.2, **files)
        sampling = Sampling(max_new_tokens=10, temperature=0.7, stop_strings=["e", "o"])
        own = dict(samples_per_prompt=3, sampling=sampling, epochs=2, minibatches=2, micro_batch_tokens=90)
        if turns := options.pop("turns", 0):
            own |= {"environment": Talkative(most=turns), "rollout.max_total_tokens": 70, "micro_batch_tokens": 150}
        common["optimizer"] = lambda params: torch.optim.AdamW(params, lr=lr, eps=1e-5)
        return GRPOModule(model_dir, run.letters, **grouped(**own, **common, **options)), data
    if stage == "online_dpo":
        data = PromptDataModule(run.prompts(), batch_size=4, val_fraction=0.2, **files)
        sampling = Sampling(max_new_tokens=10, stop_strings=["e", "o"])
        own = dict(samples_per_prompt=3, sampling=sampling, epochs=1, minibatches=2, micro_batch_tokens=90)
        return OnlineDPOModule(model_dir, run.letters, **grouped(**own, **common, **options)), data
    if stage == "ppo":
        sampling = Sampling(max_new_tokens=10, temperature=0.7, stop_strings=["e", "o"])
        options = {"epochs": 2, "minibatches": 2, "micro_batch_tokens": 90, **options}
        ptx = run.TEXTS if options.get("ptx_coef") else None
        data = PromptDataModule(run.prompts(), batch_size=4, val_fraction=0.2, ptx=Ptx(ptx, 3), **files)
        return PPOModule(
            model_dir, options.pop("reward", run.letters), **grouped(sampling=sampling, **common, **options)
        ), data
    return TwoOptimizers(lr=lr), None


def run(model_dir, out_dir, stage="sft", strategy="auto", devices=1, precision="32-true", max_steps=20, accumulate=1,
        clip=None, clip_by="norm", lora=False, checkpointing=False, lr=1e-2, optimizer="adamw", ckpt=None, save_every=0,
        validate=False, kill=None, full=None, callbacks=(), sanity=0, export=False, win_rate=0,
        top_k=-1, save_last=None, **options):  # fmt: skip
    """One run; returns the trainer and the module."""
    L.seed_everything(0, verbose=False)
    module, data = make(stage, model_dir, out_dir, lora, checkpointing, lr, optimizer, **options)
    if isinstance(strategy, dict):
        settings = {**strategy, "timeout": timedelta(seconds=strategy.get("timeout", 120))}
        if precision == "colossalai 16-mixed":  # the Trainer makes bf16-mixed of 16-mixed on a CPU
            precision, settings["precision_plugin"] = None, ColossalAIPrecision("16-mixed", strategy["plugin"])
        strategy = ColossalAIStrategy(**settings)
    curve = Curve(LOGGED[stage], kill, full)
    callbacks = [*callbacks, curve]
    if export:
        callbacks.append(HFExport())
    if win_rate:  # by the number of letters; its pairs go to OUT_DIR/win_rate.jsonl
        prompts = ["Say 1", "Say 2", "Say 3"]
        callbacks.append(MeasureWinRate(lengths, prompts=prompts, max_new_tokens=6, every_n_steps=win_rate))
    if save_every:
        callbacks.append(
            ModelCheckpoint(
                out_dir,
                filename="{step}",
                every_n_train_steps=save_every,
                save_top_k=top_k,
                monitor="train/loss" if top_k > 0 else None,
                save_last=save_last,
            )
        )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision=precision,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        gradient_clip_algorithm=clip_by if clip else None,
        callbacks=callbacks,
        enable_checkpointing=bool(save_every),
        limit_val_batches=2 if validate else 0,
        num_sanity_val_steps=sanity,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=out_dir,
    )
    scores = [trainer.validate(module, data, verbose=False)] if validate else []
    trainer.fit(module, data, ckpt_path=ckpt)
    scores += [trainer.validate(module, data, verbose=False)] if validate else []
    if trainer.is_global_zero:
        (Path(out_dir) / "scores.json").write_text(json.dumps(scores))
        (Path(out_dir) / "curve.json").write_text(json.dumps(curve.points))
        torch.save({k: v.detach().clone() for k, v in module.named_parameters()}, Path(out_dir) / "weights.pt")
    return trainer, module


def main(model_dir, out_dir, cases):
    for name, options in cases.items():
        place = Path(out_dir) / name
        place.mkdir(parents=True, exist_ok=True)
        try:
            run(model_dir, str(place), **options)
        except Exception:
            rank = os.environ.get("LOCAL_RANK", "0")
            (place / f"error-{rank}.txt").write_text(traceback.format_exc())
            if len(cases) == 1:
                raise


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
