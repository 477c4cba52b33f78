"""Ordinary LightningModules, as people write them, under any strategy; a script as modules.py is.

    MASTER_ADDR=127.0.0.1 MASTER_PORT=... WORLD_SIZE=2 NODE_RANK=0 LOCAL_RANK=1 python ordinary.py OUT_DIR \
        '{"zero2": {"plugin": "zero2", "without": ["gan"]}, ...}'

Runs all kinds but those that are left out.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as L
import modules
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from modules import WORLD, Data, Plain, strategy
from torch import nn
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy


def mlp(*sizes):
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Autoencoder(Plain):
    def make(self):
        self.encoder, self.decoder = mlp(16, 8, 3), mlp(3, 8, 16)

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def loss(self, batch):
        return F.mse_loss(self(batch[0]).float(), batch[0])


class Checkpointed(Autoencoder):
    reentrant = False

    def forward(self, x):
        x = x.requires_grad_() if self.training else x
        return self.decoder(checkpoint(self.encoder, x, use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    reentrant = True


class BackboneHead(Plain):
    """With groups by weight decay, a frozen stem, accuracy, and a result that is a dict."""

    def make(self):
        self.stem, self.backbone, self.head = nn.Linear(16, 16), mlp(16, 32, 32), nn.Linear(32, 2)
        self.stem.requires_grad_(False)
        self.accuracy = MulticlassAccuracy(2)
        self.seen = []

    def logits(self, x):
        return self.head(self.backbone(self.stem(x)))

    def training_step(self, batch, i):
        logits = self.logits(batch[0]).float()
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}

    def on_train_batch_end(self, outputs, batch, i):
        self.seen.append(outputs["logits"].shape)

    def configure_optimizers(self):
        decays = [p for p in self.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        return torch.optim.AdamW([{"params": decays, "weight_decay": 0.1}, {"params": others, "lr": 3e-3}], lr=1e-2)


class Contrastive(Plain):
    """Two encoders and a scale of no dimension."""

    def make(self):
        self.left, self.right = mlp(8, 16, 4), mlp(8, 16, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def loss(self, batch):
        a, b = F.normalize(self.left(batch[0][:, :8]), dim=-1), F.normalize(self.right(batch[0][:, 8:]), dim=-1)
        logits = (self.logit_scale.exp() * a @ b.T).float()
        wanted = torch.arange(len(a))
        return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


class VAE(Plain):
    def make(self):
        self.encoder, self.mean, self.spread, self.decoder = mlp(16, 8), nn.Linear(8, 2), nn.Linear(8, 2), mlp(2, 16)

    def loss(self, batch):
        hidden = self.encoder(batch[0]).tanh()
        mean, spread = self.mean(hidden), self.spread(hidden)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
        made = self.decoder(mean + noise * (0.5 * spread).exp())
        kl = -0.5 * (1 + spread - mean**2 - spread.exp()).sum(-1).mean()
        return F.mse_loss(made.float(), batch[0]) + 0.1 * kl.float()


class Gan(Plain):
    """Lightning's own example: the generator learns through the discriminator."""

    toggles, penalty, direct = True, 0.0, False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def make(self):
        self.generator, self.discriminator = mlp(4, 16, 16), mlp(16, 16, 1)

    def training_step(self, batch, i):
        real, (g, d) = batch[0], self.optimizers()
        noise = torch.randn(len(real), 4, generator=torch.Generator().manual_seed(i))
        for optimizer in (g, d):
            if self.toggles:
                self.toggle_optimizer(optimizer)
            made = self.generator(noise)
            if optimizer is g:
                loss = F.softplus(-self.discriminator(made)).float().mean()
            else:
                found = self.discriminator(made.detach())
                loss = (F.softplus(found).mean() + F.softplus(-self.discriminator(real)).mean()).float()
            if self.penalty and optimizer is d:
                middle = (0.5 * real + 0.5 * made.detach()).requires_grad_()
                slope = torch.autograd.grad(self.discriminator(middle).sum(), middle, create_graph=True)[0]
                loss = loss + self.penalty * ((slope.float().norm(dim=1) - 1) ** 2).mean()
            optimizer.zero_grad()
            loss.backward() if self.direct else self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)
        if i == 0:
            for schedule in self.lr_schedulers():
                schedule.step()

    def validation_step(self, batch, i):
        self.log("val_loss", self.discriminator(batch[0]).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        found = [torch.optim.Adam(m.parameters(), lr=2e-3, betas=(0.5, 0.9)) for m in self.children()]
        return found, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in found]


class GanTogether(Gan):
    toggles = False


class Penalty(Gan):
    penalty = 1.0


class DirectBackward(Gan):
    direct = True


class Lstm(Plain):
    """Packed sequences of words."""

    def make(self):
        self.words, self.head = nn.Embedding(5, 8), nn.Linear(8, 2)
        return nn.LSTM(8, 8, batch_first=True)

    def logits(self, x):
        ids, lengths = (x * 2).round().long().clamp(-2, 2) + 2, 4 + (x[:, 1] > 0).long() * 5
        packed = rnn.pack_padded_sequence(self.words(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.net(packed)[1][0][-1])


class Sparse(Lstm):
    def make(self):
        made = super().make()
        self.words = nn.Embedding(5, 8, sparse=True)
        return made

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Attention(Plain):
    def make(self):
        self.first = nn.Linear(4, 8)
        self.place, self.head = nn.Parameter(torch.zeros(4, 8)), nn.Linear(8, 2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def logits(self, x):
        return self.head(self.net(self.first(x.view(-1, 4, 4)) + self.place).mean(1))


class Conv(Plain):
    """Norms of running statistics between children."""

    def make(self):
        self.first, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))

    def logits(self, x):
        return self.last(self.norm(self.first(x.view(-1, 1, 4, 4))).relu())


class Heads(Plain):
    """Nested lists and dicts; each step uses one head."""

    def make(self):
        self.nets = nn.ModuleDict({"body": nn.ModuleList([mlp(16, 16), mlp(16, 16)]), "heads": nn.ModuleDict()})
        self.nets["heads"].update({name: nn.Linear(16, 2) for name in ("a", "b")})

    def head(self, i):
        return "ab"[i % 2]

    def loss(self, batch, i=0):
        x = batch[0]
        for net in self.nets["body"]:
            x = net(x).tanh()
        return F.cross_entropy(self.nets["heads"][self.head(i)](x).float(), batch[1])

    def training_step(self, batch, i):
        return self.loss(batch, i)


class HeadsByRank(Heads):
    """Each rank uses a head of its own in some steps."""

    def head(self, i):
        return "ab"[(i // 2 + self.global_rank) % 2] if i % 2 else "a"


class Tied(Plain):
    """Children that share a weight, one read as a function."""

    def make(self):
        self.encoder, self.decoder = nn.Linear(16, 6), nn.Linear(6, 16)
        self.other = nn.Linear(16, 6)
        self.other.weight = self.encoder.weight

    def loss(self, batch):
        hidden = self.encoder(batch[0]).tanh() + self.other(batch[0]).tanh()
        made = self.decoder(hidden) + F.linear(hidden, self.encoder.weight.T)
        return F.mse_loss(made.float(), batch[0])


class Prompts(Plain):
    """Lists of own parameters, and a scale before a frozen network."""

    def make(self):
        self.prompts = nn.ParameterList([torch.zeros(16), torch.ones(16)])
        self.scale = nn.Parameter(torch.ones(2))
        self.matrix = nn.Parameter(torch.eye(16))
        frozen = super().make()
        return frozen.requires_grad_(False)

    def logits(self, x):
        x = x.to(self.matrix.dtype) @ self.matrix
        return self.net((x * self.prompts[1] + self.prompts[0]).float()) * (2 - self.scale) / self.scale


class Penalized(Autoencoder):
    """Its loss has a penalty on weights, written out."""

    def loss(self, batch):
        return super().loss(batch) + 1e-2 * sum(p.pow(2).sum() for p in self.parameters()).float()


class Siamese(Plain):
    """Calls a child twice, then its layers."""

    def loss(self, batch):
        a, b = self.net(batch[0]), self.net(batch[0].flip(0))
        return F.mse_loss(a.float(), b.float()) + self.net[2](self.net[1](self.net[0](batch[0]))).float().pow(2).mean()


class Normed(Plain):
    def make(self):
        self.head = parametrizations.weight_norm(nn.Linear(32, 2))
        return parametrizations.spectral_norm(nn.Linear(16, 32))

    def logits(self, x):
        return self.head(self.net(x).relu())


class Target(Plain):
    """Learns after a slow copy of itself, as BYOL."""

    def make(self):
        self.slow = mlp(16, 8, 2).requires_grad_(False)
        return mlp(16, 8, 2)

    def loss(self, batch):
        with torch.no_grad():
            wanted = self.slow(batch[0])
        return F.mse_loss(self.net(batch[0]).float(), wanted.float() + batch[1][:, None])

    def on_train_batch_end(self, *args):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                slow.mul_(0.9).add_(fast.to(slow.dtype), alpha=0.1)


class ByTwo(Plain):
    """Two optimizers of one child's layers, and schedules by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, i):
        optimizers, loss = self.optimizers(), self.loss(batch)
        self.manual_backward(loss / 2)
        if i % 2:
            for optimizer, schedule in zip(optimizers, self.lr_schedulers(), strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

    def configure_optimizers(self):
        found = [torch.optim.AdamW(self.net[0].parameters(), lr=1e-2), torch.optim.Adam(self.net[2].parameters())]
        return found, [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in found]


class SharedParameter(ByTwo):
    def configure_optimizers(self):
        return [torch.optim.AdamW(self.net.parameters()), torch.optim.AdamW(self.net[2].parameters())]


class Outside(Plain):
    def configure_optimizers(self):
        return torch.optim.AdamW([*self.parameters(), nn.Parameter(torch.zeros(3))])


class Skips(Autoencoder):
    """Returns no loss in some steps."""

    def training_step(self, batch, i):
        loss = self.loss(batch)
        return None if self.skips(i) else loss

    def skips(self, i):
        return i == 1


class SkipsOnARank(Skips):
    def skips(self, i):
        return i == 1 and self.global_rank == 1


class Warmed(Autoencoder):
    """Sets rates by hand, and clips in its own way."""

    def optimizer_step(self, epoch, i, optimizer, closure):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (i + 1) / 3)
        optimizer.step(closure=closure)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 0.05, "norm")


def scheduled(make, **config):
    class Scheduled(Autoencoder):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **config}}

    return Scheduled


def stepping(make):
    class Stepping(Autoencoder):
        optimizer = staticmethod(make)

    return Stepping


class Lion(torch.optim.Optimizer):
    """An optimizer of one's own, which updates each element by itself (Chen et al. 2023)."""

    together = False

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    step = (0.9 * mean + 0.1 * p.grad).tanh()
                    p.sub_(step * (step.norm() if self.together else 1), alpha=group["lr"])
                    mean.lerp_(p.grad, 0.01)
        return loss


class Trust(Lion):
    together = True


class Lazy(Autoencoder):
    def make(self):
        self.encoder = self.decoder = None

    def configure_model(self):
        if self.encoder is None:
            torch.manual_seed(3)
            super().make()


class Saved(Autoencoder):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()


schedules = torch.optim.lr_scheduler
#: Module, and options of the Trainer.
KINDS = {
    "autoencoder": (Autoencoder, {}),
    "checkpointed": (Checkpointed, {}),
    "reentrant": (Reentrant, {}),
    "backbone and head": (BackboneHead, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    "contrastive": (Contrastive, {}),
    "vae": (VAE, {}),
    "gan": (Gan, {}),
    "gan, together": (GanTogether, {}),
    "gradient penalty": (Penalty, {}),
    "direct backward": (DirectBackward, {}),
    "lstm": (Lstm, {}),
    "sparse": (Sparse, {}),
    "attention": (Attention, {}),
    "conv": (Conv, {}),
    "heads": (Heads, {}),
    "heads by rank": (HeadsByRank, {}),
    "tied": (Tied, {"gradient_clip_val": 0.1}),
    "prompts": (Prompts, {}),
    "penalized": (Penalized, {}),
    "siamese": (Siamese, {}),
    "normed": (Normed, {}),
    "target": (Target, {}),
    "by two": (ByTwo, {}),
    "shared parameter": (SharedParameter, {}),
    "outside": (Outside, {}),
    "skips": (Skips, {}),
    "skips on a rank": (SkipsOnARank, {}),
    "warmed": (Warmed, {}),
    "each step": (scheduled(lambda o: schedules.OneCycleLR(o, 1e-2, total_steps=8), interval="step"), {}),
    "on plateau": (scheduled(lambda o: schedules.ReduceLROnPlateau(o, patience=0), monitor="val_loss"), {}),
    "sgd": (stepping(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)), {}),
    "rmsprop": (stepping(lambda p: torch.optim.RMSprop(p, lr=1e-3)), {}),
    "own optimizer": (stepping(Lion), {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "trust ratio": (stepping(Trust), {}),
    "adafactor": (stepping(torch.optim.Adafactor), {}),
    "lbfgs": (stepping(lambda p: torch.optim.LBFGS(p, lr=0.1)), {}),
    "lazy": (Lazy, {}),
    "resumed": (Saved, {}),
}


def run(kind, plugin, precision, out):
    """One case; what all ranks should find alike."""
    L.seed_everything(0, verbose=False)
    cls, options = KINDS[kind]
    module, data = cls(), Data(n=32)

    def trainer(epochs=2, **more):
        checkpoints = ModelCheckpoint(out, filename="best", save_last=True, enable_version_counter=False)
        return L.Trainer(
            accelerator="cpu", devices=WORLD, strategy=strategy(plugin), precision=precision, logger=CSVLogger(out),
            enable_progress_bar=False, enable_model_summary=kind == "autoencoder", num_sanity_val_steps=0,
            default_root_dir=out, max_epochs=epochs, log_every_n_steps=1,
            callbacks=[LearningRateMonitor(), checkpoints], **{**options, **more},
        )  # fmt: skip

    runner = trainer(1 if kind == "resumed" else 2)
    found = {"before": runner.validate(module, data, verbose=False)[0]} if kind == "autoencoder" else {}
    runner.fit(module, data)
    if kind == "resumed":
        module, runner = Saved.load_from_checkpoint(Path(out) / "last.ckpt", width=8), trainer(2)
        runner.fit(module, data, ckpt_path=Path(out) / "last.ckpt")
    found["logged"] = dict(runner.callback_metrics)
    if kind == "autoencoder":
        found["after"] = runner.test(module, data, verbose=False)[0]
    found["rates"] = {name: torch.tensor(rates) for name, rates in runner.callbacks[0].lrs.items()}
    found["state"] = {k: v.detach().clone() for k, v in module.state_dict().items()}
    found["step"] = {"": torch.tensor(float(runner.global_step))}
    return {f"{a} {b}": torch.as_tensor(v) for a, part in found.items() for b, v in part.items()}


if __name__ == "__main__":
    modules.run = run
    cases = {
        f"{name} {kind}": dict(options, kind=kind)
        for name, options in json.loads(sys.argv[2]).items()
        for kind in KINDS
        if kind not in options.get("without", ())
    }
    modules.main(sys.argv[1], cases)
