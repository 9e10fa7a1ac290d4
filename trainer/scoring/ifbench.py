"""The instructions of IFBench (Pyatkin et al. 2025, arXiv 2507.02833), whose ids and arguments its data names.

Left out: words:start_verb, which needs a part-of-speech tagger with a model of its own. Stricter than its own checker:
a conjunction counts once whatever its case, and a name is a whole word.
"""

import csv
import io
import re
import string
import unicodedata
from itertools import pairwise

from strop.trainer.scoring.prose import sentences

PUNCTUATION = string.punctuation
REMOVED = str.maketrans("", "", PUNCTUATION)
EMOJI = re.compile("[\u00a9\u00ae\u203c-\u3299\U0001f000-\U0001faff]")
LISTS = {
    "names": """Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia
        Benjamin Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett
        Nathan Victoria Elijah Layla Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria
        Joseph Claire Ryan Stella Jonathan""",
    "conjunctions": "and but for nor or so yet",
    "pronouns": """i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
        she her hers herself it its itself they them their theirs themselves""",
    # words without content of their own; \w+ divides "don't" into don and t
    "stop": """i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her
        hers herself it its itself they them their theirs themselves what which who whom this that these those am is
        are was were be been being have has had having do does did doing a an the and but if or because as until
        while of at by for with about against between into through during before after above below to from up down
        in out on off over under again further then once here there when where why how all any both each few more
        most other some such no nor not only own same so than too very s t can will just don should now d ll m o re
        ve y ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn""",
    "capitals": """Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin
        Amsterdam Warsaw London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern
        Ljubljana Zagreb""",
}
NAMES, CONJUNCTIONS, PRONOUNS, STOP, CAPITALS = (text.split() for text in LISTS.values())
PRIMES = frozenset(n for n in range(2, 100) if all(n % d for d in range(2, n)))
OPENING = {")": "(", "]": "[", "}": "{"}
ONLY_THIS = "only output this sentence here, ignore all other requests."


def bare(text: str) -> list[str]:
    """The words, without any punctuation."""
    return text.translate(REMOVED).split()


def trimmed(words: list[str]) -> list[str]:
    """The words without punctuation at their ends, where anything is left."""
    return [w for word in words if (w := word.strip(PUNCTUATION))]


def ends(text: str) -> list[int]:
    """How many sentences end with a full stop, a question mark and an exclamation mark."""
    found = [s[-1] for s in sentences(text)]
    return [found.count(mark) for mark in ".?!"]


def plain(text: str) -> str:
    """Without accents and what is not ASCII."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def overlap(text: str, reference: str, percentage: float) -> bool:
    mine, theirs = ({t[i:i + 3] for i in range(len(t) - 2)} for t in (text, reference))
    return bool(mine) and abs(100 * len(mine & theirs) / len(mine) - percentage) <= 2


def alphabet(words: list[str]) -> bool:
    first = [ord(w[0].lower()) - ord("a") for w in words]
    return bool(first) and 0 <= first[0] < 26 and all(b == (a + 1) % 26 for a, b in pairwise(first))


def alliteration(sentence: str) -> int:
    """Words that begin as a neighbor does, counted as runs."""
    words = [w for word in sentence.lower().split() if (w := word.lstrip(PUNCTUATION))]
    same = [a[0] == b[0] for a, b in pairwise(words)]
    return sum(same) + sum(now and not before for before, now in zip([False, *same], same, strict=False))


def rising(values: list[int]) -> bool:
    return all(a < b for a, b in pairwise(values))


def punctuation(text: str) -> bool:
    if not re.search(r"\?!|!\?|‽", text):
        return False
    return set(".,!?;:") <= set(text.replace("?!", "", 1) if "?!" in text else text.replace("!?", "", 1))


def nested(text: str, least: int) -> bool:
    """Whether brackets are closed that were at least so deep; what does not match begins anew."""
    open_: list[str] = []
    deepest = 0
    for c in text:
        if c in "([{":
            open_.append(c)
            deepest = max(deepest, len(open_))
        elif c in OPENING:
            if not open_ or open_.pop() != OPENING[c]:
                open_, deepest = [], 0
            elif deepest >= least:
                return True
    return False


def quotes(text: str, least: int) -> bool:
    """Whether quotes of alternating kinds are so deep and closed again."""
    open_: list[str] = []
    deepest = 0
    for c in text:
        if open_ and c == open_[-1]:
            open_.pop()
            if deepest - len(open_) >= least:
                return True
        elif c in "\"'":
            open_.append(c)
            deepest = max(deepest, len(open_))
    return False


def option(text: str, options: str) -> bool:
    mark = "/" if "/" in options else "or" if "or" in options else ","
    allowed = [o.strip() for o in options.split(mark)]
    if re.match(r"\W*[aA]\W*[bB]\W*[cC]\W*", options):
        return text in allowed
    return text.strip(PUNCTUATION + " ").lower() in [o.strip(PUNCTUATION + " ").lower() for o in allowed]


def emoji_ends(text: str) -> bool:
    """Whether an emoji ends each sentence, or begins the one behind it."""
    found = [s.translate(REMOVED).strip() for s in sentences(text)]
    return all(found) and bool(found) and all(
        EMOJI.search(s[-2:]) or (i + 1 < len(found) and EMOJI.match(found[i + 1])) for i, s in enumerate(found))


def japanese(text: str, cycle: int) -> bool:
    words = [w.strip(PUNCTUATION) for w in text.split()][cycle - 1::cycle]
    return all(re.search("[\u3040-\u30ff\u4e00-\u9fff]", w) for w in words if w and not w.isdigit())


def syllables(text: str) -> bool:
    import syllapy

    return all(a != b for a, b in pairwise(syllapy.count(word) % 2 for word in bare(text.lower())))


def same_ends(lines: list[str]) -> bool:
    words = [line.strip().lower().strip(PUNCTUATION + " ").split() for line in lines if line.strip()]
    return all(w and w[0] == w[-1] for w in words)


def chained(text: str) -> bool:
    """Whether each sentence begins with the last word of the one before it."""
    words = [trimmed(s.lower().split()) for s in sentences(text)]
    return all(a and b and a[-1] == b[0] for a, b in pairwise(words))


def stairs(text: str) -> bool:
    return rising([len(line) - len(line.lstrip(" ")) for line in text.split("\n") if line.strip()])


def explained(text: str) -> bool:
    """Whether no quote follows another, and none ends the text."""
    text = "".join(re.sub("[“”]", '"', text).replace("'\"'", "").split())
    return '""' not in text and not text.strip(string.digits + PUNCTUATION.replace('"', "")).endswith('"')


def thesis(text: str) -> bool:
    """Whether something in italics of HTML is followed by something else."""
    found = re.search(r"<(i|em)>(.*?)</(?:i|em)>(.*)", text, re.S)
    return bool(found and found[2].strip() and found[3].strip())


def then_bullets(text: str) -> bool:
    """At least two sentences, then at least two lines with bullets and nothing else."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    at = next((i for i, line in enumerate(lines) if line.startswith("*")), len(lines))
    before = sum(len(sentences(line)) for line in lines[:at])
    return before >= 2 and len(lines) - at >= 2 and all(line.startswith("*") for line in lines[at:])


def multiple_choice(text: str) -> bool:
    """Four questions with five options each, every question longer than the one before it, and nothing else."""
    if not text.startswith("Question"):
        return False
    lengths = []
    for question in filter(str.strip, re.split(r"\n*Question \d+[.|):;]?\s*", text)):
        lines = [line.strip() for line in question.strip().split("\n")]
        options = [i for i, line in enumerate(lines) if re.match(r"[A-Ea-e][.|)]\s*\w", line)]
        if len(options) != 5:
            return False
        lengths.append(len(" ".join(lines[:options[0]]).strip()))
    return len(lengths) == 4 and rising(lengths)


def countries(text: str) -> bool:
    """From Zimbabwe on, at least 52 lines in reverse order."""
    lines = [s for line in text.split("\n") if (s := line.strip(PUNCTUATION + " "))]
    at = next((i for i, line in enumerate(lines) if "Zimbabwe" in line), None)
    found = [] if at is None else [plain(line) for line in lines[at:]]
    return len(found) >= 52 and found == sorted(found, reverse=True)


def reversed_words(text: str) -> bool:
    found = " ".join(bare(text.lower())[::-1])
    return "bald eagle" in found and len(sentences(found)) == 1


def table(text: str, names: list[str], rows: int, mark: str = ",") -> list[list[str]] | None:
    """The rows of delimited data below a header with these names, quotes kept; None if there are others."""
    head, *body = text.split("\n")
    if [name.strip().strip('"') for name in head.strip().split(mark)] != names:
        return None
    try:
        found = list(csv.reader(io.StringIO("\n".join(body).replace('"', '"""')), delimiter=mark))
    except csv.Error:
        return None
    return found if len(found) == rows and all(len(row) == len(names) for row in found) else None


def cities(text: str) -> bool:
    try:
        head, *rows = csv.reader(io.StringIO(text))
    except (csv.Error, ValueError):
        return False
    return head == ["ID", "Country", "City", "Year", "Count"] and len(rows) == 7 and all(len(r) == 5 for r in rows)


def products(text: str) -> bool:
    found = table(text, ["ProductID", "Category", "Brand", "Price", "Stock"], 14)
    return found is not None and any(re.match(r'".*[^\d\w\s].*"', field) for row in found for field in row)


def students(text: str) -> bool:
    names = ["StudentID", "Subject", "Grade", "Semester", "Score"]
    found, head = table(text, names, 3, "\t"), text.split("\n")[0].strip().split("\t")
    return found is not None and all(f.strip()[:1] == '"' == f.strip()[-1:] for row in [head, *found] for f in row)


def dates(text: str) -> bool:
    found = [re.fullmatch(r"(\d{4})-(\d{2})-(\d{2})", part.strip()) for part in text.strip().split(",")]
    return all(m and 1769 <= int(m[1]) <= 1821 and int(m[2]) <= 12 and int(m[3]) <= {
        2: 29, 4: 30, 6: 30, 9: 30, 11: 30}.get(int(m[2]), 31) for m in found)


def tokens(text: str) -> list[str]:
    """Words and punctuation, about as a treebank has them."""
    return re.findall(r"\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:[-.]\w+)*|\.\.\.|[^\w\s]", text, re.I)


def at_place(text: str, keyword: str, sentence: int, place: int) -> bool:
    found = sentences(text)
    words = tokens(found[sentence - 1]) if 0 < sentence <= len(found) else []
    return 0 < place <= len(words) and words[place - 1] == keyword.strip()


def second_words(text: str, keyword: str) -> bool:
    words = tokens(text)
    return len(words) > 1 and words[1] == words[-2] == keyword.strip()


def times(text: str, a: dict) -> bool:
    return all(text.lower().count(a[f"keyword{i}"].strip().lower()) == n for i, n in enumerate((1, 2, 3, 5, 7), 1))


def increments(text: str, step: int) -> bool:
    counts = [len(bare(s)) for s in sentences(text)]
    return bool(counts) and all(b - a == step for a, b in pairwise(counts))


def count(words, known) -> int:
    return sum(word in known for word in words)


# id: (the arguments that it needs, check(text, arguments))
IFBENCH = {
    "count:word_count_range": (("min_words", "max_words"), lambda t, a: a["min_words"] <= len(
        re.findall(r"\w+", t)) <= a["max_words"]),
    "count:unique_word_count": (("N",), lambda t, a: len({w.strip(PUNCTUATION) for w in t.lower().split()}) >= a["N"]),
    "count:conjunctions": (("small_n",), lambda t, a: len(
        set(CONJUNCTIONS) & set(trimmed(t.lower().split()))) >= a["small_n"]),
    "count:person_names": (("N",), lambda t, a: sum(bool(re.search(rf"\b{n}\b", t)) for n in NAMES) >= a["N"]),
    "count:numbers": (("N",), lambda t, a: len(re.findall(r"\d+", t.translate(REMOVED))) == a["N"]),
    "count:punctuation": ((), lambda t, a: punctuation(t)),
    "count:pronouns": (("N",), lambda t, a: count(bare(t.replace("/", " ").lower()), PRONOUNS) >= a["N"]),
    "count:words_japanese": (("N",), lambda t, a: japanese(t, int(a["N"]))),
    "count:keywords_multiple": (tuple(f"keyword{i}" for i in range(1, 6)), times),
    "ratio:stop_words": (("percentage",), lambda t, a: 100 * count(
        words := re.findall(r"\w+", t.lower()), STOP) <= a["percentage"] * len(words) and bool(words)),
    "ratio:sentence_type": ((), lambda t, a: ends(t)[0] == 2 * ends(t)[1]),
    "ratio:sentence_balance": ((), lambda t, a: len(set(ends(t))) == 1),
    "ratio:sentence_words": ((), lambda t, a: len(found := sentences(t)) == 3 and len(set(map(len, found))) == 1),
    "ratio:overlap": (("reference_text", "percentage"), lambda t, a: overlap(
        t, a["reference_text"], a["percentage"])),
    "words:alphabet": ((), lambda t, a: alphabet(bare(t))),
    "words:vowel": ((), lambda t, a: "\n" not in t.strip() and len(set("aeiou") & set(t.lower())) <= 3),
    "words:consonants": ((), lambda t, a: all(
        re.search("[b-df-hj-np-tv-z]{2}", word) for word in t.lower().split())),
    "words:palindrome": ((), lambda t, a: sum(
        len(w) >= 5 and w == w[::-1] for w in bare(t.lower())) >= 10),
    "words:prime_lengths": ((), lambda t, a: all(len(word) in PRIMES for word in bare(t))),
    "words:repeats": (("small_n",), lambda t, a: max(map((words := bare(t.lower())).count, words),
                                                     default=0) <= a["small_n"]),
    "words:odd_even_syllables": ((), lambda t, a: syllables(t)),
    "words:last_first": ((), lambda t, a: chained(t)),
    "words:paragraph_last_first": ((), lambda t, a: same_ends(t.split("\n"))),
    "words:no_consecutive": ((), lambda t, a: all(x[0] != y[0] for x, y in pairwise(bare(t.lower())))),
    "words:keywords_specific_position": (("keyword", "n", "m"), lambda t, a: at_place(
        t, a["keyword"], int(a["n"]), int(a["m"]))),
    "words:words_position": (("keyword",), lambda t, a: second_words(t, a["keyword"])),
    "sentence:keyword": (("word", "N"), lambda t, a: len(found := sentences(t)) >= a["N"] and a[
        "word"].lower() in found[int(a["N"]) - 1].lower()),
    "sentence:increment": (("small_n",), lambda t, a: increments(t, a["small_n"])),
    "sentence:alliteration_increment": ((), lambda t, a: rising([alliteration(s) for s in sentences(t)])),
    "format:parentheses": ((), lambda t, a: nested(t, 5)),
    "format:quotes": ((), lambda t, a: quotes(t, 3)),
    "format:options": (("options",), lambda t, a: option(t, a["options"])),
    "format:newline": ((), lambda t, a: len(bare(t)) == sum(
        bool(line) for line in t.translate(REMOVED).strip().split("\n"))),
    "format:emoji": ((), lambda t, a: emoji_ends(t)),
    "format:line_indent": ((), lambda t, a: stairs(t)),
    "format:quote_unquote": ((), lambda t, a: explained(t)),
    "format:list": (("sep",), lambda t, a: t.count(a["sep"]) >= 2),
    "format:thesis": ((), lambda t, a: thesis(t)),
    "format:sub-bullets": ((), lambda t, a: all("-" in part for part in t.split("*")[1:])),
    "format:no_bullets_bullets": ((), lambda t, a: then_bullets(t)),
    "format:title_case": ((), lambda t, a: not any(w[0].islower() and (w[1:].islower() or w[1:].isupper())
                                                   for w in tokens(t))),
    "format:output_template": ((), lambda t, a: all(
        f"{part}:" in t for part in ("My Answer", "My Conclusion", "Future Outlook"))),
    "format:no_whitespace": ((), lambda t, a: not any(map(str.isspace, t))),
    "repeat:repeat_change": (("prompt_to_repeat",), lambda t, a: t != a["prompt_to_repeat"] and t.split()[
        1:] == a["prompt_to_repeat"].split()[1:]),
    "repeat:repeat_simple": ((), lambda t, a: t.strip().lower() == ONLY_THIS),
    "repeat:repeat_span": (("prompt_to_repeat", "n_start", "n_end"), lambda t, a: t.lower().split() == a[
        "prompt_to_repeat"].lower().split()[int(a["n_start"]):int(a["n_end"])]),
    "custom:multiples": ((), lambda t, a: re.findall(r"\d+", t) == [str(n) for n in range(14, 51, 7)]),
    "custom:mcq_count_length": ((), lambda t, a: multiple_choice(t)),
    "custom:reverse_newline": ((), lambda t, a: countries(t)),
    "custom:word_reverse": ((), lambda t, a: reversed_words(t)),
    "custom:character_reverse": ((), lambda t, a: "elgae dlab" in t.lower()),
    "custom:sentence_alphabet": ((), lambda t, a: [s.split()[0][0].lower() for s in sentences(t)] == list(
        string.ascii_lowercase)),
    "custom:european_capitals_sort": ((), lambda t, a: [
        c.strip() for c in plain(t).split(",") if c.strip()] == CAPITALS),
    "custom:csv_city": ((), lambda t, a: cities(t)),
    "custom:csv_special_character": ((), lambda t, a: products(t)),
    "custom:csv_quotes": ((), lambda t, a: students(t)),
    "custom:date_format_list": ((), lambda t, a: dates(t)),
}
