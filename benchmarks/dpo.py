"""Speed and memory of DPO, its relatives and KTO, beside TRL's trainers, SFT and a bare PyTorch loop.

    pip install -e '.[demo,bench]'
    python benchmarks/dpo.py                                    # all cases against all peers, two tables
    python benchmarks/dpo.py --case short --peers bare          # without TRL
    python benchmarks/dpo.py --case real --algorithms kto orpo

Every contestant trains the same random Llama (width 256, 4 layers, fp32) on the same pairs in the same steps with the
same AdamW, rate, clipping and number of steps, on one thread. They take turns, each time in a process of its own. The
figure is tokens a CPU second after a warm-up; tokens are those of the trees: a prompt once, both answers, no padding.
"extra MiB" is the most resident memory during the steps above that with models and optimizer made; "loss differs by"
compares the losses of every step.

Cases:
    real       lengths of the bundled preferences, up to 512 tokens; random tokens of a vocabulary of 1,024
    short      64 + 64 tokens, which leaves least to save
    vocab      as real, with a vocabulary of 49,152

Contestants:
    ours       Trainer.fit(DPOModule(...) or KTOModule(...), ...)
    bare       a PyTorch loop: both answers and the reference in padded batches, logits, logsigmoid, backward, step
    sft        ours: SFTModule on the same batches, for its memory
    trl        DPOTrainer as it comes, but in fp32 as the others (it would take bf16)
    trl-fast   TRL's trainer of the algorithm without gradient checkpointing; its ORPO scores the prompt too, so its
               losses are others
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import common
import lightning.pytorch as L
import torch
from common import OURS, BenchmarkParser, Goal, Meter
from sft import word_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lightning_rlhf import DPOModule, KTOModule, PreferenceDataModule, SFTModule, UnpairedDataModule
from lightning_rlhf.data.packed import Tree, unpack
from lightning_rlhf.models import LoRA, load_tokenizer
from lightning_rlhf.models.pretrained import SMOLLM2, obtain

BETA, SIMPO_BETA, SIMPO_GAMMA, ODDS_WEIGHT = 0.1, 2.0, 1.0, 0.1
ADAPTERS = LoRA(r=16, alpha=32.0)
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
)


class Case(NamedTuple):
    """What is trained on, and who takes part.

    Attributes:
        vocab_size: Of the made-up vocabulary.
        lengths: Tokens of every prompt and of every answer; None takes those of real pairs.
        goals: For each algorithm what ours should reach against a contestant; None: the contestant has no goal.
    """

    vocab_size: int
    lengths: tuple[int, int] | None
    goals: dict[str, dict[str, Goal | None]]


CASES = {
    "real": Case(
        1024,
        None,
        {
            "dpo": {"bare": None, "trl-fast": Goal(2.5, 0.5), "trl": Goal(3.5)},
            "precomputed": {"trl-fast": Goal(2.6, 0.5), "sft": Goal(None, 1.05)},
            "lora": {"trl-fast": Goal(2.3, 0.5)},
            "kto": {"trl-fast": Goal(1.8, 0.5)},
            "orpo": {"trl-fast": Goal(2.3, 0.5)},
            "simpo": {"trl-fast": Goal(2.3, 0.5)},
        },
    ),
    "short": Case(1024, (64, 64), {"dpo": {"bare": None, "trl-fast": Goal(1.3)}}),
    "vocab": Case(49_152, None, {"dpo": {"trl-fast": Goal(3.0, 0.5)}}),
}
ALGORITHMS = tuple(CASES["real"].goals)
#: Share of an epoch that computing the reference's log-probs may take.
PRECOMPUTING = 0.4

# ---------------------------------------------------------------------------------------------- what they train on


class Task(NamedTuple):
    """The same for every contestant."""

    algorithm: str
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    data: PreferenceDataModule | UnpairedDataModule
    steps: int
    meter: Meter


class Step(NamedTuple):
    """One of our batches, for the others.

    Attributes:
        tokens: Of its trees, a prompt once.
        trees: A prompt with its two answers each.
        mismatched: KTO's: the same prompts with answers to others.
    """

    tokens: int
    trees: list[Tree]
    mismatched: list[Tree]

    def pairs(self) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Prompt, better answer and worse answer."""
        for tree in self.trees:
            (pair,) = tree.pairs
            yield list(tree.prompt), *(list(tree.branches[i].input_ids) for i in (pair.better, pair.worse))

    def answers(self) -> Iterator[tuple[list[int], list[int], bool, list[int]]]:
        """Prompt, an answer, whether it is good, and its mismatched answer."""
        for tree, other in zip(self.trees, self.mismatched, strict=True):
            for branch, good, mismatch in zip(tree.branches, tree.labels, other.branches, strict=True):
                yield list(tree.prompt), list(branch.input_ids), good, list(mismatch.input_ids)


def real_lengths(options: argparse.Namespace) -> Iterator[list[int]]:
    """Tokens of prompt, better and worse answer of real pairs within the length."""
    tokenizer = load_tokenizer(obtain(options.tokenizer, report=lambda line: print(line, file=sys.stderr)))
    lines = Path(options.data).read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    for row in map(json.loads, lines):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        sizes = [len(tokenizer(text).input_ids) for text in (prompt, row["chosen"], row["rejected"])]
        if sizes[0] + max(sizes[1:]) < options.length:  # the end token comes to it
            yield sizes


def make_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs of random words, as many as the steps take."""
    case, count = CASES[options.case], (options.warmup + options.steps) * options.pairs
    lengths = itertools.repeat([case.lengths[0], *2 * [case.lengths[1] - 1]]) if case.lengths else real_lengths(options)
    draw = random.Random(1)
    rows = []
    for sizes in itertools.islice(lengths, count):
        prompt, chosen, rejected = (
            " ".join(f"w{draw.randrange(2, options.vocab_size or case.vocab_size)}" for _ in range(size))
            for size in sizes
        )
        rows.append({"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected})
    if len(rows) < count:
        sys.exit(f"{options.data} has {len(rows)} pairs within the length, not {count}; lower --steps.")
    return rows


def make_task(options: argparse.Namespace) -> Task:
    vocab_size = options.vocab_size or CASES[options.case].vocab_size
    tokenizer = word_tokenizer(vocab_size)
    tokenizer.chat_template = TEMPLATE
    source = Path(options.cache) / "pairs.jsonl"
    if not source.exists():
        source.write_text("\n".join(map(json.dumps, make_rows(options))))
    shared: dict[str, Any] = dict(
        batch_size=2 * options.pairs,
        max_length=2 * options.length,  # no mismatched answer is cut
        val_fraction=0.0,
        cache_dir=options.cache,
        tokenizer=tokenizer,
    )
    data: PreferenceDataModule | UnpairedDataModule
    if options.algorithm == "kto":
        data = UnpairedDataModule(str(source), take_apart=True, **shared)
    else:
        data = PreferenceDataModule(str(source), **shared)
    model = common.random_llama(common.llama_config(len(tokenizer), options.width, options.layers))
    return Task(options.algorithm, model, tokenizer, data, options.warmup + options.steps, Meter(options.warmup))


def batches(task: Task) -> Iterator[Step]:
    """What ours sees, step by step: one epoch."""
    task.data.setup("fit")
    for batch in task.data.train_dataloader():
        yield Step(batch.num_tokens, unpack(batch), unpack(batch.mismatched) if batch.mismatched else [])


# ---------------------------------------------------------------------------------------------- contestants


def make_module(task: Task) -> DPOModule | KTOModule:
    how = {"optimizer": common.adamw, "lr_scheduler": common.constant}
    given = (task.model, task.tokenizer)
    match task.algorithm:
        case "kto":
            return KTOModule(*given, beta=BETA, **how)
        case "orpo":
            return DPOModule(*given, loss=[{"name": "orpo", "settings": {"odds_weight": ODDS_WEIGHT}}], **how)
        case "simpo":
            loss = [{"name": "simpo", "settings": {"gamma": SIMPO_GAMMA}}]
            return DPOModule(*given, loss=loss, beta=SIMPO_BETA, **how)
        case "lora":
            return DPOModule(*given, lora=ADAPTERS, beta=BETA, **how)
    return DPOModule(*given, beta=BETA, reference="precomputed" if task.algorithm == "precomputed" else "copy", **how)


def draw_adapters(model: torch.nn.Module) -> None:
    """Adapters start alike, whoever made them."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(weight, std=0.05)


def run_ours(task: Task) -> None:
    module = make_module(task)
    if task.algorithm == "lora":
        module.configure_model()
        draw_adapters(module)
    common.fit_ours(module, task.data, task.steps, common.Watch(task.meter))


class SFT(SFTModule):
    """Scores both answers of pairs."""

    works_on = "preferences"


def run_sft(task: Task) -> None:
    module = SFT(task.model, task.tokenizer, optimizer=common.adamw, lr_scheduler=common.constant)
    common.fit_ours(module, task.data, task.steps, common.Watch(task.meter))


def run_bare(task: Task) -> None:
    model, optimizer = task.model, common.adamw(task.model.parameters())
    reference = copy.deepcopy(model).requires_grad_(False)
    steps = list(batches(task))
    task.meter.ready()
    for step in steps:
        pairs = list(step.pairs())
        rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        lengths = [len(prompt) + len(answer) for prompt, answer in rows]
        ids = torch.tensor([[*p, *a, *[0] * (width - n)] for (p, a), n in zip(rows, lengths, strict=True)])
        mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
        scored = mask.bool() & (torch.arange(width) >= torch.tensor([[len(prompt)] for prompt, _ in rows]))

        def sums(of: Any, ids: Tensor = ids, mask: Tensor = mask, scored: Tensor = scored) -> Tensor:
            logits = of(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            return (found * scored[:, 1:]).sum(-1)

        with torch.no_grad():
            start = sums(reference)
        chosen, rejected = (sums(model) - start).chunk(2)
        loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), common.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        task.meter.step(step.tokens, loss)


def trl_trainer(algorithm: str) -> tuple[type[Any], type[Any], dict[str, Any]]:
    """TRL's trainer, its configuration's class, and the settings that are the algorithm's."""
    import trl

    match algorithm:
        case "kto":
            return trl.KTOTrainer, trl.KTOConfig, {"beta": BETA}
        case "orpo":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            return ORPOTrainer, ORPOConfig, {"beta": ODDS_WEIGHT}
        case "simpo":
            from trl.experimental.cpo import CPOConfig, CPOTrainer

            own = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": SIMPO_BETA, "simpo_gamma": SIMPO_GAMMA}
            return CPOTrainer, CPOConfig, own
    return trl.DPOTrainer, trl.DPOConfig, {"beta": BETA, "precompute_ref_log_probs": algorithm == "precomputed"}


def run_trl(task: Task, **settings: Any) -> None:
    from datasets import Dataset
    from peft import LoraConfig

    algorithm = task.algorithm
    steps = list(batches(task))
    base, config, own = trl_trainer(algorithm)

    def words(ids: list[int]) -> str:
        """A prompt, or an answer without its end, which TRL adds."""
        return " ".join(f"w{i}" for i in ids)

    mismatched: list[list[int]] = []
    if algorithm == "kto":
        answers = [answer for step in steps for answer in step.answers()]
        mismatched = [mismatch for *_, mismatch in answers]
        rows = [
            {"prompt": words(p), "completion": f" {words(answer[:-1])}", "label": good}
            for p, answer, good, _ in answers
        ]
    else:
        rows = [
            {"prompt": words(p), "chosen": f" {words(c[:-1])}", "rejected": f" {words(r[:-1])}"}
            for step in steps
            for p, c, r in step.pairs()
        ]
    more: dict[str, Any] = {}
    if algorithm in ("dpo", "kto"):  # the others need none
        more["ref_model"] = copy.deepcopy(task.model).eval().requires_grad_(False)
    if algorithm == "lora":
        more["peft_config"] = LoraConfig(
            task_type="CAUSAL_LM", r=ADAPTERS.r, lora_alpha=ADAPTERS.alpha, target_modules=ADAPTERS.targets
        )
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            folder,
            per_device_train_batch_size=len(rows) // len(steps),
            max_steps=task.steps,
            max_length=task.data.max_length,  # nothing is cut
            train_sampling_strategy="sequential",
            max_grad_norm=common.CLIP,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **own,
            **settings,
        )
        trainer = common.watched(base, task.meter, [step.tokens for step in steps])(
            model=task.model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=task.tokenizer,
            **more,
        )
        if algorithm == "lora":
            draw_adapters(trainer.model)
        if mismatched:  # TRL's are the neighbour's answers, which cost the same; with ours, losses can be compared
            kept = trainer.train_dataset.remove_columns("KL_completion_ids")
            trainer.train_dataset = kept.add_column("KL_completion_ids", mismatched)
        trainer.optimizer = common.adamw(p for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()


PEERS: dict[str, Callable[[Task], None]] = {
    "bare": run_bare,
    "sft": run_sft,
    "trl": run_trl,
    "trl-fast": lambda task: run_trl(task, gradient_checkpointing=False),
}

# ---------------------------------------------------------------------------------------------- precomputing


def run_scoring(task: Task, times: int) -> None:
    """Computes the reference's log-probs of all rows so many times, the model in files; the last time is the figure."""

    class Timed(DPOModule):
        def setup(self, stage: str) -> None:
            started = time.process_time()
            super().setup(stage)
            task.meter.seconds = time.process_time() - started

    task.meter.tokens = sum(step.tokens for step in batches(task))
    with tempfile.TemporaryDirectory() as start:
        task.model.save_pretrained(start)
        task.meter.ready()
        for _ in range(times):
            module = Timed(start, task.tokenizer, reference="precomputed", optimizer=common.adamw)
            common.make_trainer(0, L.Callback(), accelerator="cpu").fit(module, task.data)


SCORING: dict[str, Callable[[Task], None]] = {
    "first": lambda task: run_scoring(task, 1),
    "again": lambda task: run_scoring(task, 2),
}


def describe_precomputing(found: Mapping[str, list[Meter]]) -> list[list[str]]:
    """Rows: CPU seconds of an epoch, and of scoring its rows."""
    seconds = {
        name: statistics.median(m.seconds / m.tokens for m in meters) * found["first"][0].tokens
        for name, meters in found.items()
    }
    lines = []
    for name, goal in (("first", PRECOMPUTING), ("again", 0.0)):
        share = seconds[name] / seconds[OURS]
        over = share - goal
        verdict = "met" if round(over, 2) <= 0 else f"over by {over:.2f}"
        lines.append([name, f"{seconds[name]:.2f}", f"{seconds[OURS]:.2f}", f"{share:.2f}", f"{goal} {verdict}"])
    return lines


SCORING_COLUMNS = ("precomputing", "CPU s", "CPU s of an epoch", "share", "goal")

# ---------------------------------------------------------------------------------------------- command


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    sizes = dict(length=512, vocab_size=None, width=256, layers=4)
    parser = BenchmarkParser(__doc__, [OURS, *PEERS, *SCORING], rounds=3, steps=4, warmup=1, **sizes)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--algorithms", nargs="*", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="dpo", help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--data", default=str(common.ASSETS / "data" / "preference.jsonl"), help="default: %(default)s")
    parser.add_argument("--tokenizer", default=SMOLLM2, help="a directory, or %(default)s (downloaded once)")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per step; default: %(default)s")
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse(arguments)
    return options


def work(options: argparse.Namespace) -> None:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as empty:
        if options.worker in SCORING:  # nothing is there yet
            pairs = (Path(options.cache) / "pairs.jsonl").read_text()
            (Path(empty) / "pairs.jsonl").write_text(pairs)
            options.cache = empty
        task = make_task(options)
        {OURS: run_ours, **PEERS, **SCORING}[options.worker](task)
    task.meter.finish()
    common.report(task.meter)


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the tables."""
    options = parse(arguments)
    if options.worker:
        work(options)
        return
    common.require_trl(options.peers, "--peers bare sft")
    passed = ["steps", "warmup", "data", "tokenizer", "pairs", "length", "vocab_size", "width", "layers", "cache"]
    lines, scoring = [], []
    for name in CASES if options.case == "all" else [options.case]:
        options.case = name
        for algorithm, goals in CASES[name].goals.items():
            peers = [peer for peer in goals if peer in options.peers]
            if algorithm not in options.algorithms or not peers:
                continue
            with tempfile.TemporaryDirectory() as options.cache:
                options.algorithm = algorithm
                list(batches(make_task(options)))  # drawn and tokenized here, once for all workers
                flags = [*common.flags(options, passed), "--case", name, "--algorithm", algorithm]
                title = f"{name}, {algorithm}"
                more = list(SCORING) if algorithm == "precomputed" else []
                found = common.alternate(__file__, [OURS, *peers, *more], options.rounds, flags, title)
            lines += common.rows(
                title, {n: found[n] for n in (OURS, *peers)}, {n: goal for n in peers if (goal := goals[n])}
            )
            if more:
                scoring += describe_precomputing({n: found[n] for n in (OURS, *more)})
    print(common.markdown(lines))
    if scoring:
        print(f"\n{common.markdown(scoring, SCORING_COLUMNS)}")


if __name__ == "__main__":
    main()
