"""Rows that filters clean in a CPU second, and the memory that they take, as the number of rows grows.

    pip install -e '.[collect]'
    python benchmarks/clean.py                                        # 10,000 and 100,000 rows
    python benchmarks/clean.py --rows 10000 100000 1000000            # and a million: about an hour
    python benchmarks/clean.py --rows 10000 --filters NearDuplicate   # one of them alone

Rows are Alpaca's, half of them Chinese, made of words of the bundled data: instructions of 60 tokens with answers of
12, every twentieth a near duplicate of one before. Each case is a process of its own on one thread. "rows/s" counts the
CPU seconds of the filter alone, "with reading" those of the whole process: reading, parsing, filtering. Memory is the
most resident memory beyond that after 1,000 other rows, when all libraries and models are loaded.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from near_duplicates import JOIN, LANGUAGES, sentences

from lightning_rlhf.cleaning import Tally, clean, make_filters, read_examples
from lightning_rlhf.cleaning.filters.make import DEFAULT
from lightning_rlhf.cleaning.text import tokens
from lightning_rlhf.data.sources import BadRows

ALL, READING = "all default filters", "reading alone"
#: Rows a CPU second that should be reached: of the filter alone, and of all with reading.
GOALS = {"NearDuplicate": 7_000, ALL: 1_500}
GROWTH, BYTES = 1.25, 1_600
"""CPU a row may grow by a quarter from the fewest rows to the most, and memory by so many bytes a row."""
INSTRUCTION, ANSWER = 60, 12


def rows(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows one after the other."""
    rng = random.Random(seed)
    words = {lang: [tokens(text) for text in texts] for lang, texts in sentences().items()}
    flat = {lang: [word for text in texts for word in text] for lang, texts in words.items()}
    recent: list[tuple[str, list[str]]] = []
    for i in range(count):
        lang = LANGUAGES[i % 2]
        if recent and rng.random() < 0.05:
            lang, text = rng.choice(recent)
            text = [*text]
            text[rng.randrange(len(text))] = rng.choice(flat[lang])
        else:  # runs of five words, so that rows share some of their pairs as texts do
            starts = [rng.randrange(len(flat[lang]) - 5) for _ in range(INSTRUCTION // 5)]
            text = [word for start in starts for word in flat[lang][start : start + 5]]
            if len(recent) < 1000:
                recent.append((lang, text))
            else:
                recent[rng.randrange(1000)] = (lang, text)
        start = rng.randrange(len(flat[lang]) - ANSWER)
        answer = JOIN[lang].join(flat[lang][start : start + ANSWER])
        yield {"instruction": JOIN[lang].join(text), "output": answer, "lang": lang}


def write(path: Path, count: int, seed: int) -> None:
    """Writes rows as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows(count, seed):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(name: str, file: Path, warm: Path) -> dict[str, float]:
    """Cleans a file by one filter, or by all, in this process."""
    names = {ALL: DEFAULT, READING: ()}.get(name, (name,))
    for _ in clean(read_examples(str(warm), BadRows()), make_filters(names)):
        pass
    base, start = _resident(), time.process_time()
    tally, filters = Tally(), make_filters(names)
    kept = sum(1 for _ in clean(read_examples(str(file), BadRows()), filters, tally))
    seconds = time.process_time() - start
    own = sum(one.seconds for one in tally.filters.values())
    return {"rows": tally.seen, "kept": kept, "seconds": seconds, "own": own, "memory": _peak() - base}


def _resident() -> int:
    """Resident memory in bytes, from Linux's account of the process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures each filter at each number of rows, and prints the figures and what was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="numbers of rows")
    parser.add_argument("--filters", nargs="+", default=[READING, *DEFAULT, ALL], help="filters to measure")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        name, file, warm = options.worker
        print(json.dumps(measure(name, Path(file), Path(warm))))
        return
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm.jsonl"
        write(warm, 1_000, 1)
        print(f"{'filter':22s}{'rows':>11s}{'kept':>11s}{'rows/s':>10s}{'with reading':>14s}{'bytes a row':>13s}")
        first: dict[str, float] = {}
        for count in options.rows:
            file = Path(folder) / f"{count}.jsonl"
            write(file, count, 0)
            for name in options.filters:
                worker = [sys.executable, __file__, "--worker", name, str(file), str(warm)]
                found = json.loads(subprocess.run(worker, check=True, capture_output=True, text=True).stdout)
                missed += _missed(name, count, found, first)
                own = f"{count / found['own']:10,.0f}" if found["own"] else f"{'':10s}"
                speed, memory = count / found["seconds"], found["memory"] / count
                print(f"{name:22s}{count:11,}{found['kept']:11,}{own}{speed:14,.0f}{memory:13,.0f}", flush=True)
            file.unlink()
    print("Missed: " + "; ".join(missed) if missed else "All goals are reached.")


def _missed(name: str, count: int, found: dict[str, float], first: dict[str, float]) -> Iterator[str]:
    seconds = found["seconds" if name in (ALL, READING) else "own"] / count
    if name in GOALS and 1 / seconds < GOALS[name]:
        yield f"{name} at {count:,}: {1 / seconds:,.0f} rows a CPU second, below {GOALS[name]:,}"
    if seconds > GROWTH * first.setdefault(name, seconds):
        yield f"{name} at {count:,}: CPU a row grew by {seconds / first[name] - 1:.0%}"
    if count >= 100_000 and found["memory"] / count > BYTES:
        yield f"{name} at {count:,}: {found['memory'] / count:,.0f} bytes a row, above {BYTES:,}"


if __name__ == "__main__":
    main()
