"""Which prompts are held out, and which ones a round samples; both depend on content and seed only."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice

from strop.trainer.config import Data, Part
from strop.trainer.errors import UserError

HELD_OUT = ("test", "validation")


def assign_splits(rows: list[dict], data: Data | Part, seed: int) -> None:
    """Sets `split` of every row: data.test and data.validation prompts (or a few more), split over the sources by
    share, the rest train. Rows of equal content stay together. Raises UserError if there are too few prompts."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        row["split"] = "train"
        groups.setdefault(row.pop("content"), []).append(row)
    total = Counter(row["source"] for row in rows)
    room = {s.name: max(0, total[s.name] - 1) for s in data.sources}
    if sum(room.values()) < data.test + data.validation:
        has = ", ".join(f"{name} {n:,}" for name, n in sorted(total.items())) or "none"
        raise UserError(f"data.test={data.test} and data.validation={data.validation} leave nothing to train on: "
                         f"there are {len(rows)} distinct prompts ({has}); give more (size of a reasoning_gym "
                         "source, or rows) or lower data.test and data.validation")
    shares, quota = {s.name: s.share for s in data.sources}, {}
    for split in HELD_OUT:
        quota[split] = allot(getattr(data, split), shares, room)
        room = {name: room[name] - quota[split][name] for name in room}
    order = sorted(groups, key=lambda c: hashlib.blake2b(f"{seed}:split:{c}".encode(), digest_size=16).digest())
    held: Counter = Counter()
    for source in shares:
        mine = iter([c for c in order if any(r["source"] == source for r in groups[c])])
        for split in HELD_OUT:
            while held[source, split] < quota[split][source] and (content := next(mine, None)) is not None:
                if groups[content][0]["split"] == "train":
                    for row in groups[content]:
                        row["split"] = split
                        held[row["source"], split] += 1
    splits = Counter(row["split"] for row in rows)
    if not splits["train"] or any(splits[s] < getattr(data, s) for s in HELD_OUT):
        raise UserError(f"data.test={data.test} and data.validation={data.validation} do not fit: the sources share "
                         f"so many prompts that the splits hold {dict(splits)}; lower them or give more prompts")


def allot(total: int, shares: dict[str, float], room: dict[str, int]) -> dict[str, int]:
    """Splits `total` into integers proportional to `shares`, none above its `room`; others take the excess."""
    given = dict.fromkeys(shares, 0)
    while (left := total - sum(given.values())) > 0:
        open_ = [name for name in shares if given[name] < room[name]]
        assert open_, (total, room)
        weight = sum(shares[name] for name in open_)
        exact = {name: left * shares[name] / weight for name in open_}
        parts = {name: int(exact[name]) for name in open_}
        for name in sorted(open_, key=lambda n: parts[n] - exact[n])[:left - sum(parts.values())]:
            parts[name] += 1
        for name in open_:
            given[name] = min(room[name], given[name] + parts[name])
    return given


def draw_prompts(rows: list[dict], shares: dict[str, float], n: int, seed: int, round: int) -> list[dict]:
    """This round's `n` prompts (all, if there are fewer), from each source in proportion to its share.

    Rounds take the prompts of a source in a shuffled order, which is redrawn once all of them were used. No prompt
    comes twice in a round.
    """
    return next(draws(rows, shares, n, seed, round))


def draws(rows: list[dict], shares: dict[str, float], n: int, seed: int, first: int = 0) -> Iterator[list[dict]]:
    """What `draw_prompts` draws in rounds `first`, first + 1, ..."""
    sources: dict[str, dict[str, dict]] = {name: {} for name in shares}
    for row in rows:
        sources[row["source"]][row["prompt_id"]] = row
    room = {name: len(members) for name, members in sources.items()}
    streams = {name: islice(stream(sorted(sources[name]), m, seed, name), first, None)
               for name, m in allot(min(n, sum(room.values())), shares, room).items()}
    for round in count(first):
        chosen = [sources[name][i] for name, ids in streams.items() for i in next(ids)]
        yield sorted(chosen, key=lambda row: hash_int(seed, "order", round, row["prompt_id"]))


def stream(ids: list[str], m: int, seed: int, source: str) -> Iterator[list[str]]:
    """The `m` ids of round 0, 1, ...: rounds take the next m of an endless sequence of shuffled passes over `ids`."""
    waiting: list[str] = []
    epoch = 0
    while True:
        if len(waiting) < m:
            fresh = sorted(ids, key=lambda i: hash_int(seed, "pass", source, epoch, i))
            left = set(waiting)  # these come last in the new pass, so that none comes twice in this round
            waiting += [i for i in fresh if i not in left] + [i for i in fresh if i in left]
            epoch += 1
        yield waiting[:m]
        waiting = waiting[m:]


def hash_int(*parts) -> int:
    """A 63-bit hash of `parts`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
