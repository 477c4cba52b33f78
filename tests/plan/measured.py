"""Counts the bytes of living tensors in real runs, with code of its own."""

import weakref

import lightning.pytorch as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Living(TorchDispatchMode):
    """Bytes of living storages; ``most`` is their peak. ZeRO and Gemini also empty storages that live on."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakKeyDictionary()

    def __enter__(self):
        living, self.resize = self, torch.UntypedStorage.resize_

        def resize_(storage, size):
            living.resize(storage, size)
            if storage in living.known:
                living.note(storage)
            return storage

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def meet(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = size = [0]
            self.note(storage)
            weakref.finalize(storage, self.leave, size)

    def note(self, storage):
        size = self.known[storage]
        self.now += storage.nbytes() - size[0]
        size[0] = storage.nbytes()
        self.most = max(self.most, self.now)

    def leave(self, size):
        self.now -= size[0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.meet, out)
        return out


class Parts(L.Callback):
    """Notes weights, gradients and states before a step, and lets the peak begin anew after the first one."""

    def __init__(self, living):
        self.living, self.found = living, {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        plain = [getattr(getattr(o, "boosted", None), "wrapped", o) for o in trainer.optimizers]
        every = [getattr(o, "optim", o).state for o in plain]
        values = (v for state in every for s in state.values() for v in s.values())
        states = [v for v in values if isinstance(v, torch.Tensor) and v.ndim]
        weights = [*module.parameters(), *module.buffers(), *shards(trainer.strategy)]
        held = {"weights": weights, "gradients": gradients, "states": states}
        self.found = {name: sum(t.untyped_storage().nbytes() for t in ts) for name, ts in held.items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            self.living.most = self.living.now


def shards(strategy):
    """This rank's parts of Gemini's chunks of weights, which no parameter holds between passes."""
    managers = [boosted.chunks for boosted in getattr(strategy, "boosted", ()) if hasattr(boosted, "chunks")]
    groups = [group for each in managers for name, group in each.chunk_groups.items() if name.startswith("fp16_param")]
    return [chunk.payload for group in groups for chunk in group if not chunk.keep_gathered]


def fit(module, data, strategy="auto", devices=1, precision="32-true"):
    """Trains for two steps; returns the parts and the peak of the second one, and the tokens of a prompt."""
    living = Living()
    parts = Parts(living)
    module.configure_model()
    for tensor in [*module.parameters(), *module.buffers()]:
        living.meet(tensor)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=2, callbacks=[parts], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, precision=precision, use_distributed_sampler=False,
    )  # fmt: skip
    with living:
        trainer.fit(module, data)
    found = {**parts.found, "peak": living.most}
    if sampled := getattr(module, "sampled", None):
        found["prompt"] = len(sampled[0].experience.trees[0].prompt)
    return found
