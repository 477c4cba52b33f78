"""Small modules of all kinds under any strategy, as processes of their own; what came of each.

    MASTER_ADDR=127.0.0.1 MASTER_PORT=... WORLD_SIZE=2 NODE_RANK=0 LOCAL_RANK=1 python modules.py OUT_DIR \
        '{"zero2, plain": {"kind": "plain", "plugin": "zero2"}, ...}'

Writes OUT_DIR/rankN.pt: for each case the weights and buffers after fit and what was logged, or the error in words.
"""

import faulthandler
import json
import os
import sys
import traceback
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rlhf.strategies import ColossalAIStrategy, whole_weights

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
PATIENCE = 120
WORLD = int(os.environ.get("WORLD_SIZE", 1))


class Data(L.LightningDataModule):
    def __init__(self, n=32, batch_size=4):
        super().__init__()
        self.n, self.batch_size = n, batch_size

    def _loader(self, n, seed):
        x = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()), batch_size=self.batch_size)

    def train_dataloader(self):
        return self._loader(self.n, 0)

    def val_dataloader(self):
        return self._loader(16, 1)

    test_dataloader = val_dataloader


class Plain(L.LightningModule):
    """A classifier of one child."""

    optimizer = staticmethod(lambda params: torch.optim.AdamW(params, lr=1e-2))

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = self.make()
        self.batch_size = 4

    def make(self):
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))

    def logits(self, x):
        return self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self.logits(batch[0]).float(), batch[1])

    def training_step(self, batch, i):
        loss = self.loss(batch)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, i):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, i):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class Norm(Plain):
    def make(self):
        # no bias: its gradient is 0 but for rounding, of which Adam makes whole steps
        return nn.Sequential(nn.Linear(16, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))


class Parts(Plain):
    """Its loss is made by the child's layers."""

    def logits(self, x):
        return self.net[2](self.net[1](self.net[0](x)))


class Several(Plain):
    """Two children, one optimizer."""

    def make(self):
        self.head = nn.Linear(32, 2)
        return nn.Linear(16, 32)

    def logits(self, x):
        return self.head(self.net(x).relu())


class Own(Plain):
    """A parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def logits(self, x):
        return self.net(x) * self.scale


class Frozen(Plain):
    """With a layer that does not train, and one that no pass reads."""

    def make(self):
        made = super().make()
        made[0].requires_grad_(False)
        return made


class Unused(Plain):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.left = nn.Linear(16, 32), nn.Linear(32, 2), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x).relu())

    def make(self):
        return self.Net()


class Counting(Plain):
    """A running mean of its own, by which inputs are shifted."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Plain.make(self)
            self.register_buffer("mean", torch.zeros(16))
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            if self.training:
                self.mean += 0.1 * (x.mean(0) - self.mean)
                self.seen += len(x)
            return self.net(x - self.mean)

    def make(self):
        return self.Net()


class Configured(Plain):
    """Its child is made by configure_model."""

    def make(self):
        return None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(3)
            self.net = Plain.make(self)


class ByHand(Plain):
    """Steps by hand, and clips."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, i):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if i % 2:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()
        self.log("train_loss", loss, sync_dist=True)


class TwoByHand(ByHand):
    """Two networks in turn; the second's loss hangs on it alone."""

    def make(self):
        self.other = nn.Linear(16, 2)
        return super().make()

    def training_step(self, batch, i):
        x = batch[0]
        for optimizer, loss in zip(
            self.optimizers(),
            (lambda: self.loss(batch), lambda: F.mse_loss(self.other(x).float(), self.net(x).detach().float())),
            strict=True,
        ):
            self.toggle_optimizer(optimizer)
            value = loss()
            self.manual_backward(value)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
        self.log("train_loss", value, sync_dist=True)

    def configure_optimizers(self):
        return [self.optimizer(self.net.parameters()), self.optimizer(self.other.parameters())]


class Toggled(TwoByHand):
    """A GAN's way: the first loss goes through the second network, which must not learn of it."""

    def make(self):
        made = super().make()
        self.other = nn.Linear(2, 1)
        return made

    def training_step(self, batch, i):
        first, second = self.optimizers()
        made = self.net(batch[0])
        self.toggle_optimizer(first)
        loss = F.softplus(-self.other(self.net(batch[0]))).float().mean()
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        loss = (
            F.softplus(self.other(made.detach())).float().mean()
            + 0.1 * self.other(batch[1][:, None] * made.detach()).float().mean()
        )
        self.manual_backward(loss)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)
        self.log("train_loss", loss, sync_dist=True)


class Bounded(Plain):
    """Holds weights in bounds after each step, as the first WGAN did."""

    gathers = False

    def on_train_batch_end(self, *args):
        with torch.no_grad(), whole_weights(self.trainer.strategy, self.net) if self.gathers else nullcontext():
            for p in self.net.parameters():
                p.data.clamp_(-0.2, 0.2)


class Grouped(Frozen):
    """Adds a group to its optimizer from the second epoch on."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            BaseFinetuning.unfreeze_and_add_param_group(self.net[0], self.optimizers().optimizer)


class BoundedWhole(Bounded):
    gathers = True


class Thawed(Plain):
    """A callback has a layer train from the second epoch on."""

    def make(self):
        made = super().make()
        made[0].requires_grad_(False)
        return made

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Cooled(Plain):
    """A layer stops training after the first epoch."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[0].requires_grad_(False)


class OneHanded(TwoByHand):
    """The same, as Gemini asks: what does not train is run without gradients."""

    def training_step(self, batch, i):
        x = batch[0]
        first, second = self.optimizers()
        self.manual_backward(self.loss(batch))
        first.step()
        first.zero_grad()
        with torch.no_grad():
            wanted = self.net(x)
        loss = F.mse_loss(self.other(x).float(), wanted.float())
        self.manual_backward(loss)
        second.step()
        second.zero_grad()
        self.log("train_loss", loss, sync_dist=True)


class Matmul(Plain):
    """Reads a weight by an operator that ColossalAI does not see."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = Plain.make(self), nn.Parameter(torch.full((2,), 0.5))

        def forward(self, x):
            return self.net(x) * (1 - self.scale)

    def make(self):
        return self.Net()


class Backbone(Frozen):
    def make(self):
        return Plain.make(self)

    @property
    def backbone(self):
        return self.net[0]


class Shared(Plain):
    """Two optimizers of one child."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, i):
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        self.log("train_loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return [self.optimizer(self.net[0].parameters()), self.optimizer(self.net[2].parameters())]


class Reads(L.Callback):
    """Notes how large weights are; on what rank, is asked."""

    def __init__(self, gathers=False):
        self.gathers, self.found = gathers, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.gathers:
            with whole_weights(trainer.strategy, pl_module.net):
                self.found.append(pl_module.net[0].weight.float().norm().item())
        else:
            self.found.append(pl_module.net[0].weight.float().norm().item())


class FreshSGD(Plain):
    optimizer = staticmethod(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))


#: Module, options of the Trainer, and what else is done.
KINDS = {
    "plain": (Plain, {}),
    "sgd": (FreshSGD, {}),
    "norm": (Norm, {}),
    "counting": (Counting, {}),
    "parts": (Parts, {}),
    "several": (Several, {}),
    "own": (Own, {}),
    "frozen": (Frozen, {}),
    "unused": (Unused, {}),
    "configured": (Configured, {}),
    "accumulation": (Plain, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "clipping by value": (FreshSGD, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "by hand": (ByHand, {}),
    "two by hand": (TwoByHand, {}),
    "one handed": (OneHanded, {}),
    "toggled": (Toggled, {}),
    "matmul": (Matmul, {}),
    "bounded": (Bounded, {}),
    "bounded, gathered": (BoundedWhole, {}),
    "thawed": (Thawed, {}),
    "cooled": (Cooled, {}),
    "shared": (Shared, {}),
    "twice": (Plain, {}),
    "thawed between": (Frozen, {}),
    "found rate": (Plain, {}),
    "early stopping": (Plain, {}),
    "swa": (Plain, {"max_epochs": 4}),
    "swa, norm": (Norm, {"max_epochs": 4}),
    "ema": (Plain, {}),
    "backbone": (Backbone, {"max_epochs": 3}),
    "group": (Grouped, {}),
    "reads": (Plain, {}),
    "gathers": (Plain, {}),
}


def strategy(plugin):
    if plugin in ("ddp", "auto", "ddp_find_unused_parameters_true"):
        return plugin
    options = {"min_chunk_elements": 64} if plugin == "gemini" else {}
    return ColossalAIStrategy("ddp" if plugin == "colossalai_ddp" else plugin, timeout=timedelta(seconds=60), **options)


def run(kind, plugin, precision, out):
    """One case; what all ranks should find alike."""
    L.seed_everything(0, verbose=False)
    cls, options = KINDS[kind]
    module, found = cls(), {}
    callbacks = {
        "early stopping": lambda: [EarlyStopping("val_loss", min_delta=10.0, patience=1)],
        "swa": lambda: [StochasticWeightAveraging(5e-3, swa_epoch_start=2, annealing_epochs=1)],
        "swa, norm": lambda: [StochasticWeightAveraging(5e-3, swa_epoch_start=2, annealing_epochs=1)],
        "ema": lambda: [EMAWeightAveraging(decay=0.5)],
        "backbone": lambda: [BackboneFinetuning(1)],
        "reads": lambda: [Reads()],
        "gathers": lambda: [Reads(gathers=True)],
    }.get(kind, list)()
    callbacks.append(
        ModelCheckpoint(out, save_last=True, filename="best", monitor="val_loss", enable_version_counter=False)
    )

    def trainer(**more):
        return L.Trainer(
            accelerator="cpu", devices=WORLD, strategy=strategy(plugin), precision=precision, logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
            **{"max_epochs": 2, "callbacks": callbacks, **options, **more},
        )  # fmt: skip

    data = Data(batch_size=8 if WORLD == 1 else 4)
    runner = trainer()
    if kind == "found rate":
        rate = Tuner(runner).lr_find(module, data, num_training=6, update_attr=False).results
        found["rates"] = torch.tensor(rate["loss"])
    if kind in ("twice", "thawed between"):
        runner.fit(module, data)
        if kind == "thawed between":
            module.net[0].requires_grad_(True)
        runner = trainer(callbacks=[callbacks[-1]])
    runner.fit(module, data)
    found |= {f"ended {k}": v.detach().clone() for k, v in module.named_buffers()}
    found["step"] = torch.tensor(float(runner.global_step))
    found |= {f"logged {k}": v for k, v in runner.callback_metrics.items()}
    found |= {f"after {k}": torch.tensor(v) for k, v in runner.test(module, data, verbose=False)[0].items()}
    found |= {k: v.detach().clone() for k, v in module.state_dict().items()}
    saved = torch.load(Path(out) / "last.ckpt", weights_only=True)["state_dict"]
    found |= {f"saved {k}": v for k, v in saved.items()}
    if kind in ("reads", "gathers"):
        found["norms"] = torch.tensor(callbacks[0].found)
    return found


def main(out, cases):
    out = Path(out)
    rank = os.environ.get("LOCAL_RANK", "0")
    found = {}
    with open(out / f"rank{rank}.txt", "w", buffering=1) as log:
        for name, case in cases.items():
            log.write(f"{name}\n")
            faulthandler.dump_traceback_later(PATIENCE, exit=True, file=log)
            place = out / name.replace(" ", "_").replace(",", "")
            place.mkdir(exist_ok=True)
            try:
                found[name] = run(case["kind"], case["plugin"], case.get("precision", "32-true"), str(place))
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
                log.write(traceback.format_exc())
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        faulthandler.cancel_dump_traceback_later()
    torch.save(found, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
