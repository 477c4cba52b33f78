"""``lightning-rlhf win-rate A B``: finds out which of two models answers better."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rlhf.arguments import Parser, add_model_options
from lightning_rlhf.utils.progress import ProgressLine

if TYPE_CHECKING:
    from lightning_rlhf.data import Message
    from lightning_rlhf.evaluation import Answer, Judge, JudgedPair

#: Number of pairs per call of the judge. Verdicts are written after each call.
_PAIRS = 32
_BAR = 60
_ABOUT = """\
Two models answer the same prompts, and a judge compares their answers, each pair in both orders. A and B are
folders of runs, directories or hub ids of models, or files of answers (docs/evaluation.md describes their format). The
judge is a reward model, a Python function like PPO's rewards, or a model behind an OpenAI-compatible endpoint."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Arguments after ``win-rate``.
    """
    parser = Parser("win-rate", _ABOUT)
    parser.add_argument("a", metavar="A", help="a run's folder, a model's directory or hub id, or a file of answers")
    parser.add_argument("b", metavar="B", help="the other run, model or file of answers")
    parser.add_argument(
        "--judge", required=True, help="a reward model's directory or hub id, module.function, or http://host:port/v1"
    )
    parser.add_argument("--prompts", help="file, glob, hub id or bundled; default: the prompts in the file A or B")
    parser.add_argument("--limit", type=int, help="number of prompts to use, from the first on; default: all")
    parser.add_argument("--system", help="system prompt for prompts without one")
    parser.add_argument("--as-text", action="store_true", help="use prompts as plain texts, without a chat template")
    parser.add_argument("--out", type=Path, default=Path("win_rate.jsonl"), help="file for all judged pairs")
    models = parser.add_argument_group("models")
    models.add_argument("--max-new-tokens", type=int, default=256, help="maximum number of tokens per answer")
    models.add_argument(
        "--temperature", type=float, default=0.0, help="a larger value samples more diverse answers; 0: greedy"
    )
    models.add_argument("--seed", type=int, default=0, help="seed of the sampling, the same for both models")
    add_model_options(models, "--chat-template", "--dtype", "--trust-remote-code")
    models.add_argument(
        "--batch-size", type=int, default=32, help="answers that are generated together; more is faster, uses memory"
    )
    judges = parser.add_argument_group("a judge behind an endpoint")
    judges.add_argument("--judge-model", default="", help="name of the model on the server")
    judges.add_argument("--judge-key-env", metavar="NAME", help="environment variable that holds the API key")
    judges.add_argument("--judge-template", metavar="FILE", help="file that replaces our prompt to the judge")
    judges.add_argument("--judge-concurrency", type=int, default=8, help="number of requests at a time")
    judges.add_argument(
        "--judge-timeout", type=float, default=60.0, help="seconds without data after which a request is repeated"
    )
    judges.add_argument(
        "--judge-ledger", metavar="FILE", help="file that keeps questions and replies; a second run asks none again"
    )
    options = parser.parse_args(args)
    from lightning_rlhf.evaluation import JudgeError

    try:
        _run(options)
    except (JudgeError, OSError, ImportError, TypeError, ValueError) as error:
        sys.exit(f"lightning-rlhf win-rate: {' '.join(str(error).split())}")


def _run(options: argparse.Namespace) -> None:
    from lightning_rlhf.evaluation import AnswerPair, RewardJudge, judge_pairs

    if any(Path(name).resolve() == options.out.resolve() for name in (options.a, options.b)):
        raise ValueError(f"--out {options.out} would overwrite the answers in that file. Choose another file.")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1; got {options.limit}.")
    device, dtype = _hardware(options)
    judge = _judge(options, dtype)
    prompts, columns = _prompts(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    a, b = (_answers(options, side, prompts, columns, device, dtype) for side in ("a", "b"))
    pairs = [AnswerPair(*pair) for pair in zip(prompts, a, b, columns, strict=True)]
    if isinstance(judge, RewardJudge):
        judge.reward.to(device)  # the models are no longer on the device
    judged: list[JudgedPair] = []
    progress = ProgressLine("judging", len(pairs))
    with options.out.open("w", encoding="utf-8") as out:
        for start in range(0, len(pairs), _PAIRS):
            found = judge_pairs(judge, pairs[start : start + _PAIRS])
            judged += found
            out.writelines(json.dumps(pair.record(), ensure_ascii=False) + "\n" for pair in found)
            out.flush()
            progress(len(judged))
    text = summary(judged, options.a, options.b, options.judge)
    encoding = sys.stdout.encoding or "utf-8"  # a character that the terminal lacks must not end the run
    print(f"{text}\nAll pairs with their verdicts: {options.out}".encode(encoding, "replace").decode(encoding))
    if all(pair.outcome is None for pair in judged):
        raise ValueError("no pair has a verdict in both orders.")


def summary(judged: Sequence[JudgedPair], a: str, b: str, judge: str) -> str:
    """Summarizes the verdicts for a terminal.

    Args:
        judged: The judged pairs.
        a: Name of A.
        b: Name of B.
        judge: Name of the judge.

    Returns:
        The text.
    """
    from lightning_rlhf.evaluation import rates

    found = rates(judged)
    counts = [int(found.wins), int(found.ties), int(found.losses)]
    total = max(1, sum(counts))
    ends = [round(_BAR * sum(counts[:i]) / total) for i in range(4)]
    bar = "".join(mark * (end - start) for mark, start, end in zip("A.B", ends, ends[1:], strict=False))
    lengths = [statistics.fmean(len(getattr(j.pair, side).text) for j in judged) for side in ("a", "b")]
    longer = [
        (len(j.pair.a.text) > len(j.pair.b.text)) == (j.outcome == "a")
        for j in judged
        if j.outcome in ("a", "b") and len(j.pair.a.text) != len(j.pair.b.text)
    ]
    lines = [
        "",
        f"  A      {a}",
        f"  B      {b}",
        f"  judge  {judge}, each pair in both orders",
        "",
        f"            {'A wins':>8s} {'ties':>8s} {'B wins':>8s} {'pairs':>8s}",
        f"            {counts[0]:8d} {counts[1]:8d} {counts[2]:8d} {sum(counts):8d}",
        f"            {counts[0] / total:8.1%} {counts[1] / total:8.1%} {counts[2] / total:8.1%}",
        f"            |{bar}|",
        "",
        f"  win rate of A       {found.win_rate:.1%}, 95 % interval {found.low:.1%} to {found.high:.1%}",
        f"  first answer wins   {found.first_place:.1%} of verdicts (50 %: the order does not matter)",
        f"  orders agree        {found.agreement:.1%} of pairs (the others are ties)",
        f"  mean length         A {lengths[0]:.0f}, B {lengths[1]:.0f} characters"
        + (f"; the longer answer won {sum(longer)} of {len(longer)}" if longer else ""),
    ]
    if found.no_verdict:
        reasons = [v.reason for j in judged for v in (j.a_first, j.b_first) if v.winner is None]
        first = " ".join(reasons[0].split())[:200]
        lines.append(f"  without a verdict   {found.no_verdict:.0f} pairs, which are not counted. First: {first}")
    return "\n".join([*lines, ""])


# -------------------------------------------------------------------------------------------------------------- inputs


def _hardware(options: argparse.Namespace) -> tuple[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, options.dtype or ("bfloat16" if device == "cuda" else "float32")


def _judge(options: argparse.Namespace, dtype: Any) -> Judge:
    from lightning_rlhf.evaluation import ChatJudge, make_judge

    if options.judge.startswith(("http://", "https://")):
        return ChatJudge(
            options.judge,
            options.judge_model,
            options.judge_template,
            options.judge_key_env,
            concurrency=options.judge_concurrency,
            timeout=options.judge_timeout,
            ledger=options.judge_ledger,
        )
    return make_judge(options.judge, dtype=dtype, trust_remote_code=options.trust_remote_code)


def _prompts(options: argparse.Namespace) -> tuple[list[list[Message] | str], list[dict[str, Any]]]:
    """Returns the prompts and the other columns of their rows."""
    from lightning_rlhf.data import PromptDataModule
    from lightning_rlhf.evaluation import names_file
    from lightning_rlhf.evaluation.answers import COLUMNS

    source = options.prompts or next(filter(names_file, (options.a, options.b)), None)
    if source is None:
        raise ValueError("both A and B are models, so there are no prompts. Give --prompts.")
    data = PromptDataModule(source, val=source, system=options.system, as_text=options.as_text)
    try:
        found = list(zip(data.sample_prompts(sys.maxsize), data.sample_columns(sys.maxsize), strict=True))
    except ValueError as error:
        hint = "" if options.prompts else f" Prompts were read from {source}. Give --prompts to use others."
        raise ValueError(f"{error}{hint}") from error
    if not options.prompts:  # a file of answers may answer a prompt several times
        found = list({json.dumps(prompt): (prompt, columns) for prompt, columns in found}.values())
        known = (*COLUMNS, "ended", "truncated", "step")
        found = [(prompt, {k: v for k, v in columns.items() if k not in known}) for prompt, columns in found]
    prompts, columns = zip(*found[: options.limit], strict=True)
    return list(prompts), list(columns)


def _answers(
    options: argparse.Namespace,
    side: str,
    prompts: Sequence[list[Message] | str],
    columns: Sequence[Mapping[str, Any]],
    device: str,
    dtype: Any,
) -> list[Answer]:
    """Returns the answers of A or B. A model's answers are also written to a file beside the output, for later use."""
    from lightning_rlhf.evaluation import generate_answers, names_file, read_answers
    from lightning_rlhf.models.runs import find_model
    from lightning_rlhf.rollout import Sampling

    source = getattr(options, side)
    if names_file(source):
        return read_answers(source, prompts)
    sampling = Sampling(options.max_new_tokens, temperature=options.temperature)
    file = options.out.with_name(f"{options.out.stem}.{side}.jsonl")
    answers: list[Answer] = []
    progress = ProgressLine(f"answers of {side.upper()}", len(prompts))
    with file.open("w", encoding="utf-8") as out:
        for i, answer in generate_answers(
            find_model(source),
            dict(enumerate(prompts)),
            sampling,
            options.seed,
            chat_template=options.chat_template,
            dtype=dtype,
            device=device,
            batch_size=options.batch_size,
            trust_remote_code=options.trust_remote_code,
        ):
            answers.append(answer)
            row = {"prompt": prompts[i], "completion": answer.text, "ended": not answer.truncated}
            out.write(json.dumps({**row, **columns[i], **row}, ensure_ascii=False) + "\n")
            progress(len(answers))
    return answers
