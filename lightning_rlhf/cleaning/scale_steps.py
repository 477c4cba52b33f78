"""The steps of :mod:`~lightning_rlhf.cleaning.scale`, which datatrove's workers load."""

from __future__ import annotations

import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from lightning_rlhf.cleaning.example import Kind, make_example, read_examples
from lightning_rlhf.cleaning.filters.make import make_filters
from lightning_rlhf.cleaning.near_duplicates import shingles, similarity
from lightning_rlhf.cleaning.outputs import NotedBadRows, Outputs, dropped_entry, json_line, writable
from lightning_rlhf.cleaning.pipeline import FilterTally, Tally, clean
from lightning_rlhf.data.sources import BadRows
from lightning_rlhf.utils.imports import require

#: Bands of MinHash values, and values in each: pairs of similarity 0.8 are found with a probability of 0.998.
BANDS, ROWS = 20, 6
#: datatrove's own hash of texts is not used: xxhash 4 changed what it is called with.
CONFIG = MinhashConfig(num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(precision=64, hash_fc="sha1"))
_NEAR = "NearDuplicate"


def fork_from_a_server() -> None:
    """Lets tasks of Ray be forked from a process without threads, so that none waits for a lock that nobody frees."""
    import multiprocess

    multiprocess.set_start_method("forkserver", force=True)


class CleanFiles(PipelineStep):
    """Reads the file of a task, runs the filters, and writes what they keep and drop to files of its own.

    Args:
        files: All files.
        work: Folder of intermediate files.
        filters: Filters that remember nothing.
        kind: What the rows are.
        format: Their format.
    """

    type, name = "cleaning", "filters"

    def __init__(
        self, files: Sequence[str], work: str, filters: Sequence[Any], kind: Kind | Literal["auto"], format: str
    ) -> None:
        super().__init__()
        self.files, self.work, self.filters, self.kind, self.format = list(files), work, list(filters), kind, format

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields a document for each row that is kept: its tokens, joined by spaces."""
        folder, tally = Path(self.work), Tally()
        for part in ("kept", "dropped", "tally"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with (
            (folder / "kept" / f"{rank:05d}.jsonl").open("w", encoding="utf-8", newline="\n") as kept,
            (folder / "dropped" / f"{rank:05d}.jsonl").open("w", encoding="utf-8", newline="\n") as dropped,
        ):

            def note(entry: Mapping[str, Any]) -> None:
                dropped.write(json_line(entry))

            bad = NotedBadRows("skip", note)
            examples = writable(read_examples(self.files[rank], bad, self.kind, self.format), bad)
            filters = make_filters(self.filters)
            for example in clean(examples, filters, tally, lambda *found: note(dropped_entry(*found))):
                entry = {"where": example.where, "kind": example.kind, "format": example.format, "row": example.row}
                kept.write(json_line(entry))
                yield Document(text=" ".join(example.distinct_tokens), id=example.where)
        found = {"tally": tally.to_json(), "bad_rows": bad.summary()}
        (folder / "tally" / f"{rank:05d}.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


class Count(PipelineStep):
    """Takes all documents: the end of a pipeline without near duplicates."""

    type, name = "cleaning", "count"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Takes them."""
        for _ in data:
            self.stat_update("documents")


class Joined(WordTokenizer):
    """Splits tokens that were joined by spaces; datatrove's own tokenizers would load spaCy."""

    def word_tokenize(self, text: str) -> list[str]:
        """The tokens."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """The whole text."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The span of the whole text."""
        return [(0, len(text))]


class Sign(MinhashDedupSignature):
    """Signatures of the shingles that our own engine compares, whatever the language.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, CONFIG, Joined())

    def get_shingles(self, text: str) -> Any:
        """The hashes of a text's tokens and pairs of tokens, (N, 1)."""
        minhash = require("rensa", "Finding near duplicates", "collect").RMinHash
        (hashes,) = minhash.hash_token_sets([shingles(self.word_tokenizer.word_tokenize(text))])
        return np.array(hashes, dtype=np.uint64).reshape(-1, 1)


def buckets(signatures: str, folder: str) -> Any:
    """The step that finds equal bands."""
    return MinhashDedupBuckets(signatures, folder, config=CONFIG)


def clusters(pairs: str, folder: str) -> Any:
    """The step that joins pairs to clusters."""
    return MinhashDedupCluster(pairs, folder, config=CONFIG, save_cluster_id=True)


class Finish(PipelineStep):
    """Confirms near duplicates within clusters by exact similarity, and writes the outputs.

    Args:
        files: All files.
        work: Folder of intermediate files.
        out: File for the rows.
        threshold: Least similarity of near duplicates; None if there is no filter for them.
    """

    type, name = "cleaning", "finish"

    def __init__(self, files: Sequence[str], work: str, out: str, threshold: float | None) -> None:
        super().__init__()
        self.files, self.work, self.out, self.threshold = list(files), work, out, threshold

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Reads what was kept twice: members of clusters to compare them, then all to write them."""
        near, tally, bad = self._near_duplicates(), Tally(), BadRows("skip")
        with Outputs(Path(self.out), self.files) as out:
            for task, place, line in self._kept():
                entry = json.loads(line)
                if (found := near.get((task, place))) is None:
                    out.keep(json_line(entry["row"]))
                    continue
                measured = {"near_duplicate": found}
                note = {"where": entry["where"], "filter": _NEAR, "reason": "near duplicate", "measured": measured}
                out.note({**note, "row": entry["row"]})
            for task in range(len(self.files)):
                with self._open("dropped", task, "jsonl") as file:
                    for line in file:
                        out.drop(line)
                with self._open("tally", task, "json") as file:
                    read = json.load(file)
                tally.merge(read["tally"])
                bad.merge(read["bad_rows"])
            if self.threshold is not None:
                reasons = Counter({"near duplicate": len(near)} if near else {})
                tally.filters[_NEAR] = FilterTally(seen=tally.kept, dropped=len(near), reasons=reasons)
                tally.kept -= len(near)
            out.report({"filters": tally.to_json(), "bad_rows": bad.summary()})
        said = [*tally.lines(), *([f"{bad.total:,} bad rows: {bad.reasons}"] if bad.total else []), *out.lines()]
        (Path(self.work) / "said.txt").write_text("\n".join(said), encoding="utf-8")

    def _near_duplicates(self) -> Mapping[tuple[int, int], str]:
        """The rows that are near duplicates of one before in their cluster, with what they are like."""
        if self.threshold is None:
            return {}
        of: dict[tuple[int, int], int] = {}
        for file in sorted((Path(self.work) / "clusters").glob("*.clusters")):
            task = int(file.stem)
            of.update({(task, place): cluster for place, cluster in struct.iter_unpack("<2I", file.read_bytes())})
        first: defaultdict[int, list[tuple[str, frozenset[str]]]] = defaultdict(list)
        found = {}
        for task, place, line in self._kept():
            if (cluster := of.get((task, place))) is None:
                continue
            entry = json.loads(line)
            example = make_example(entry["row"], entry["where"], entry["kind"], entry["format"])
            new = frozenset(shingles(example.distinct_tokens))
            best = max(((similarity(new, other), where) for where, other in first[cluster]), default=(0.0, ""))
            if best[0] >= self.threshold:
                found[task, place] = f"{best[0]:.2f} of {best[1]}"
            else:
                first[cluster].append((example.where, new))
        return found

    def _kept(self) -> Iterator[tuple[int, int, str]]:
        """Task, place and line of each row that the filters kept, in order."""
        for task in range(len(self.files)):
            with self._open("kept", task, "jsonl") as file:
                for place, line in enumerate(file):
                    yield task, place, line

    def _open(self, part: str, task: int, suffix: str) -> Any:
        return (Path(self.work) / part / f"{task:05d}.{suffix}").open(encoding="utf-8")
